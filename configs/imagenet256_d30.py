"""HMAR d30 on ImageNet at 256 pixels, both transformer stages: 2010M parameters, 2556M with the mask branch.

Before:   the tokenizer and its tokens at 256 pixels, which configs/imagenet256_tokenizer.py says how to make,
          on a pod too
Command:  hmar-jax train --config=configs/imagenet256_d30.py --workdir=runs/imagenet256_d30
          hmar-jax train --config=configs/imagenet256_d30.py:masked --workdir=runs/imagenet256_d30_masked
Hardware: a TPU v5e-256 or v5p-128 (64 chips), or 8 H200; the latter with --config.accumulate=2
Time:     next_scale 34 h, 59 h or 272 h; masked 7.4 h, 13 h or 59 h (estimates at 40% utilisation)
Result:   published for HMAR d30: FID 1.95, IS 334.5, precision .82, recall .62 in 14 passes (50,000 samples)
"""

import ml_collections

from hmar_jax.config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    Stage,
    TrainConfig,
    TransformerConfig,
    to_config_dict,
)

IMAGES = 1_281_167  # of ImageNet's training set: an epoch


def get_config(stage: Stage = "next_scale") -> ml_collections.ConfigDict:
    """The config of a stage, `next_scale` or `masked`."""
    masked = stage == "masked"
    return to_config_dict(
        TrainConfig(
            stage=stage,
            steps=(100 if masked else 350) * IMAGES // 1024,
            batch_size=1024,
            init_from="runs/imagenet256_d30/model" if masked else "runs/imagenet256_tokenizer/model",
            transformer=TransformerConfig.preset("d30", masked=False),
            data=DataConfig("tokens", path="runs/imagenet256_tokens"),
            optimizer=OptimizerConfig(base_lr=8e-5, final_lr=0.01, final_weight_decay=0.08),
            mesh=MeshConfig(fsdp=8),
            log_every=100,
            sample_every=10_000,
            checkpoint_every=1_000,
            # Bald eagle, macaw, golden retriever, red panda, balloon, cheeseburger, coral reef, volcano.
            sample_labels=(22, 88, 207, 387, 417, 933, 973, 980),
            sample_schedule="official-256" if masked else "next-scale",
            evals=(EvalConfig(every=5_000, count=8192),),  # if there are held-out tokens
        )
    )
