"""HMAR in JAX: hierarchical masked autoregressive image generation."""

from hmar_jax.config import ModelConfig, TokenizerConfig, TrainConfig, TransformerConfig
from hmar_jax.errors import InputError
from hmar_jax.model import Model, Sample
from hmar_jax.pretrained import from_pretrained
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder

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
]
