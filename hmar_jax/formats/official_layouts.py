"""official PyTorch state dicts ⇄ our parameters, by name and shape: one list of places, read in both directions.

Nothing is computed, so that a round trip is bit-equal; `convert.py` moves the arrays. Every parameter of ours has one
official array (a layer of a stack: one each), whose name follows from ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Literal, NamedTuple

import numpy as np

from hmar_jax.config import Kind, ModelConfig, TokenizerConfig, TransformerConfig
from hmar_jax.errors import InputError, saying, shown
from hmar_jax.networks import shapes_of
from hmar_jax.scales import ScaleLadder

Shapes = Mapping[str, tuple[int, ...]]

# Derived tensors that PyTorch saves beside the parameters.
_BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|.*\.attn\.zero_k_bias|quantize\.ema_vocab_hit_SV")
# What DDP, FSDP, activation checkpointing, torch.compile and Lightning put into a name where they wrap a module.
_WRAPPERS = {"module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "_forward_module"}
# The official code fixes the groups of every GroupNorm and the blocks that stage 2 trains; no shape tells them.
NORM_GROUPS, BRANCH_DEPTH = 32, 8
# What a file may make us build before its entries are compared with it: a network of this many blocks takes seconds.
# The released tokenizer has 25 blocks and 4 phi convolutions, and 4096 is the longest axis that a size is taken from.
_MOST_BLOCKS, _MOST_PHIS, _LONGEST_AXIS = 200, 100, 2**24


class Layout(NamedTuple):
    """How an official array lies: ours with its axes in the order `axes`, then axes of length 1 put in at `ones`."""

    axes: tuple[int, ...] | None = None
    ones: tuple[int, ...] = ()

    def official(self, ours: np.ndarray) -> np.ndarray:
        """Our array as the official one."""
        return np.expand_dims(ours if self.axes is None else ours.transpose(self.axes), self.ones)

    def ours(self, official: np.ndarray) -> np.ndarray:
        """The inverse of `official`."""
        squeezed = np.squeeze(official, self.ones)
        return squeezed if self.axes is None else squeezed.transpose(np.argsort(self.axes))


_SAME, _LINEAR, _CONV = Layout(), Layout((1, 0)), Layout((3, 2, 0, 1))


class Place(NamedTuple):
    """One official array and where it is among our parameters.

    Attributes:
      name, shape: of the official array.
      path: ours, with dots. layer: its index along the leading axis of a stack; None where nothing is stacked.
      layout: how the two lie to each other.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    layout: Layout


def places(config: ModelConfig, kind: Kind) -> list[Place]:
    """The places of all official arrays of one kind, sorted by our path and layer.

    A `vae` has the tokenizer's, the other kinds the transformer's. `hmar-stage2` has one set of blocks and one head,
    which are the mask branch's: the next-scale branch has no place in it.
    """
    network, shapes = "tokenizer" if kind == "vae" else "transformer", shapes_of(config)
    phi_layout = config.phi_layout or ("qresi" if config.tokenizer.phis == 1 else "qresi_ls")
    found = []
    for path in sorted(name for name in shapes if name.startswith(f"{network}.")):
        inner, shape = path.removeprefix(f"{network}."), shapes[path]
        if network == "tokenizer":
            found.append(_place(*_tokenizer_name(inner, phi_layout), shape, path, None))
        elif kind == "hmar-stage2" and inner.startswith("next_scale."):
            continue
        elif match := _STACKED.fullmatch(inner):
            prefix, first = _block_names(kind, match[1], config.transformer)
            name, layout = _BLOCK[match[2]]
            found += [_place(f"{prefix}.{first + i}.{name}", layout, shape[1:], path, i) for i in range(shape[0])]
        else:
            found.append(_place(*_transformer_name(kind, inner), shape, path, None))
    return found


def _place(name: str, layout: Layout, shape: tuple[int, ...], path: str, layer: int | None) -> Place:
    official = layout.official(np.broadcast_to(np.int8(0), shape)).shape
    return Place(name, official, path, layer, layout)


