"""HMAR in JAX: hierarchical masked autoregressive image generation.

The names below are imported when first used: data workers and `hmar-jax --help` need no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hmar_jax.config import ModelConfig, TokenizerConfig, TrainConfig, TransformerConfig
    from hmar_jax.errors import InputError
    from hmar_jax.model import Model, Sample, from_pretrained
    from hmar_jax.sampling.schedule import Schedule
    from hmar_jax.scales import ScaleLadder
    from hmar_jax.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Model",
    "ModelConfig",
    "Sample",
    "ScaleLadder",
    "Schedule",
    "TokenizerConfig",
    "TrainConfig",
    "TransformerConfig",
    "from_pretrained",
    "train",
]

_HOMES = {
    "config": ("ModelConfig", "TokenizerConfig", "TrainConfig", "TransformerConfig"),
    "errors": ("InputError",),
    "model": ("Model", "Sample", "from_pretrained"),
    "sampling.schedule": ("Schedule",),
    "scales": ("ScaleLadder",),
    "training.loop": ("train",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"hmar_jax.{module}"), name)
    raise AttributeError(f"module 'hmar_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
