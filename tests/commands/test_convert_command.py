"""`convert` and `export torch`: refused input is one sentence that names it, and leaves nothing."""

import math
import os
import re

import pytest
import safetensors.numpy
from official_files import (
    KINDS,
    LADDER,
    assert_bit_equal,
    file_of,
    file_of_zeros,
    official_shapes,
    random_model,
    random_state,
    refusal,
    small,
    stages_of,
    stored,
    without_mask_branch,
)
from tiny_models import TINY

from hmar_jax.commands import convert as convert_command
from hmar_jax.commands import export as export_command
from hmar_jax.commands.main import main
from hmar_jax.config import ModelConfig
from hmar_jax.formats.convert import convert, export_torch
from hmar_jax.model import Model

TRANSFORMERS = KINDS[1:]
SIGNATURE = {"vae": "quantize.embedding.weight"} | dict.fromkeys(TRANSFORMERS, "pos_1LC")
LAYOUT = dict(zip(KINDS, ("vae", "var or hmar-stage1", "hmar", "var or hmar-stage1", "hmar-stage2"), strict=True))


@pytest.fixture
def refused(tmp_path):
    """Runs a command that is to be refused and leaves nothing; its sentence, `tmp_path/` left out."""
    return lambda command, *words: refusal(tmp_path, lambda: command.run([str(word) for word in words]))


@pytest.fixture
def refused_file(refused, tmp_path, small_tokenizer):
    """(kind, file, **options) → what the refused conversion says."""

    def run(kind, file, **options):
        chosen = {"sides": "1,2,3,4", "tokenizer": None if kind == "vae" else small_tokenizer} | options
        words = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items() if value is not None]
        output = options.get("output", tmp_path / "out")
        return refused(convert_command, f"--kind={kind}", f"--input={file}", *words, f"--output={output}")

    return run


@pytest.fixture
def refused_shapes(refused_file, tmp_path):
    def run(kind, shapes, **options):
        return refused_file(kind, file_of_zeros(tmp_path / "f.safetensors", shapes), **options)

    return run


# --- entries

# Of each kind: what is nowhere else, in the middle of the blocks, and at the end.
ENTRIES = {
    "vae": [
        "encoder.mid.attn_1.qkv.weight",
        "decoder.up.1.block.0.conv2.bias",
        "quantize.quant_resi.qresi_ls.1.weight",
    ],
    "var": ["shared_ada_lin.1.bias", "blocks.1.ada_gss", "head_nm.ada_lin.1.weight"],
    "hmar": ["ns_head.bias", "base_blocks.0.attn.mat_qkv.weight", "mask_blocks.1.attn.scale_mul_1H11"],
    "hmar-stage1": ["word_embed.bias", "blocks.4.attn.proj.weight", "blocks.8.ada_lin.1.bias"],
    "hmar-stage2": ["mask_embed.weight", "blocks.5.ffn.fc1.weight", "blocks.8.ffn.fc2.bias"],
}
CASES = [(kind, entry) for kind, entries in ENTRIES.items() for entry in entries]


@pytest.mark.parametrize(("kind", "entry"), CASES)
def test_a_missing_entry_is_named(refused_shapes, kind, entry):
    shapes = official_shapes(kind)
    del shapes[entry]
    assert refused_shapes(kind, shapes).startswith(f"f.safetensors lacks {entry}; ")


COUNTED = {  # what there is at least one of
    "vae": ["encoder.down.0.", "decoder.up.0.block.0.", "quantize.quant_resi.qresi_ls.0."],
    "var": ["blocks.0."],
    "hmar": ["ns_blocks.0."],
    "hmar-stage2": ["blocks.0."],
}


@pytest.mark.parametrize(("kind", "first"), [(kind, first) for kind, firsts in COUNTED.items() for first in firsts])
def test_a_part_that_is_missing_whole_is_named(refused_shapes, kind, first):
    all_of_them = first.removesuffix("0.")
    shapes = {name: shape for name, shape in official_shapes(kind).items() if not name.startswith(all_of_them)}
    assert refused_shapes(kind, shapes) == f"f.safetensors lacks {first}*; it is not a whole state dict of this kind."


@pytest.mark.parametrize(("kind", "entry"), CASES)
def test_a_misshapen_entry_is_named_with_both_shapes(refused_shapes, kind, entry):
    shapes = official_shapes(kind)
    for wrong in ((*shapes[entry][:-1], shapes[entry][-1] + 1), (*shapes[entry], 1)):
        said = refused_shapes(kind, shapes | {entry: wrong})
        assert said.startswith(f"f.safetensors has {entry} of shape {wrong}, not {shapes[entry]}; expected all entries")


