"""Official checkpoints ⇄ model directories: bit for bit both ways, for every kind, size and geometry.

What is refused: commands/test_convert_command.py. Memory and sudden death: test_convert_files.py.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from official_files import (
    KINDS,
    LADDER,
    LEAST,
    assert_bit_equal,
    file_of,
    file_of_zeros,
    official_shapes,
    random_model,
    random_state,
    small,
    stages_of,
    stored,
    without_mask_branch,
)

from hmar_jax import InputError, from_pretrained
from hmar_jax.config import DataConfig, ModelConfig, TokenizerConfig, TrainConfig, TransformerConfig
from hmar_jax.formats import official_layouts
from hmar_jax.formats.convert import convert, export_torch
from hmar_jax.formats.model_directory import read_config
from hmar_jax.labels import parse_labels
from hmar_jax.scales import ScaleLadder
from hmar_jax.training.objectives import initial_parts, make_objective
from hmar_jax.training.optimizer import make_optimizer
from hmar_jax.training.state import TrainState

# Norm of the difference over norm of the official logits.
TOLERANCE = {"bfloat16 weights": 1e-2}


def relative(result, truth):
    return np.linalg.norm(np.asarray(result, np.float64) - truth) / np.linalg.norm(truth)


# --- there and back


@pytest.mark.parametrize("kind", KINDS)
def test_an_official_file_comes_back_bit_for_bit(official_states, golden_directory, tmp_path, kind):
    output = tmp_path / "deep" / "back.safetensors"
    assert export_torch(golden_directory(kind), output) == kind
    assert_bit_equal(safetensors.numpy.load_file(output), official_states[kind])
    assert os.listdir(output.parent) == ["back.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_converted_is_bound_to_its_files_licence_official_or_ones_own(golden_directory, kind):
    for licence in read_config(golden_directory(kind))[1]["licences"]:
        bound, _, about_official = licence.partition("; ")
        assert bound.rstrip(".").endswith("keeps the licence of the file it was converted from")
        assert about_official == (
            "official HMAR files are for non-commercial use." if "transformer" in bound and "hmar" in kind else ""
        )


def configured(directory, output, **changes):
    """A copy of a model directory with other fields in its config file."""
    shutil.copytree(directory, output)
    config = output / "config.json"
    before = {name: value for name, value in json.loads(config.read_text()).items() if name != "digest"}
    config.write_text(json.dumps(before | changes))
    return output


def test_the_licences_of_parts_that_are_not_taken_stay_behind(official_states, golden_directory, tmp_path):
    licences = read_config(golden_directory("hmar"))[1]["licences"]
    both = configured(golden_directory("hmar"), tmp_path / "hmar", licences=[*licences, "Not for sale."])
    file = file_of(tmp_path / "var.safetensors", official_states["var"])
    var = convert("var", file, LADDER, tmp_path / "var", tokenizer=both)
    expected = [*read_config(golden_directory("var"))[1]["licences"], "Not for sale."]
    assert read_config(var)[1]["licences"] == expected


def test_a_converted_transformer_brings_its_tokenizer(official_states, golden_directory, tmp_path):
    assert export_torch(golden_directory("hmar"), tmp_path / "vae.safetensors", "vae") == "vae"
    assert_bit_equal(safetensors.numpy.load_file(tmp_path / "vae.safetensors"), official_states["vae"])


@st.composite
def tokenizers(draw):
    multipliers = draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    return TokenizerConfig(
        channels=draw(st.sampled_from([32, 64])),
        multipliers=tuple(multipliers),
        encoder_blocks=draw(st.integers(1, 3)),
        decoder_blocks=draw(st.integers(1, 3)),
        latent_channels=draw(st.integers(1, 5)),
        codebook_size=draw(st.integers(1, 20)),
        downsampling=2 ** draw(st.integers(0, len(multipliers) - 1)),
        phis=draw(st.integers(1, 5)),
    )


@st.composite
def geometries(draw, kind):
    """Configs that the official layout of a kind can hold; transformers with any V and Z beside the least CNN."""
    ladder = ScaleLadder(tuple(sorted(draw(st.sets(st.integers(1, 6), min_size=1, max_size=5)))))
    tokenizer = draw(tokenizers())
    if kind == "vae":
        return small(kind, ladder, tokenizer)
    tokenizer = dataclasses.replace(LEAST, latent_channels=tokenizer.latent_channels, codebook_size=tokenizer.phis)
    depth, heads = draw(st.integers(1, 10)), draw(st.integers(1, 3))
    changes = {
        "depth": depth,
        "branch_depth": {"var": 0, "hmar": draw(st.integers(1, depth))}.get(kind, min(depth, 8)),
        "width": heads * draw(st.integers(1, 4)),
        "heads": heads,
        "num_classes": draw(st.integers(1, 7)),
        "mlp_ratio": draw(st.integers(1, 4)),
        "shared_adaln": draw(st.booleans()),
    }
    names = tuple(f"class {label}" for label in range(changes["num_classes"]))
    return dataclasses.replace(small(kind, ladder, tokenizer, **changes), class_names=names)


def through_official(folder, directory, kind, **parts):
    """Our directory → official file → our directory."""
    file = folder / f"{kind}.safetensors"
    export_torch(directory, file, kind)
    return convert(kind, file, read_config(directory)[0].ladder, folder / kind, **parts)


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=3)
@hypothesis.given(data=st.data())
def test_a_model_of_any_geometry_comes_back_bit_for_bit(kind, data):
    model = random_model(data.draw(geometries(kind)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = model.save(folder / "ours", source="a test")
        parts = {"tokenizer": None if kind == "vae" else ours}
        if kind == "hmar-stage2":  # its file lacks the next-scale branch, which is stage 1's
            stage1 = without_mask_branch(model).save(folder / "ours1", source="a test")
            parts["next_scale"] = through_official(folder, stage1, "hmar-stage1", **parts)
        back = through_official(folder, ours, kind, **parts)
        assert read_config(back)[0] == model.config
        assert_bit_equal(stored(back), stored(ours))


def test_a_thousand_classes_have_the_names_of_imagenet(tmp_path, small_tokenizer):
    of_two = read_config(small_tokenizer)[1]["model"] | {"class_names": ["cat", "dog"]}
    tokenizer = configured(small_tokenizer, tmp_path / "vae", model=of_two)
    file = file_of_zeros(tmp_path / "var.safetensors", official_shapes("var", num_classes=1000))
    names = read_config(convert("var", file, LADDER, tmp_path / "var", tokenizer=tokenizer))[0].class_names
    assert len(set(names)) == 1000
    assert not [name for name in names if "," in name or name != name.strip()]
    labels = parse_labels("tench,golden retriever,88,macaw,7-9,toilet tissue", names, 1000)
    assert [label.number for label in labels] == [0, 207, 88, 88, 7, 8, 9, 999]


# --- stage 2


@pytest.fixture(scope="module")
def stages(tmp_path_factory, small_tokenizer):
    """(the state dict of stage 2, the directory of the stage 1 that it started from, that of both in one HMAR file)"""
    folder = tmp_path_factory.mktemp("stages")
    state = random_state("hmar", depth=9, branch_depth=8)
    stage1, stage2 = stages_of(state, trunk=1)
    files, options = {"hmar": state, "hmar-stage1": stage1}, {"tokenizer": small_tokenizer}
    whole, first = (
        convert(kind, file_of(folder / f"{kind}.safetensors", files[kind]), LADDER, folder / kind, **options)
        for kind in files
    )
    return stage2, first, whole


@pytest.fixture
def convert_stage2(tmp_path, small_tokenizer):
    def run(state, **options):
        file = file_of(tmp_path / "stage2.safetensors", state)
        return convert("hmar-stage2", file, LADDER, tmp_path / "out", tokenizer=small_tokenizer, **options)

    return run


def test_stage_1_and_stage_2_make_the_whole_model(stages, convert_stage2):
    stage2, first, whole = stages
    out = convert_stage2(stage2, next_scale=first)
    assert read_config(out)[0] == read_config(whole)[0]
    assert_bit_equal(stored(out), stored(whole))


def test_stage_2_alone_serves_both_branches(stages, convert_stage2):
    stage2, _, whole = stages
    found, expected = stored(convert_stage2(stage2)), stored(whole)
    masked = {name: array for name, array in expected.items() if name.startswith("transformer.masked.")}
    both = {name.replace(".masked.", ".next_scale."): array for name, array in masked.items()}
    assert len(both) > 10
    assert_bit_equal(found, expected | both)


TRUNK = {
    "pos_start": "pos_start",
    "word_embed_bias": "word_bias",
    "class_emb.weight": "class_embed.embedding",
    "blocks.0.attn.mat_qkv.weight": "trunk.blocks.attention.qkv.kernel",
    "blocks.0.ffn.fc2.bias": "trunk.blocks.fc2.bias",
}


@pytest.mark.parametrize("entry", TRUNK)
def test_a_stage_1_with_another_trunk_is_refused_by_name(stages, convert_stage2, tmp_path, entry):
    stage2, first, _ = stages
    other = stage2[entry].copy()
    other.flat[-1] += 1
    with pytest.raises(InputError, match=rf"^transformer\.{re.escape(TRUNK[entry])} differs between .* give the stage"):
        convert_stage2(stage2 | {entry: other}, next_scale=first)
    assert os.listdir(tmp_path) == ["stage2.safetensors"]


def test_a_rounded_stage_1_is_refused(stages, convert_stage2, tmp_path, small_tokenizer):
    stage2, first, _ = stages
    file = tmp_path / "stage1.safetensors"
    export_torch(first, file)
    rounded = convert("hmar-stage1", file, LADDER, tmp_path / "1", tokenizer=small_tokenizer, dtype="bfloat16")
    with pytest.raises(InputError, match=r"differs between .* converted in float32\.$"):
        convert_stage2(stage2, next_scale=rounded)


@pytest.mark.parametrize(
    "other",
    [{"depth": 10}, {"heads": 4}, {"shared_adaln": True}, "another ladder", "var"],
    ids=str,
)
def test_a_stage_1_of_other_sizes_is_refused(stages, convert_stage2, tmp_path, small_tokenizer, other):
    kind, ladder = ("var" if other == "var" else "hmar-stage1"), LADDER
    shapes = official_shapes(kind, **(other if isinstance(other, dict) else {}))
    if other == "another ladder":  # of as many scales, and of more tokens
        ladder, shapes = ScaleLadder((1, 2, 3, 5)), shapes | {"pos_1LC": (1, 39, 8)}
    file = file_of_zeros(tmp_path / "1.safetensors", shapes)
    wrong = convert(kind, file, ladder, tmp_path / "1", tokenizer=small_tokenizer)
    with pytest.raises(InputError, match=r"is not the stage 1 of .*stage2\.safetensors: .*give the one it started"):
        convert_stage2(stages[0], next_scale=wrong)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_no_stage_1(stages, convert_stage2, small_tokenizer):
    with pytest.raises(InputError, match=r"is a tokenizer alone; --next-scale is a model converted from stage 1\.$"):
        convert_stage2(stages[0], next_scale=small_tokenizer)


# --- the released sizes, from shapes alone

# Millions of parameters and gigabytes, as published.
VAR = {"d16": 310.3, "d20": 600.9, "d24": 1033, "d30": 2010}
HMAR = {"d16": 467.7, "d20": 845.5, "d24": 1384, "d30": 2556}
GIGABYTES = {"d16": 1.87, "d20": 3.38, "d24": 5.54, "d30": 10.2}
PARAMETERS = (
    {(preset, "hmar"): number for preset, number in HMAR.items()}
    | {(preset, kind): number for preset, number in VAR.items() for kind in ("hmar-stage1", "hmar-stage2")}
    | {(f"var-{preset}", "var"): number for preset, number in VAR.items()}
    | {("d36-s", "var"): 2354}
)


def assert_rounds_to(number, published):
    assert round(number, len(str(published).partition(".")[2])) == published


@pytest.mark.parametrize(("preset", "kind"), PARAMETERS)
def test_a_published_size_has_the_official_layout(preset, kind):
    ladder = ScaleLadder.preset(512 if preset == "d36-s" else 256)
    changes = {"masked": False} if kind == "hmar-stage1" else {}
    tokenizer = dataclasses.replace(LEAST, latent_channels=32, codebook_size=4096)
    config = ModelConfig(ladder, tokenizer, TransformerConfig.preset(preset, **changes))
    shapes = {place.name: place.shape for place in official_layouts.places(config, kind)}
    assert official_layouts.infer_transformer(shapes, kind, ladder, "x") == (config.transformer, 4096, 32)
    parameters = sum(map(math.prod, shapes.values()))
    assert_rounds_to(parameters / 1e6, PARAMETERS[preset, kind])
    if kind == "hmar":
        assert_rounds_to(4 * parameters / 1e9, GIGABYTES[preset])


def test_the_published_tokenizer_has_the_official_layout():
    config = ModelConfig(ScaleLadder.preset(256), TokenizerConfig())
    shapes = {place.name: place.shape for place in official_layouts.places(config, "vae")}
    assert official_layouts.infer_tokenizer(shapes, "x") == config.tokenizer
    assert len(shapes) == 324 - 1  # one is a buffer
    assert_rounds_to(sum(map(math.prod, shapes.values())) / 1e6, 108.95)


# --- directories of half the size


@pytest.fixture(scope="module")
def half(official_states, golden_directory, tmp_path_factory):
    """The masked model of the reference outputs in a bfloat16 directory."""
    folder = tmp_path_factory.mktemp("half")
    file = file_of(folder / "stage2.safetensors", official_states["hmar-stage2"])
    return convert("hmar-stage2", file, LADDER, folder / "half", tokenizer=golden_directory("vae"), dtype="bfloat16")


STAYS_FLOAT32 = re.compile(
    r"tokenizer\.quantizer\..*|.*\.(bias|scale|q_bias|v_bias|log_scale)|transformer\.(word_bias|mask_embed)"
)


def test_a_bfloat16_directory_is_half_as_large_and_rounds_matrices_alone(half, golden_directory):
    whole = stored(golden_directory("hmar-stage2"))
    expected = {
        name: array if STAYS_FLOAT32.fullmatch(name) else array.astype(ml_dtypes.bfloat16)
        for name, array in whole.items()
    }
    assert_bit_equal(stored(half), expected)
    sizes = [(path / "model.safetensors").stat().st_size for path in (half, golden_directory("hmar-stage2"))]
    assert sizes[0] < 0.51 * sizes[1]


def test_export_of_a_bfloat16_directory_is_float32(half, official_states, tmp_path):
    export_torch(half, tmp_path / "back.safetensors")
    official_state = official_states["hmar-stage2"]
    rounded = {
        name: array.astype(ml_dtypes.bfloat16).astype(np.float32)
        for name, array in official_state.items()
        if (name.endswith("weight") and name != "mask_embed.weight") or name in ("pos_1LC", "pos_start")
    }
    assert_bit_equal(safetensors.numpy.load_file(tmp_path / "back.safetensors"), official_state | rounded)


def test_a_bfloat16_directory_gives_nearly_the_official_logits(half, golden):
    masked = np.zeros(golden["tokens"].shape, bool)
    masked[:, golden["mask_positions"]] = True
    logits = from_pretrained(half).masked_logits(golden["labels"], golden["tokens"], masked)
    assert logits.dtype == jnp.float32
    assert relative(logits, golden["mp_logits"]) < TOLERANCE["bfloat16 weights"]


def test_training_from_a_bfloat16_directory_is_in_float32(half):
    data = DataConfig("tokens", path="unused")
    config = TrainConfig(stage="masked", init_from=str(half), data=data, sides=LADDER.sides)
    parts = initial_parts(make_objective(config, ()))
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(parts.trained))
    optimizer = make_optimizer(config.optimizer, config.steps, config.batch_size, parts.trained)
    state = TrainState.create(config, parts, optimizer)
    floating = [leaf for leaf in jax.tree.leaves((state.params, state.opt)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floating} == {jnp.dtype(jnp.float32)}
