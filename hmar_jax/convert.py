"""official PyTorch state dicts → our parameters, entry by entry.

Every official entry has one place here: a path among our parameters (dots between names), a layer index where blocks
are stacked, and a change of layout. Nothing is computed; a round trip is bit-equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hmar_jax.config import TransformerConfig
from hmar_jax.errors import InputError


class Place(NamedTuple):
    """Where an official entry goes: our path, the layer among stacked blocks if any, and the change of layout."""

    path: str
    layer: int | None
    layout: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1)


def _squeeze(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[-2:])


def _linear(x: np.ndarray) -> np.ndarray:
    return x.T


def _conv(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0)


_BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|.*\.attn\.zero_k_bias|quantize\.ema_vocab_hit_SV")

_TOKENIZER_NAMES = [
    (r"\.(down|up)\.", ".levels."),
    (r"\.block\.", ".blocks."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.conv\.", ".resample."),
    (r"\.mid\.block_", ".middle.block"),
    (r"\.mid\.attn_1", ".middle.attention"),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".proj."),
    (r"^quantize\.quant_resi\.qresi_ls\.", "quantizer.phis."),
]


def tokenizer_place(name: str) -> Place | None:
    """Where an entry of a `vae_*.pth` goes; None for a buffer to ignore."""
    if _BUFFERS.fullmatch(name):
        return None
    if name == "quantize.embedding.weight":
        return Place("quantizer.codebook", None, _same)
    for pattern, ours in _TOKENIZER_NAMES:
        name = re.sub(pattern, ours, name)
    stem, kind = name.rsplit(".", 1)
    if kind == "weight":
        norm = re.search(r"norm\w*$", stem) is not None
        return Place(f"{stem}.scale" if norm else f"{stem}.kernel", None, _same if norm else _conv)
    return Place(name, None, _same)


_TRANSFORMER_NAMES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "pos_start": ("pos_start", _squeeze),
    "pos_1LC": ("pos", _squeeze),
    "word_embed.weight": ("word.kernel", _linear),
    "word_embed.bias": ("word_bias", _same),
    "word_embed_bias": ("word_bias", _flat),
    "mask_embed.weight": ("mask_embed", _flat),
    "class_emb.weight": ("class_embed.embedding", _same),
    "lvl_embed.weight": ("level", _same),
    "shared_ada_lin.1.weight": ("adaln.kernel", _linear),
    "shared_ada_lin.1.bias": ("adaln.bias", _same),
}
_BLOCK_NAMES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "attn.scale_mul_1H11": ("attention.log_scale", _flat),
    "attn.q_bias": ("attention.q_bias", _same),
    "attn.v_bias": ("attention.v_bias", _same),
    "attn.mat_qkv.weight": ("attention.qkv.kernel", _linear),
    "attn.proj.weight": ("attention.proj.kernel", _linear),
    "attn.proj.bias": ("attention.proj.bias", _same),
    "ffn.fc1.weight": ("fc1.kernel", _linear),
    "ffn.fc1.bias": ("fc1.bias", _same),
    "ffn.fc2.weight": ("fc2.kernel", _linear),
    "ffn.fc2.bias": ("fc2.bias", _same),
    "ada_lin.1.weight": ("adaln.kernel", _linear),
    "ada_lin.1.bias": ("adaln.bias", _same),
    "ada_gss": ("adaln_offset", _squeeze),
}
_HEAD_NAMES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "head_nm.ada_lin.1.weight": ("head.adaln.kernel", _linear),
    "head_nm.ada_lin.1.bias": ("head.adaln.bias", _same),
    "head.weight": ("head.linear.kernel", _linear),
    "head.bias": ("head.linear.bias", _same),
}
_BRANCHES = {"": "next_scale", "ns_": "next_scale", "mask_": "masked"}


def transformer_place(name: str, config: TransformerConfig) -> Place | None:
    """Where an entry of a VAR, stage-1, stage-2 or released HMAR state dict goes; None for a buffer to ignore.

    A stage-2 state dict has one set of `blocks.i` and one head, which become the next-scale branch.
    """
    if _BUFFERS.fullmatch(name):
        return None
    if name in _TRANSFORMER_NAMES:
        path, layout = _TRANSFORMER_NAMES[name]
        return Place(path, None, layout)
    if match := re.fullmatch(r"(base_|ns_|mask_|)blocks\.(\d+)\.(.+)", name):
        group, index, inner = match[1], int(match[2]), match[3]
        if inner in _BLOCK_NAMES:
            path, layout = _BLOCK_NAMES[inner]
            if group == "base_" or (group == "" and index < config.trunk_depth):
                return Place(f"trunk.blocks.{path}", index, layout)
            if group == "":
                index -= config.trunk_depth
            return Place(f"{_BRANCHES[group]}.stack.blocks.{path}", index, layout)
    if (match := re.fullmatch(r"(ns_|mask_|)(head.+)", name)) and match[2] in _HEAD_NAMES:
        path, layout = _HEAD_NAMES[match[2]]
        return Place(f"{_BRANCHES[match[1]]}.{path}", None, layout)
    raise InputError(f"State dict entry {name!r} belongs to no known layout; is it a VAR or HMAR transformer?")


def place_entries(state: Mapping[str, np.ndarray], place: Callable[[str], Place | None]) -> dict[str, np.ndarray]:
    """Our flat parameters from an official state dict; stacked layers are filled one by one."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        if (to := place(name)) is None:
            continue
        value = to.layout(value)
        if to.layer is None:
            flat[to.path] = value
        else:
            flat.setdefault(to.path, {})[to.layer] = value
    return {
        path: np.stack([value[i] for i in range(len(value))]) if isinstance(value, dict) else value
        for path, value in flat.items()
    }


def tokenizer_from_official(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All parameters of a tokenizer, flat."""
    return place_entries(state, tokenizer_place)


def transformer_from_official(state: Mapping[str, np.ndarray], config: TransformerConfig) -> dict[str, np.ndarray]:
    """All parameters of a transformer, flat."""
    return place_entries(state, lambda name: transformer_place(name, config))
