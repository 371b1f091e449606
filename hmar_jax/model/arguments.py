"""What callers of a `Model` give → checked arrays and names, or one sentence.

Axis letters: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from hmar_jax.arrays import host_array
from hmar_jax.config import ModelConfig
from hmar_jax.errors import InputError, shown
from hmar_jax.labels import class_numbers

type Labels = ArrayLike | Sequence[Any]  # as `read_labels` takes them; an ArrayLike has no names and numbers mixed


def read_labels(config: ModelConfig, labels: Labels, *, null: bool = False) -> np.ndarray:
    """Classes by name, number or both → their numbers, int32 () or (B,), as one or a list was given.

    Args:
      labels: one or a list or array of them. A str is a class's name, or failing that a number in digits, unless
        classes have numbers for names: there it is a name. An int is a class's number, from 0, whatever the names are.
      null: whether `num_classes`, the null class, is one as well.

    Raises:
      InputError: what is no class, or no list.
    """
    highest = config.num_classes if null else config.num_classes - 1
    expected = f"classes by name or number, integers from 0 to {highest}, one or a list"
    numbers = host_array("Labels are", _without_names(config, labels), expected)
    if numbers.ndim > 1 or numbers.size == 0 or not np.issubdtype(numbers.dtype, np.integer):
        raise InputError(f"Labels are {shown(labels)}; expected {expected}.")
    if numbers.min() < 0 or numbers.max() > highest:
        wrong = numbers[(numbers < 0) | (numbers > highest)].flat[0]
        raise InputError(f"Label {wrong} is out of range; this model has classes 0 to {config.num_classes - 1}.")
    return numbers.astype(np.int32)


def _without_names(config: ModelConfig, labels: Any) -> Any:
    """Labels with numbers in place of names, where there are names."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "UTO":  # strings, variable strings, objects
        labels = labels.tolist()
    if isinstance(labels, str):
        return class_numbers([labels], config.class_names, config.num_classes)[0]
    names = [label for label in labels if isinstance(label, str)] if isinstance(labels, list | tuple) else []
    if not names or not all(isinstance(label, str | int | np.integer) for label in labels):
        return labels
    numbers = iter(class_numbers(names, config.class_names, config.num_classes))
    return [next(numbers) if isinstance(label, str) else label for label in labels]


def read_numbers(numbers: ArrayLike, batch: int) -> np.ndarray:
    """Numbers of samples as (B,) uint32."""
    expected = f"{batch} integers from 0 to {2**32 - 1}, one a picture"
    array = host_array("numbers are", numbers, expected)
    if array.shape != (batch,) or not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() >= 2**32:
        raise InputError(f"numbers are {shown(numbers)}; expected {expected}.")
    return array.astype(np.uint32)


def compute_dtype(dtype: DTypeLike) -> str:
    """`float32` or `bfloat16`, from all that NumPy and JAX take for one of them."""
    try:
        # Of other objects NumPy takes the dtype that they have, or lists of fields.
        name = jnp.dtype(dtype).name if isinstance(dtype, str | type | np.dtype) else ""
    except (TypeError, ValueError, SyntaxError):
        name = ""
    if name not in ("float32", "bfloat16"):
        raise InputError(f"dtype is {shown(dtype)}; expected 'float32' or 'bfloat16'.")
    return name


def check_mesh(mesh: Mesh | None) -> Mesh | None:
    """The mesh, or InputError where it is none or XLA is not to split arrays over it by itself."""
    if mesh is None or (isinstance(mesh, Mesh) and not mesh.empty and AxisType.Explicit not in mesh.axis_types):
        return mesh
    raise InputError(
        f"mesh is {shown(mesh)}; expected a jax.sharding.Mesh with axes of type Auto, such as "
        "jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))."
    )
