"""Official state dicts with other names, shapes and dtypes: a conversion gives their model, or an InputError."""

import contextlib
import math
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from official_files import (
    KINDS,
    LADDER,
    file_of,
    file_of_zeros,
    official_shapes,
    peak_memory,
    torch_file_of,
    torch_pickle,
)

from hmar_jax.errors import InputError
from hmar_jax.formats import official_layouts
from hmar_jax.formats.convert import convert, export_torch, open_state_dict

MORE = settings(max_examples=settings().max_examples * 2)  # of some ten milliseconds each
SOME = settings(max_examples=max(settings().max_examples // 5, 5))  # of a second each
SHAPES = {kind: official_shapes(kind) for kind in KINDS}
HUGE = [99999999, 10**9, 2**31, 10**18, 10**30]
NAMES = [
    "encoder.down.0.block.99999999.x", "encoder.down.1000000000.x", "decoder.up.0.block.999999999.conv1.weight",
    "quantize.quant_resi.qresi_ls.1000000000.weight", "quantize.quant_resi.999999999.weight", "blocks.999999999.x",
    "base_blocks.٣.attn.q_bias", "ns_blocks.-1.x", "mask_blocks.01.x", "encoder.down.00.block.0.conv1.bias", "", ".",
    "a\n\x1b[2Jb", "x" * 1000, "module", "pos_1LC.", "lvl_1L", "blocks.0.attn.zero_k_bias", "a.pos_1LC", "\u202e",
    "ema.quantize.embedding.weight",
]  # fmt: skip


@st.composite
def mutated(draw, shapes):
    """Names and shapes with one to three faults, or none that matters."""
    shapes = dict(shapes)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(shapes)))
        match draw(st.sampled_from(["remove", "rename", "add", "axis", "rank", "number", "nest", "copy"])):
            case "remove" if len(shapes) > 1:
                del shapes[name]
            case "rename":
                shapes[draw(st.sampled_from(NAMES))] = shapes.pop(name)
            case "add":
                shapes[draw(st.sampled_from(NAMES))] = draw(st.sampled_from([(), (1,), (0,), (2, 3)]))
            case "axis" if shapes[name]:
                axes = list(shapes[name])
                axes[draw(st.integers(0, len(axes) - 1))] = draw(st.sampled_from([0, 1, 2, 3, 7, 64, 300]))
                shapes[name] = tuple(axes)
            case "rank":
                shapes[name] = draw(st.sampled_from([(), (0,), (*shapes[name], 1), shapes[name][1:], (1,) * 30]))
            case "number":
                parts = [str(draw(st.sampled_from([0, 1, 9, *HUGE]))) if p.isdigit() else p for p in name.split(".")]
                shapes[".".join(parts)] = shapes.pop(name)
            case "nest":
                prefix = draw(st.sampled_from(["model.", "a.b.", "module.", "_orig_mod.", "\n."]))
                shapes = {prefix + name: shape for name, shape in shapes.items()}
            case "copy":
                shapes |= {f"ema.{name}": shape for name, shape in shapes.items()}
    return shapes


@contextlib.contextmanager
def refusing():
    try:
        yield
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 600


def inferred(kind, source):
    """Looks at a file as `convert` does before it builds anything."""
    state = open_state_dict(source, kind)
    official_layouts.check_kind(kind, state.shapes.keys(), state.where)
    if kind == "vae":
        return official_layouts.infer_tokenizer(state.shapes, state.where)
    return official_layouts.infer_transformer(state.shapes, kind, LADDER, state.where)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("official")


@MORE
@given(st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), mutated(SHAPES[kind]))))
def test_sizes_are_inferred_or_refused(folder, case):
    kind, shapes = case
    with refusing():
        inferred(kind, file_of_zeros(folder / "f.safetensors", shapes))