# As a header calls it, and as the sentence does: NumPy knows the first three alone.
DTYPES = {"I8": "int8", "BOOL": "bool", "U32": "uint32", "F8_E4M3": "F8_E4M3", "F8_E5M2": "F8_E5M2", "C64": "C64"}


@pytest.mark.parametrize("code", DTYPES)
def test_an_entry_that_holds_no_floats_is_named(refused_file, tmp_path, code):
    entries = {f"model.{name}": ("F32", shape) for name, shape in official_shapes("vae").items()}
    file = file_of_zeros(tmp_path / "f.safetensors", entries | {"model.quant_conv.bias": (code, (4,))})
    where, floats = "f.safetensors under 'model'", "float32, bfloat16, float16 or float64"
    expected = (
        f"{where} has quant_conv.bias as {DTYPES[code]}; expected {floats}, so give weights that are such floats."
    )
    assert refused_file("vae", file) == expected


TELLING = {  # entries that the sizes are read from
    "vae": ["quantize.embedding.weight", "encoder.conv_in.weight", "encoder.down.1.block.0.conv2.weight"],
    "var": ["pos_start", "pos_1LC", "lvl_embed.weight", "blocks.0.attn.scale_mul_1H11", "blocks.0.ffn.fc1.weight"],
}


@pytest.mark.parametrize(("kind", "entry"), [(kind, entry) for kind, entries in TELLING.items() for entry in entries])
@pytest.mark.parametrize("size", [(), (0,)], ids=["flat", "empty"])
def test_a_telling_entry_of_no_use_is_refused(refused_shapes, kind, entry, size):
    shapes = official_shapes(kind)
    wrong = size * len(shapes[entry]) or (math.prod(shapes[entry]),)
    said = refused_shapes(kind, shapes | {entry: wrong})
    assert said.startswith(f"f.safetensors has {entry} of shape {wrong}; expected ") or size, said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", ["extra.weight", "model.head.gate"])
def test_an_unexpected_entry_is_named(refused_shapes, kind, extra):
    said = refused_shapes(kind, official_shapes(kind) | {extra: (2,)})
    assert said == f"f.safetensors has the unexpected {extra}; expected all entries of one {kind} and no others."


# --- which state dict


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(("of", "asked"), [(a, b) for a in KINDS for b in KINDS if LAYOUT[a] != LAYOUT[b]])
def test_a_file_of_another_kind_is_told_its_own(refused_shapes, of, asked, prefix):
    said = refused_shapes(asked, {prefix + name: shape for name, shape in official_shapes(of).items()})
    assert re.search(rf"is laid out as {LAYOUT[of]}, not as {asked}; give it the right --kind\.$", said), said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shapes", [{"a.weight": (2,), "b": (3,)}, {}], ids=["other", "empty"])
def test_a_file_of_something_else_is_no_model(refused_shapes, kind, shapes):
    said = refused_shapes(kind, shapes)
    assert f"f.safetensors lacks {SIGNATURE[kind]} at the top or under a key, so it holds no whole {kind}; " in said
    assert said.endswith("its entries begin a.weight, b.") if shapes else not said.endswith("begin .")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["ema.old", ""])
def test_a_wrong_key_is_told_the_right_ones(refused_shapes, kind, key):
    shapes = official_shapes(kind)
    nested = {f"{key}.{name}": shape for key in ("model", "ema.module") for name, shape in shapes.items()}
    place = f"under {key!r}" if key else "at the top"
    expected = f"f.safetensors holds no {kind} {place}; choose with --key one of 'ema.module', 'model'."
    assert refused_shapes(kind, nested, key=key) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_several_state_dicts_need_a_choice(refused_shapes, kind):
    shapes = official_shapes(kind)
    both = {f"{key}.{name}": shape for key in ("model", "ema") for name, shape in shapes.items()}
    expected = "f.safetensors holds 2 state dicts of this kind; choose with --key one of 'ema', 'model'."
    assert refused_shapes(kind, both) == expected


# --- what does not go together

SIDES = {
    "1,2,3": "--sides=1,2,3 has 3 scales and 14 tokens, 1 of them in the first; f.safetensors was built for 4 scales "
    "and 30 tokens, 1 in the first.",
    "1,2,3,5": "--sides=1,2,3,5 has 4 scales and 39 tokens",
    "2,3,4,5": "--sides=2,3,4,5 has 4 scales and 54 tokens, 4 of them in the first",
    "1,2,x": "Sides '1,2,x' are not a list of whole numbers, such as 1,2,3,4, and no",
    "1,2.5": "Sides '1,2.5' are not a list of whole numbers",
    "": "Sides '' are not a list of whole numbers",
    "1,,2": "Sides '1,,2' are not a list of whole numbers",
    "4,3,2,1": "Sides (4, 3, 2, 1) are not an increasing list of positive integers",
    "0,1": "Sides (0, 1) are not an increasing list of positive integers",
}


