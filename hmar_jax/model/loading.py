"""model directory or hub id → Model."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from hmar_jax.formats.model_directory import open_model, read_params
from hmar_jax.model.arguments import check_mesh, compute_dtype
from hmar_jax.model.model import Model
from hmar_jax.networks import held_dtypes
from hmar_jax.parallel.sharding import replicated
from hmar_jax.xla import use_compilation_cache


def from_pretrained(
    path: str | Path, dtype: DTypeLike = "float32", mesh: Mesh | None = None, revision: str | None = None
) -> Model:
    """Loads a model directory, and has JAX keep what it compiles (`xla.use_compilation_cache`).

    Args:
      path: of the directory, or a Hugging Face hub id such as `someone/hmar-d16`, which is downloaded once and cached.
      dtype: compute dtype, float32 or bfloat16, as NumPy or JAX take one; with the latter, what products read is held
        in it too.
      mesh: devices to hold the parameters and to split batches of samples over, as in `Model`.
      revision: branch, tag or commit of the hub repository.

    Raises:
      InputError: no model there, damaged weights, or entries that don't fit the config, by name.
    """
    dtype, mesh = compute_dtype(dtype), check_mesh(mesh)
    opened = open_model(path, revision)
    use_compilation_cache()
    held = held_dtypes(opened.config, dtype)

    def put(name: str, array: np.ndarray) -> jax.Array:
        array = np.asarray(array, held.get(name))
        if mesh is None:
            return jnp.asarray(array)
        return jax.make_array_from_callback(array.shape, replicated(mesh), lambda index: array[index])

    model = Model(opened.config, read_params(opened, put=put), dtype, mesh)
    model.about, model.sampling = opened.about, opened.sampling
    return model
