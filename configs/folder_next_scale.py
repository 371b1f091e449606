"""Stage 2 of 3 on a folder of your own pictures: each scale from the coarser ones.

Before:   hmar-jax export tokens --config=configs/folder_tokenizer.py --config.data.path=PICTURES --crops=8 \
              --model=runs/my_tokenizer/model --output=runs/my_tokens
Command:  hmar-jax train --config=configs/folder_next_scale.py --config.transformer.num_classes=N --workdir=runs/my_next
N is the number of subfolders, or 1. To try it on a CPU, add --config.dtype=float32 --config.steps=300
--config.transformer.depth=4 --config.transformer.branch_depth=2 --config.transformer.width=128
"""

import ml_collections

from hmar_jax.config import DataConfig, EvalConfig, OptimizerConfig, TrainConfig, TransformerConfig, to_config_dict

TRANSFORMER = TransformerConfig(depth=12, width=512, heads=8, num_classes=1, branch_depth=4, drop_path=0.05)


def get_config() -> ml_collections.ConfigDict:
    """The stage's config."""
    return to_config_dict(
        TrainConfig(
            stage="next_scale",
            steps=100_000,
            batch_size=128,
            init_from="runs/my_tokenizer/model",
            transformer=TRANSFORMER,
            data=DataConfig("tokens", path="runs/my_tokens"),
            optimizer=OptimizerConfig(base_lr=2e-4),
            sample_labels=(0,) * 16,
            evals=(EvalConfig(every=1000, count=1024),),
        )
    )