@pytest.mark.parametrize("sides", SIDES)
def test_sides_that_do_not_fit_are_refused(refused_shapes, sides):
    assert refused_shapes("var", official_shapes("var"), sides=sides).startswith(SIDES[sides])


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize(("codes", "channels"), [(17, 4), (16, 5)])
def test_a_tokenizer_of_other_sizes_is_refused(refused_shapes, small_tokenizer, kind, codes, channels):
    shapes = official_shapes(kind)
    for name, shape in shapes.items():
        if re.search(r"(^|_)head\.(weight|bias)$", name):
            shapes[name] = (codes, *shape[1:])
    said = refused_shapes(kind, shapes | {"word_embed.weight": (8, channels)})
    assert said.startswith(
        f"f.safetensors is for {codes} codes of {channels} channels, but {small_tokenizer} has 16 of 4; give"
    )


OPTIONS = {
    "no tokenizer": ("var", {"tokenizer": None}, "Kind var goes with --tokenizer, a model directory."),
    "a tokenizer's": ("vae", {"tokenizer": "x"}, "Kind vae goes without --tokenizer, a model directory."),
    "nowhere": ("var", {"tokenizer": "/nowhere"}, "/nowhere is not a model directory: it has no config.json; "),
    "stage 1 nowhere": ("hmar-stage2", {"next_scale": "/nowhere"}, "/nowhere is not a model directory: it has no c"),
} | {
    f"stage 1 of {kind}": (kind, {"next_scale": "x"}, "--next-scale is the stage-1 model of an hmar-stage2 file; ")
    for kind in ("vae", "var", "hmar", "hmar-stage1")
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit_are_refused(refused_shapes, case):
    kind, options, expected = OPTIONS[case]
    assert refused_shapes(kind, official_shapes(kind), **options).startswith(expected)


# --- files


def text(file):
    file.write_text("hello")


def cut(file):
    file_of(file, random_state("vae"))
    os.truncate(file, file.stat().st_size - 100)


FILES = {
    "missing": ("f.safetensors", lambda file: None, "f.safetensors does not exist; give a .safetensors file."),
    "cut": ("f.safetensors", cut, "f.safetensors is not a whole .safetensors file ("),
    "empty": ("f.safetensors", lambda file: file.touch(), "f.safetensors is not a whole .safetensors file ("),
    "a text": ("f.safetensors", text, "f.safetensors is not a whole .safetensors file ("),
    "a folder": ("f.safetensors", lambda file: file.mkdir(), "File f.safetensors is a folder; give a file."),
    "another ending": ("f.npz", text, "f.npz is no .safetensors or .pth file; give one with such an ending."),
    "no ending": ("f", text, "f is no .safetensors or .pth file; give one with such an ending."),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_read_is_named(refused_file, tmp_path, case):
    name, make, expected = FILES[case]
    make(tmp_path / name)
    assert refused_file("vae", tmp_path / name).startswith(expected)


@pytest.mark.parametrize("make", [os.mkdir, lambda path: path.touch()], ids=["folder", "file"])
@pytest.mark.parametrize("command", [convert_command, export_command])
def test_an_output_that_exists_is_refused(refused, tmp_path, small_tokenizer, make, command):
    taken = tmp_path / "taken.safetensors"
    make(taken)
    of_convert = ["--kind=vae", "--input=x", "--sides=1"]
    words = of_convert if command is convert_command else ["torch", f"--model={small_tokenizer}"]
    said = refused(command, *words, f"--output={taken}")
    assert said.startswith("taken.safetensors exists already; remove it, or choose another output ")


@pytest.mark.parametrize("command", [["convert"], ["convert", "--kind=gan"], ["export", "torch"]], ids=" ".join)
def test_a_malformed_command_line_exits_with_2_and_says_how_it_goes(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert f"usage: hmar-jax {command[0]}" in capsys.readouterr().err


def test_a_refused_command_says_one_line_and_exits_with_2(tmp_path, capsys):
    words = ["--kind=vae", f"--input={tmp_path / 'f.safetensors'}", "--sides=1", f"--output={tmp_path / 'out'}"]
    assert main(["convert", *words]) == 2
    said = f"hmar-jax convert: {tmp_path / 'f.safetensors'} does not exist; give a .safetensors file.\n"
    assert capsys.readouterr() == ("", said)


def test_commands_convert_and_export(tmp_path, capsys):
    state = random_state("hmar", depth=9, branch_depth=8)
    states = {"vae": random_state("vae")} | dict(zip(("hmar-stage1", "hmar-stage2"), stages_of(state, 1), strict=True))
    common = ["--sides=1,2,3,4", "--dtype=float32", "--key=model"]
    for kind, more in [("vae", []), ("hmar-stage1", ["vae"]), ("hmar-stage2", ["vae", "hmar-stage1"])]:
        file = file_of(tmp_path / f"{kind}.safetensors", {f"model.{name}": a for name, a in states[kind].items()})
        parts = [f"--{name}={tmp_path / part}" for name, part in zip(("tokenizer", "next-scale"), more, strict=False)]
        output = tmp_path / kind
        convert_command.run([f"--kind={kind}", f"--input={file}", *common, *parts, f"--output={output}"])
        assert f"The model is in {output}" in capsys.readouterr().out
    for kind, options in [("hmar-stage2", []), ("hmar", ["--kind=hmar"]), ("vae", ["--kind=vae"])]:
        output = tmp_path / f"back-{kind}.safetensors"
        export_command.run(["torch", f"--model={tmp_path / 'hmar-stage2'}", *options, f"--output={output}"])
        assert f"The {kind} state dict is in {output}" in capsys.readouterr().out
        assert_bit_equal(safetensors.numpy.load_file(output), state if kind == "hmar" else states[kind])


# --- what can be exported


def tokenizer_of(model):
    return Model(ModelConfig(model.config.ladder, model.config.tokenizer), {"tokenizer": model.params["tokenizer"]})


OWN = {
    "hmar": lambda: random_model(small("hmar")),
    "hmar-stage1": lambda: without_mask_branch(random_model(small("hmar-stage2"))),
    "var": lambda: random_model(small("var")),
    "vae": lambda: tokenizer_of(random_model(small("hmar"))),
    "leak-free": lambda: random_model(small("hmar", leak_free=True)),
    "4 groups": lambda: random_model(TINY),
}


@pytest.mark.parametrize("kind", ["hmar", "hmar-stage1", "var", "vae"])
def test_a_model_of_ones_own_is_exported_as_what_it_is(tmp_path, kind):
    model = OWN[kind]().save(tmp_path / "own", source="a test")
    assert export_torch(model, tmp_path / "own.safetensors") == kind
    parts = {} if kind == "vae" else {"tokenizer": model}
    assert_bit_equal(
        stored(convert(kind, tmp_path / "own.safetensors", LADDER, tmp_path / "b", **parts)), stored(model)
    )


EXPORTS = {
    "leak-free": ("leak-free", [], "own is leak-free, which the official code is not: it would give other pictures"),
    "groups": ("4 groups", ["--kind=vae"], "The tokenizer of own has 4 groups in its norms; the official code has 32"),
    "no mask branch": ("hmar-stage1", ["--kind=hmar"], "own holds hmar-stage1 and vae, not hmar; choose one of those"),
    "no stage 2": ("hmar-stage1", ["--kind=hmar-stage2"], "own holds hmar-stage1 and vae, not hmar-stage2; choose"),
    "other attention": ("var", ["--kind=hmar-stage1"], "own holds vae and var, not hmar-stage1; choose one of those"),
    "no VAR": ("hmar", ["--kind=var"], "own holds hmar and hmar-stage2 and vae, not var; choose one of those"),
    "a tokenizer": ("vae", ["--kind=hmar"], "own holds vae, not hmar; choose one of those as --kind."),
    "an ending": ("var", ["--output=out.npz"], "Output out.npz is no .safetensors or .pth file; give it one of these"),
    "no folder": ("var", ["--output=/proc/no/out.safetensors"], "Could not write /proc/no/out.safetensors ("),
    "no model": ("var", ["--model=/nowhere"], "/nowhere is not a model directory: it has no config.json; "),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_what_the_official_code_cannot_run_is_not_exported(refused, tmp_path, case):
    own, options, expected = EXPORTS[case]
    model = OWN[own]().save(tmp_path / "own", source="a test")
    words = [f"--model={model}", f"--output={tmp_path / 'out.pth'}", *options]
    assert refused(export_command, "torch", *words).startswith(expected)


@pytest.mark.parametrize("own", ["leak-free", "4 groups"])
def test_the_other_part_of_such_a_model_is_exported(tmp_path, own):
    model, kind = OWN[own]().save(tmp_path / "own", source="a test"), {"leak-free": "vae", "4 groups": "hmar"}[own]
    assert export_torch(model, tmp_path / "out.safetensors", kind) == kind
