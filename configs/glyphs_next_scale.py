"""Stage 2 of 3 on glyphs: the transformer learns to predict each scale from the coarser ones.

Before:   hmar-jax export tokens --config=configs/glyphs_tokenizer.py --model=runs/tokenizer/model --count=12000 \
              --output=runs/tokens
Command:  hmar-jax train --config=configs/glyphs_next_scale.py --workdir=runs/next_scale
"""

import ml_collections

from hmar_jax.config import DataConfig, ObjectiveConfig, OptimizerConfig, TrainConfig, TransformerConfig, to_config_dict

TRANSFORMER = TransformerConfig(depth=4, width=128, heads=4, num_classes=34, branch_depth=2, gate_init=1.0)


def get_config() -> ml_collections.ConfigDict:
    """The stage's config."""
    return to_config_dict(
        TrainConfig(
            stage="next_scale",
            steps=1800,
            batch_size=16,
            init_from="runs/tokenizer/model",
            transformer=TRANSFORMER,
            data=DataConfig("tokens", path="runs/tokens"),
            optimizer=OptimizerConfig(base_lr=0.024, final_lr=0.01),
            objective=ObjectiveConfig(scale_weights="equal"),
            dtype="float32",
            log_every=50,
            sample_every=900,
            sample_labels=tuple(range(16)),
            checkpoint_every=600,
        )
    )