_TOKENIZER = [
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),
    (r"\.middle\.block", ".mid.block_"),
    (r"\.middle\.attention\.", ".mid.attn_1."),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"(?<=down)(\.\d+)\.resample\.", r"\1.downsample.conv."),
    (r"(?<=up)(\.\d+)\.resample\.", r"\1.upsample.conv."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.proj\.", ".proj_out."),
]
# How the phi convolutions are called: one that all scales share, several, and one for each scale.
_PHIS = {
    "qresi": "quantize.quant_resi.qresi.",
    "qresi_ls": "quantize.quant_resi.qresi_ls.#.",
    "each": "quantize.quant_resi.#.",
}


def _tokenizer_name(path: str, phi_layout: str) -> tuple[str, Layout]:
    """Our path within the tokenizer → the official name, and the layout."""
    if path == "quantizer.codebook":
        return "quantize.embedding.weight", _SAME
    if match := re.match(r"quantizer\.phis\.(\d+)\.", path):
        path = _PHIS[phi_layout].replace("#", match[1]) + path.removeprefix(match[0])
    for ours, theirs in _TOKENIZER:
        path = re.sub(ours, theirs, path)
    stem, leaf = path.rsplit(".", 1)
    match leaf:
        case "kernel":
            return f"{stem}.weight", _CONV
        case "scale":
            return f"{stem}.weight", _SAME
    return path, _SAME


_TRANSFORMER = {
    "pos_start": ("pos_start", Layout(ones=(0,))),
    "pos": ("pos_1LC", Layout(ones=(0,))),
    "word.kernel": ("word_embed.weight", _LINEAR),
    "word_bias": ("word_embed_bias", _SAME),
    "mask_embed": ("mask_embed.weight", Layout(ones=(0,))),
    "class_embed.embedding": ("class_emb.weight", _SAME),
    "level": ("lvl_embed.weight", _SAME),
    "adaln.kernel": ("shared_ada_lin.1.weight", _LINEAR),
    "adaln.bias": ("shared_ada_lin.1.bias", _SAME),
}
_HEAD = {
    "adaln.kernel": ("head_nm.ada_lin.1.weight", _LINEAR),
    "adaln.bias": ("head_nm.ada_lin.1.bias", _SAME),
    "linear.kernel": ("head.weight", _LINEAR),
    "linear.bias": ("head.bias", _SAME),
}
_STACKED = re.compile(r"(trunk|next_scale\.stack|masked\.stack)\.blocks\.(.+)")
_BLOCK = {
    "attention.log_scale": ("attn.scale_mul_1H11", Layout(ones=(0, 2, 3))),
    "attention.q_bias": ("attn.q_bias", _SAME),
    "attention.v_bias": ("attn.v_bias", _SAME),
    "attention.qkv.kernel": ("attn.mat_qkv.weight", _LINEAR),
    "attention.proj.kernel": ("attn.proj.weight", _LINEAR),
    "attention.proj.bias": ("attn.proj.bias", _SAME),
    "fc1.kernel": ("ffn.fc1.weight", _LINEAR),
    "fc1.bias": ("ffn.fc1.bias", _SAME),
    "fc2.kernel": ("ffn.fc2.weight", _LINEAR),
    "fc2.bias": ("ffn.fc2.bias", _SAME),
    "adaln.kernel": ("ada_lin.1.weight", _LINEAR),
    "adaln.bias": ("ada_lin.1.bias", _SAME),
    "adaln_offset": ("ada_gss", Layout(ones=(0, 1))),
}


def _transformer_name(kind: Kind, path: str) -> tuple[str, Layout]:
    """Our path within the transformer, of what is not stacked → the official name, and the layout."""
    if path == "word_bias" and kind in ("var", "hmar-stage1"):
        return "word_embed.bias", _SAME
    if match := re.fullmatch(r"(next_scale|masked)\.head\.(.+)", path):
        name, layout = _HEAD[match[2]]
        prefix = {"next_scale": "ns_", "masked": "mask_"}[match[1]] if kind == "hmar" else ""
        return prefix + name, layout
    return _TRANSFORMER[path]


