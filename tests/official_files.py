"""Small official files of every kind, of random bits or of nothing, and what is asked of all sentences about them."""

import dataclasses
import hashlib
import json
import math
import pickle
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from hmar_jax import params as trees
from hmar_jax.config import ModelConfig, TokenizerConfig, TransformerConfig
from hmar_jax.errors import HmarError
from hmar_jax.formats import official_layouts, pytorch_files
from hmar_jax.model import Model
from hmar_jax.networks import shapes_of
from hmar_jax.scales import ScaleLadder

KINDS = ("vae", "var", "hmar", "hmar-stage1", "hmar-stage2")
LADDER = ScaleLadder((1, 2, 3, 4))
TOKENIZER = TokenizerConfig(
    channels=32, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1, latent_channels=4, codebook_size=16,
    downsampling=2, phis=2,
)  # fmt: skip
LEAST = dataclasses.replace(TOKENIZER, multipliers=(1,), downsampling=1, phis=1)
# Of each official kind, as small as its layout allows: stages 1 and 2 have branches of 8 blocks, or of all.
TRANSFORMERS = {
    "var": {"depth": 3, "branch_depth": 0, "pattern": "block_causal", "shared_adaln": True},
    "hmar": {"depth": 3, "branch_depth": 2, "masked": True},
    "hmar-stage1": {"depth": 9, "branch_depth": 8},
    "hmar-stage2": {"depth": 9, "branch_depth": 8, "masked": True},
}


def small(kind, ladder=LADDER, tokenizer=TOKENIZER, **changes):
    """The config of a small model of a kind."""
    if kind == "vae":
        return ModelConfig(ladder, tokenizer)
    fields = {"width": 8, "heads": 2, "num_classes": 5} | TRANSFORMERS[kind] | changes
    training = TransformerConfig.published_training(fields["depth"])
    return ModelConfig(ladder, tokenizer, TransformerConfig(**fields, **training))


def official_shapes(kind, **changes):
    return {place.name: place.shape for place in official_layouts.places(small(kind, **changes), kind)}


def any_bits(rng, shape):
    """float32 of all kinds that are finite: small and large, denormal, minus zero."""
    return (rng.integers(0, 2**32, shape, np.uint32) & np.uint32(0xBFFFFFFF)).view(np.float32)


def random_state(kind, seed=0, **changes):
    rng = np.random.default_rng(seed)
    return {name: any_bits(rng, shape) for name, shape in sorted(official_shapes(kind, **changes).items())}


def random_model(config, seed=0):
    rng = np.random.default_rng(seed)
    flat = {name: any_bits(rng, shape) for name, shape in sorted(shapes_of(config).items())}
    return Model(config, trees.unflatten(flat))


def file_of(path, state):
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
    return path


# Of an element, where it is not 4.
_ITEM_BYTES = {"I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "C64": 8, "F64": 8}


def file_of_zeros(path, shapes):
    """A .safetensors file of any size that takes no time and no room on the disk.

    Shapes may be pairs of dtype and shape; float32 is the default.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        dtype, shape = shape if shape and isinstance(shape[0], str) else ("F32", shape)
        offsets = [end, end := end + _ITEM_BYTES.get(dtype, 4) * math.prod(shape)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


_STORAGES = {
    "float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16", "int8": "Char", "uint8": "Byte",
    "int32": "Int", "int64": "Long", "bool": "Bool", "complex64": "ComplexFloat",
}  # fmt: skip


def torch_pickle(state):
    """The pickle of a state dict as PyTorch writes it: storage N holds the N-th array, contiguous."""
    parts = pytorch_files._state_dict({name: array.shape for name, array in state.items()}).split(b"FloatStorage")
    storages = [_STORAGES[array.dtype.name].encode() + b"Storage" for array in state.values()]
    return b"".join(part + storage for part, storage in zip(parts, [*storages, b""], strict=True))


def torch_file_of(path, state, compression=zipfile.ZIP_STORED):
    """A PyTorch file of arrays of any floats."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("any/data.pkl", torch_pickle(state))
        for number, array in enumerate(state.values()):
            archive.writestr(f"any/data/{number}", array.tobytes())
        archive.writestr("any/version", "3")
    return path


def old_torch_file_of(path, state):
    """A file as PyTorch wrote it before 1.6."""
    keys = [str(number) for number in range(len(state))]
    before = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    storages = [array.size.to_bytes(8, "little") + array.tobytes() for array in state.values()]
    path.write_bytes(b"".join([*before, torch_pickle(state), pickle.dumps(keys, 2), *storages]))
    return path


def packed_anew(source, path, method=zipfile.ZIP_DEFLATED, change=lambda name, data: data):
    """The records of a zip archive packed anew."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(path, "w", method) as after:
        for name in before.namelist():
            after.writestr(name, change(name, before.read(name)))
    return path


def peak_memory(work):
    """The most that Python and NumPy held during `work`, in bytes."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def stored(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def rewrite(saved, change_weights=None, change_config=None):
    """Changes a model directory as somebody would by hand, checksum kept right and the digest deleted."""
    config, weights = saved / "config.json", saved / "model.safetensors"
    meta = json.loads(config.read_text())
    if change_weights:
        flat = safetensors.numpy.load_file(weights)
        change_weights(flat)
        safetensors.numpy.save_file(flat, weights)
        meta["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    if change_config:
        change_config(meta)
    meta.pop("digest", None)
    config.write_text(json.dumps(meta))


def assert_bit_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def assert_one_sentence(text):
    assert re.fullmatch(r"[^\n\x1b]*[^.\s]\.", text), text
    assert ". " not in text, text
    return text


def without_mask_branch(model):
    config = dataclasses.replace(model.config, transformer=dataclasses.replace(model.config.transformer, masked=False))
    transformer = {name: tree for name, tree in model.params["transformer"].items() if "mask" not in name}
    return Model(config, model.params | {"transformer": transformer})


def stages_of(state, trunk):
    """A whole HMAR state dict as its stage-1 and its stage-2 one."""

    def of(branch, name):
        name = re.sub(rf"^{branch}_(head|head_nm)\.", r"\1.", name)
        name = re.sub(rf"^{branch}_blocks\.(\d+)", lambda match: f"blocks.{trunk + int(match[1])}", name)
        return name.replace("base_blocks.", "blocks.")

    stage1 = {of("ns", name): array for name, array in state.items() if not name.startswith("mask")}
    stage1["word_embed.bias"] = stage1.pop("word_embed_bias")
    return stage1, {of("mask", name): array for name, array in state.items() if not name.startswith("ns_")}


def refusal(folder, work):
    """The sentence of work that is to be refused and to leave nothing in the folder, which it doesn't name."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(HmarError) as error:
        work()
    assert sorted(folder.rglob("*")) == before
    return assert_one_sentence(str(error.value).replace(f"{folder}/", ""))


def listing(folder):
    """All that lies in a folder, by its path there, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
