"""Stage 3 of 3 on a folder of your own pictures: refining a scale from a part of its tokens.

Command:  hmar-jax train --config=configs/folder_masked.py --workdir=runs/my_masked
To try it on a CPU, add --config.dtype=float32 --config.steps=100
"""

import ml_collections

from hmar_jax.config import DataConfig, EvalConfig, OptimizerConfig, TrainConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
    """The stage's config."""
    return to_config_dict(
        TrainConfig(
            stage="masked",
            steps=50_000,
            batch_size=128,
            init_from="runs/my_next/model",
            data=DataConfig("tokens", path="runs/my_tokens"),
            optimizer=OptimizerConfig(base_lr=2e-4),
            sample_labels=(0,) * 16,
            evals=(EvalConfig(every=1000, count=1024),),
            sample_schedule="small",
        )
    )