def _block_names(kind: Kind, stack: str, transformer: TransformerConfig | None) -> tuple[str, int]:
    """What the blocks of a stack are called, and the number of the first."""
    assert transformer is not None
    if kind == "hmar":
        return {"trunk": "base_blocks", "next_scale.stack": "ns_blocks", "masked.stack": "mask_blocks"}[stack], 0
    return "blocks", 0 if stack == "trunk" else transformer.trunk_depth


def unwrapped(name: str) -> str:
    """An entry's name without what wrappers of its modules put in: `module.blocks.0._orig_mod.x` → `blocks.0.x`."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def without_buffers(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The entries that are parameters."""
    return {name: shape for name, shape in shapes.items() if not _BUFFERS.fullmatch(name)}


# An entry that every tokenizer has and no transformer, and the other way round.
TOKENIZER_MARK, TRANSFORMER_MARK = "quantize.embedding.weight", "pos_1LC"


def check_kind(kind: Kind, names: Set[str], where: str) -> None:
    """Raises InputError where the names are plainly of another kind, and says which."""
    is_stage2 = "mask_embed.weight" in names or "word_embed_bias" in names
    if any(name.startswith(("base_blocks.", "ns_blocks.", "mask_blocks.")) for name in names):
        fits: tuple[str, ...] = ("hmar",)
    elif any(name.startswith(("encoder.", "decoder.")) for name in names):
        fits = ("vae",)
    elif any(name.startswith("blocks.") for name in names):
        fits = ("hmar-stage2",) if is_stage2 else ("var", "hmar-stage1")
    else:
        return
    if kind not in fits:
        raise InputError(f"{where} is laid out as {' or '.join(fits)}, not as {kind}; give it the right --kind.")


class _Dimensions:
    """The dimensions of entries by name, with a sentence for what is missing or of another rank."""

    def __init__(self, shapes: Shapes, where: str):
        self.shapes, self.where = shapes, where

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self.shapes:
            raise InputError(f"{self.where} lacks {name}; it is not a whole state dict of this kind.")
        if len(shape := self.shapes[name]) != rank or 0 in shape or max(shape) > _LONGEST_AXIS:
            raise InputError(
                f"{self.where} has {name} of shape {shown(shape)}; expected {rank} axes of length 1 to "
                f"{_LONGEST_AXIS}; give a state dict of this kind."
            )
        return shape

    def count(self, pattern: str, least: int = 1) -> int:
        """How many numbers names have for `#`: 0, 1, …; InputError if one of these is missing, or there are too few."""
        start = re.compile(re.escape(pattern).replace(r"\#", r"([0-9]{1,9})"))
        numbers = {int(match[1]) for name in self.shapes if (match := start.match(name))}
        missing = sorted(set(range(max(len(numbers), least))) - numbers)
        if missing:
            entry = pattern.replace("#", str(missing[0]))
            raise InputError(f"{self.where} lacks {entry}*; it is not a whole state dict of this kind.")
        return len(numbers)


def infer_tokenizer(shapes: Shapes, where: str) -> TokenizerConfig:
    """The config of a `vae` from its shapes; `where` names the file in errors."""
    dims = _Dimensions(shapes, where)
    codebook_size, latent_channels = dims("quantize.embedding.weight", 2)
    channels = dims("encoder.conv_in.weight", 4)[0]
    levels = dims.count("encoder.down.#.")
    widths = [dims(f"encoder.down.{level}.block.0.conv2.weight", 4)[0] for level in range(levels)]
    blocks = [dims.count(f"{side}.0.block.#.") for side in ("encoder.down", "decoder.up")]
    layout = _phi_layout(shapes)
    phis = 1 if layout == "qresi" else dims.count(_PHIS[layout])
    if levels * sum(blocks) > _MOST_BLOCKS or phis > _MOST_PHIS:
        raise InputError(
            f"{where} has {levels} levels of {' and '.join(map(str, blocks))} blocks, and {phis} phi convolutions; "
            f"expected {_MOST_BLOCKS} blocks and {_MOST_PHIS} phi convolutions at most; give a vae's state dict."
        )
    with saying(f"The sizes in {where} do not go together"):
        return TokenizerConfig(
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            encoder_blocks=blocks[0],
            decoder_blocks=blocks[1],
            norm_groups=NORM_GROUPS,
            latent_channels=latent_channels,
            codebook_size=codebook_size,
            downsampling=2 ** dims.count("encoder.down.#.downsample.", least=0),
            phis=phis,
        )