@SOME
@given(
    st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), mutated(SHAPES[kind]))),
    st.sampled_from(["float32", "bfloat16"]),
)
@example(("vae", SHAPES["vae"]), "float32")
@example(("vae", SHAPES["vae"] | {"encoder.down.0.block.99999999.x": (1,)}), "float32")
@example(("vae", SHAPES["vae"] | {"quantize.quant_resi.qresi_ls.1000000000.weight": (1,)}), "float32")
@example(("var", SHAPES["var"] | {"blocks.999999999.x": (1,)}), "float32")
@example(("hmar", SHAPES["hmar"] | {"base_blocks.999999999.x": (1,)}), "float32")
def test_a_conversion_gives_the_file_s_model_or_is_refused(folder, small_tokenizer, tmp_path_factory, case, dtype):
    kind, shapes = case
    assume(all(math.prod(shape) < 2**22 for shape in shapes.values()))  # which are really written
    out = tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    write, ending = (file_of, "safetensors") if dtype == "float32" else (torch_file_of, "pth")
    source = write(
        folder / f"g.{ending}",
        {n: x.astype(ml_dtypes.bfloat16) for n, x in state.items()} if ending == "pth" else state,
    )
    tokenizer = None if kind == "vae" else small_tokenizer
    with refusing():
        convert(kind, source, LADDER, out / "model", tokenizer=tokenizer)
        export_torch(out / "model", out / "back.safetensors", kind)
        back = safetensors.numpy.load_file(out / "back.safetensors")
        given_state = open_state_dict(source, kind)
        assert back.keys() == given_state.shapes.keys()
        for name, array in back.items():
            np.testing.assert_array_equal(array, given_state.get(name), strict=True)


# --- what would take hours or all memory, were it built


def many(pattern, count, shape=(1,)):
    return {pattern.replace("#", str(number)): shape for number in range(count)}


LARGE = {
    "levels": ("vae", many("encoder.down.#.block.0.conv2.weight", 20_000, (1, 1, 1, 1))),
    "blocks": ("vae", many("encoder.down.0.block.#.x", 20_000)),
    "phis": ("vae", many("quantize.quant_resi.qresi_ls.#.weight", 20_000)),
    "layers": ("var", many("blocks.#.x", 20_000)),
    "state dicts": ("vae", many("#.quantize.embedding.weight", 20_000)),
    "state dicts of another kind": ("var", many("#.quantize.embedding.weight", 20_000)),
    "nested state dicts": ("vae", {f"{'a.' * 400}{'b.' * n}quantize.embedding.weight": (1,) for n in range(200)}),
    "channels": ("vae", {"encoder.conv_in.weight": (2**25, 1, 1, 1)}),
    "classes": ("var", {"class_emb.weight": (2**25, 1)}),
    "hidden": ("var", {"blocks.0.ffn.fc1.weight": (2**25, 1)}),
    "axes of nothing": ("vae", {"quantize.embedding.weight": (2**50, 0)}),
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_sizes_in_a_file_are_not_believed(folder, case, monkeypatch):
    kind, change = LARGE[case]
    monkeypatch.setattr(official_layouts, "places", lambda *_: pytest.fail("it is built"))
    source = file_of_zeros(folder / "h.safetensors", change if "state dicts" in case else SHAPES[kind] | change)
    with pytest.raises(InputError) as error:
        inferred(kind, source)
    assert len(str(error.value)) < 600
    source.unlink()


def with_pickle(path, content):
    """A PyTorch file of one storage, of four bytes, and any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("any/data.pkl", content)
        archive.writestr("any/data/0", np.ones(1, np.float32).tobytes())
    return path


def repeated(shapes):
    """The pickle of tensors that are all one number, repeated by strides of 0."""
    one = torch_pickle({"x": np.ones(1, np.float32)})
    head, entry, end = one[:4], one[4:-2], one[-2:]
    pieces = []
    for name, shape in shapes.items():
        key = b"X" + len(name).to_bytes(4, "little") + name.encode()
        plain = entry.replace(b"X\1\0\0\0x", key, 1)
        start, rest = plain[: plain.index(b"QK\0") + 3], plain[plain.index(b"\x89ccollections") :]
        numbers = [
            b"(" + b"".join(b"\x8a\x08" + n.to_bytes(8, "little") for n in part) + b"t"
            for part in (shape, [0] * len(shape))
        ]
        pieces.append(start + numbers[0] + numbers[1] + rest)
    return head + b"".join(pieces) + end


def test_the_numbers_of_repeated_tensors_are_not_believed(folder):
    shapes = SHAPES["vae"] | {"quantize.embedding.weight": (2**40, 4)}
    path = with_pickle(folder / "i.pth", repeated(shapes))

    def refused():
        with pytest.raises(InputError, match="which they share"):
            open_state_dict(path, "vae")

    assert peak_memory(refused) < 2**22
    small = {name: shape for name, shape in SHAPES["vae"].items() if name.startswith("quant")}
    assert open_state_dict(with_pickle(path, repeated(small)), "vae").get("quantize.embedding.weight").all()
