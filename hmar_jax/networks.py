"""config ⇄ networks: tokenizer and transformer as one module, its parameters as nested dicts of arrays."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from hmar_jax import params as trees
from hmar_jax.config import ModelConfig
from hmar_jax.tokenizer.layers import ThinConv
from hmar_jax.tokenizer.tokenizer import Tokenizer
from hmar_jax.transformer.blocks import Remat
from hmar_jax.transformer.hmar import HMAR
from pallas_kernels.devices import device

_OHWI = "ohwi"


class Networks(nnx.Module):
    """The tokenizer and, unless the config has none, the transformer: one tree of parameters."""

    def __init__(
        self, config: ModelConfig, *, dtype: DTypeLike, remat: Remat = "dots", scan: bool = True, rngs: nnx.Rngs
    ):
        self.tokenizer = Tokenizer(config.tokenizer, config.ladder, dtype=dtype, rngs=rngs)
        if config.transformer is not None:
            self.transformer = HMAR(
                config.transformer,
                config.ladder,
                codebook_size=config.tokenizer.codebook_size,
                latent_channels=config.tokenizer.latent_channels,
                dtype=dtype,
                remat=remat,
                scan=scan,
                rngs=rngs,
            )


@functools.cache
def structure(
    config: ModelConfig, dtype: str = "float32", remat: Remat = "dots", scan: bool = True
) -> tuple[nnx.GraphDef, nnx.State]:
    """The networks without values: graph definition, and parameters as shapes."""

    def create() -> Networks:
        return Networks(config, dtype=jnp.dtype(dtype), remat=remat, scan=scan, rngs=nnx.Rngs(0))

    return nnx.split(nnx.eval_shape(create))


@functools.cache
def shapes_of(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter of a model, by its dotted name."""
    _, abstract = structure(config)
    shapes = {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(abstract)}
    return types.MappingProxyType(shapes)


def networks(
    config: ModelConfig, params: Any, dtype: str = "float32", remat: Remat = "dots", scan: bool = True
) -> Networks:
    """The networks with the given parameters (nested dicts of arrays), cheap inside `jit`.

    Outside, what is laid out for GPUs is copied.
    """
    graphdef, abstract = structure(config, dtype, remat, scan)
    state = nnx.State(abstract)
    nnx.replace_by_pure_dict(state, undo_layout(params))
    return nnx.merge(graphdef, state)


def held_dtypes(config: ModelConfig, dtype: str) -> dict[str, np.dtype]:
    """Parameters that are best held in a compute dtype below float32, by dotted name: what its products read.

    These are kernels, half as much to read in every pass, and biases of convolutions, which would be converted in each
    sample. What is computed in float32 stays as it is.
    """
    narrow = jnp.dtype(dtype)
    if narrow == jnp.float32:
        return {}
    names = []
    for path, layer in nnx.iter_modules(nnx.merge(*structure(config, dtype))):
        if isinstance(layer, nnx.Linear | nnx.Conv) and layer.dtype == narrow:
            bias = isinstance(layer, nnx.Conv) and not isinstance(layer, ThinConv)
            names += [(*path, "kernel"), (*path, "bias")] if bias else [(*path, "kernel")]
    return {".".join(map(str, name)): narrow for name in names}


def hold(config: ModelConfig, params: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The parameters as sampling reads them fastest: in `held_dtypes` and, if they are on GPUs, laid out for those."""
    held = held_dtypes(config, dtype)
    flat = trees.flatten(undo_layout(params))
    params = trees.unflatten({name: x.astype(held[name]) if name in held else x for name, x in flat.items()})
    on_device = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    return lay_out_for_gpu(params) if on_device and unrolls() else params


def unrolls() -> bool:
    """Whether sampling runs blocks one after the other: on a GPU a loop would copy each one's weights in every pass."""
    return device()[0] == "gpu"


def lay_out_for_gpu(params: trees.Tree) -> trees.Tree:
    """Parameters as a GPU reads them in place; `params` may be a part of the tree, from its root.

    A stack's arrays, whose leading axis is its depth, become dicts of one array a block, {0: …, 1: …}: a CUDA graph
    holds the address of what its kernels read, and of a slice XLA tells it anew in every run. AdaLN's, which all blocks
    multiply at once, stay together. A convolution's `kernel` becomes `kernel.ohwi`, output channels first, as cuDNN
    wants it: XLA would turn it in every run.
    """
    flat = trees.flatten(params)
    chosen = {name: x for name, x in flat.items() if _is_stack(name) or _is_convolution(name, x)}
    return trees.unflatten({name: x for name, x in flat.items() if name not in chosen} | _lay_out(chosen))


@jax.jit
def _lay_out(chosen: dict[str, jax.Array]) -> dict[str, jax.Array]:
    turned = {f"{name}.{_OHWI}": jnp.moveaxis(x, -1, 0) for name, x in chosen.items() if not _is_stack(name)}
    stacks = {name: jnp.unstack(x) for name, x in chosen.items() if _is_stack(name)}
    return turned | {f"{name}.{i}": block for name, blocks in stacks.items() for i, block in enumerate(blocks)}


def undo_layout(params: trees.Tree) -> trees.Tree:
    """The inverse of `lay_out_for_gpu`, and nothing to what was not laid out.

    In a program that takes blocks apart and convolves, XLA leaves out both.
    """
    stacks: dict[str, dict[int, Any]] = {}
    whole = {}
    for name, x in trees.flatten(params).items():
        before, _, last = name.rpartition(".")
        if last.isdigit() and _is_stack(before):
            stacks.setdefault(before, {})[int(last)] = x
        elif last == _OHWI:
            whole[before] = jnp.moveaxis(x, 0, -1)
        else:
            whole[name] = x
    joined = {name: jnp.stack([blocks[i] for i in range(len(blocks))]) for name, blocks in stacks.items()}
    return trees.unflatten(whole | joined)


def _is_stack(name: str) -> bool:
    return name.startswith("transformer.") and ".blocks." in name and ".adaln" not in name


def _is_convolution(name: str, x: Any) -> bool:
    return name.endswith(".kernel") and x.ndim == 4


def init_params(
    config: ModelConfig, seed: int, only: str | None = None, place: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """Fresh parameters, float32, as nested dicts; a function of the seed.

    Args:
      only: `tokenizer` or `transformer`, to have that network's parameters alone.
      place: shapes of all parameters → their shardings, or None for the default device; they are made with these, so
        that no device ever holds more than its part.
    """

    def create(key: jax.Array) -> dict[str, Any]:
        module = Networks(config, dtype=jnp.float32, rngs=nnx.Rngs(params=key))
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        return params if only is None else params[only]

    key = jax.random.key(seed)
    shardings = place(nnx.to_pure_dict(structure(config)[1])) if place else None
    if shardings is not None and only is not None:
        shardings = shardings[only]
    # It runs once; XLA:CPU would spend three times as long on optimising hundreds of random draws. Where it is traced
    # as a part of another program, the options are that one's.
    alone = not isinstance(key, jax.core.Tracer)
    quick = {"xla_backend_optimization_level": 0} if alone and jax.default_backend() == "cpu" else None
    return jax.jit(create, out_shardings=shardings, compiler_options=quick)(key)