def infer_phi_layout(shapes: Shapes) -> Literal["", "qresi_ls", "each"]:
    """The `ModelConfig.phi_layout` of a `vae`."""
    layout = _phi_layout(shapes)
    if layout == "each":
        return "each"
    alone = not any(name.startswith(_PHIS["qresi_ls"].replace("#", "1")) for name in shapes)
    return "qresi_ls" if layout == "qresi_ls" and alone else ""


def _phi_layout(shapes: Shapes) -> str:
    if any(name.startswith(_PHIS["qresi"]) for name in shapes):
        return "qresi"
    return "each" if any(re.match(r"quantize\.quant_resi\.\d", name) for name in shapes) else "qresi_ls"


class Inferred(NamedTuple):
    """What the shapes of a transformer tell, the ladder checked against them; V and Z are to fit its tokenizer."""

    config: TransformerConfig
    codebook_size: int
    latent_channels: int


def infer_transformer(shapes: Shapes, kind: Kind, ladder: ScaleLadder, where: str) -> Inferred:
    """The config of a transformer from its shapes; `where` names the file in errors.

    Raises:
      InputError: `ladder` has other scales or tokens than the file, or an entry that tells a size is missing.
    """
    dims = _Dimensions(shapes, where)
    first, width = dims("pos_start", 3)[1:]
    length, scales = dims("pos_1LC", 3)[1], dims("lvl_embed.weight", 2)[0]
    if (ladder.num_scales, ladder.length, ladder.lengths[0]) != (scales, length, first):
        raise InputError(
            f"--sides={','.join(map(str, ladder.sides))} has {ladder.num_scales} scales and {ladder.length} tokens, "
            f"{ladder.lengths[0]} of them in the first; {where} was built for {scales} scales and {length} tokens, "
            f"{first} in the first."
        )
    if kind == "hmar":
        blocks, head, branch_depth = "ns_blocks", "ns_head", dims.count("ns_blocks.#.")
        depth = dims.count("base_blocks.#.", least=0) + branch_depth
    else:
        blocks, head, depth = "blocks", "head", dims.count("blocks.#.")
        branch_depth = 0 if kind == "var" else min(BRANCH_DEPTH, depth)
    heads, classes = dims(f"{blocks}.0.attn.scale_mul_1H11", 4)[1], dims("class_emb.weight", 2)[0] - 1
    hidden = dims(f"{blocks}.0.ffn.fc1.weight", 2)[0]
    with saying(f"The sizes in {where} do not go together"):
        config = TransformerConfig(
            depth=depth,
            width=width,
            heads=heads,
            num_classes=classes,
            mlp_ratio=hidden // width,
            branch_depth=branch_depth,
            masked=kind in ("hmar", "hmar-stage2"),
            pattern="block_causal" if kind == "var" else "block_diagonal",
            shared_adaln="shared_ada_lin.1.weight" in shapes,
            **TransformerConfig.published_training(depth),
        )
    return Inferred(config, dims(f"{head}.weight", 2)[0], dims("word_embed.weight", 2)[1])


def kind_of(config: ModelConfig) -> Kind:
    """The kind of official file that holds the transformer of a model, or its tokenizer where it has no transformer."""
    if config.transformer is None:
        return "vae"
    if config.transformer.is_var:
        return "var"
    return "hmar" if config.transformer.masked else "hmar-stage1"
