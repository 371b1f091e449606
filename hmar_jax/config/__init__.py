"""Every setting as frozen, hashable dataclasses; ml_collections and JSON only at the edge.

A *model config* (`ModelConfig`) says what a model is and travels with its weights in `config.json`. A *train config*
(`TrainConfig`) says how one stage is trained and is what `configs/*.py` return, as an `ml_collections.ConfigDict`.

models      what a model is
training    how one stage is trained
loading     a config file, or the name of an installed one, with overrides → TrainConfig
plain       dataclasses ⇄ JSON and ConfigDict; the checks of types
"""

from hmar_jax.config.loading import load
from hmar_jax.config.models import Kind, ModelConfig, TokenizerConfig, TransformerConfig
from hmar_jax.config.plain import from_config_dict, from_plain, to_config_dict, to_plain
from hmar_jax.config.training import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Stage,
    TokenizerLossConfig,
    TrainConfig,
    check_paths,
)

__all__ = [
    "DataConfig", "EvalConfig", "Kind", "MeshConfig", "ModelConfig", "ObjectiveConfig", "OptimizerConfig", "Stage",
    "TokenizerConfig", "TokenizerLossConfig", "TrainConfig", "TransformerConfig", "check_paths", "from_config_dict",
    "from_plain", "load", "to_config_dict", "to_plain",
]  # fmt: skip
