"""config ⇄ networks: tokenizer and transformer as one module, its parameters as nested dicts of arrays."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
    config: ModelConfig, params: trees.Tree, dtype: str = "float32", remat: Remat = "dots", scan: bool | None = None
) -> Networks:
    """The networks with the given parameters (nested dicts of arrays, in either `Layout`), for sampling by default.

    Call it inside `jit`, where it costs nothing; outside, unpacking the GPU layout copies every weight.

    Args:
      remat, scan: as in `TrainConfig`. Without `scan`, blocks run in a loop, on GPUs one after the other: there a loop
        copies each block's weights out of the stack in every pass.
    """
    graphdef, abstract = structure(config, dtype, remat, Layout.here() is Layout.WHOLE if scan is None else scan)
    state = nnx.State(abstract)
    nnx.replace_by_pure_dict(state, Layout.unpack(params))
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


def hold(config: ModelConfig, params: trees.Tree, dtype: str) -> trees.Tree:
    """Parameters as sampling reads them fastest: in `held_dtypes` and, if they are on devices, in the layout for these.

    Args:
      params: in either layout. Arrays on the host go to devices later, whole.
    """
    held = held_dtypes(config, dtype)

    def narrowed(name: str, leaf: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(held[name]), leaf) if name in held else leaf

    params = trees.unflatten({name: narrowed(name, leaf) for name, leaf in trees.flatten(params).items()})
    on_device = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    return (Layout.here() if on_device else Layout.WHOLE).pack(params)


class Layout(enum.Enum):
    """How the arrays of parameters lie in memory. Names, dtypes and values are the same in both layouts.

    WHOLE is the layout of Flax, of files and of training. GPU is what sampling on a GPU reads in place. It replaces
    some leaves of the nested dicts by small pytrees:

        parameter                          WHOLE             GPU
        of a stack of blocks               (depth,…)         _Blocks: depth arrays (…)
        kernel of a convolution            (H,W,in,out)      _OutputsFirst: (out,H,W,in)
        any other, and AdaLN of a stack    an array          the same array

    In sampling the blocks of a stack run one after the other, and cuBLAS reads a slice of a stacked weight in place in
    plain products alone; for others XLA copies the slice in every pass. A CUDA graph records the addresses that its
    kernels read, and XLA would have to update those of slices in every run. AdaLN stays stacked because one batched
    product serves all blocks. cuDNN wants kernels with output channels first; XLA would transpose them in every run.

    `unpack` is called inside `jit`: XLA cancels it against the slices and transpositions of the program, so that the
    program reads the packed arrays and copies nothing.
    """

    WHOLE = enum.auto()
    GPU = enum.auto()

    @classmethod
    def here(cls) -> Layout:
        """The layout for sampling on the devices that programs are compiled for."""
        return cls.GPU if device()[0] == "gpu" else cls.WHOLE

    @classmethod
    def of(cls, params: trees.Tree) -> Layout:
        """The layout that parameters are in."""
        leaves = jax.tree.leaves(params, is_leaf=_is_packed)
        return cls.GPU if any(map(_is_packed, leaves)) else cls.WHOLE

    def pack(self, params: trees.Tree) -> trees.Tree:
        """Parameters in either layout → in this one; the tree, or a part of it from its root.

        Arrays that lie as they should are not copied.
        """
        if Layout.of(params) is self:
            return params
        if self is Layout.WHOLE:
            return Layout.unpack(params)
        flat = trees.flatten(params)
        chosen = {name: x for name, x in flat.items() if _is_stack(name) or _is_convolution(name, x)}
        return trees.unflatten(flat | _pack(chosen))

    @staticmethod
    def unpack(params: trees.Tree) -> trees.Tree:
        """Parameters in either layout, or any part of the tree → in the layout WHOLE."""
        return jax.tree.map(lambda leaf: leaf.whole() if _is_packed(leaf) else leaf, params, is_leaf=_is_packed)


class _Blocks(NamedTuple):
    arrays: tuple[jax.Array, ...]

    def whole(self) -> jax.Array:
        return jnp.stack(self.arrays)


class _OutputsFirst(NamedTuple):
    kernel: jax.Array

    def whole(self) -> jax.Array:
        return jnp.moveaxis(self.kernel, 0, -1)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, _Blocks | _OutputsFirst)


def _is_stack(name: str) -> bool:
    return name.startswith("transformer.") and ".blocks." in name and ".adaln" not in name


def _is_convolution(name: str, x: jax.Array) -> bool:
    return name.endswith(".kernel") and x.ndim == 4


@jax.jit
def _pack(flat: dict[str, jax.Array]) -> dict[str, _Blocks | _OutputsFirst]:
    return {
        name: _Blocks(jnp.unstack(x)) if _is_stack(name) else _OutputsFirst(jnp.moveaxis(x, -1, 0))
        for name, x in flat.items()
    }


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
