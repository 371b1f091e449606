"""Stage 3 of 3 on glyphs: the mask branch learns to refine a scale from a part of its tokens.

Command:  hmar-jax train --config=configs/glyphs_masked.py --workdir=runs/masked
"""

import ml_collections

from hmar_jax.config import DataConfig, OptimizerConfig, TrainConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
    """The stage's config."""
    return to_config_dict(
        TrainConfig(
            stage="masked",
            steps=400,
            batch_size=16,
            init_from="runs/next_scale/model",
            data=DataConfig("tokens", path="runs/tokens"),
            optimizer=OptimizerConfig(base_lr=0.016, final_lr=0.01),
            dtype="float32",
            log_every=20,
            sample_every=400,
            sample_labels=tuple(range(16)),
            sample_schedule="small",
            checkpoint_every=400,
        )
    )
