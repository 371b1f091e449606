"""HMAR d24 on ImageNet at 512 pixels, both transformer stages: 1033M parameters, 1384M with the mask branch.

Before:   the tokenizer and its tokens at 512 pixels, which configs/imagenet256_tokenizer.py says how to make,
          on a pod too
Command:  hmar-jax train --config=configs/imagenet512_d24.py --workdir=runs/imagenet512_d24
          hmar-jax train --config=configs/imagenet512_d24.py:masked --workdir=runs/imagenet512_d24_masked
Hardware: a TPU v5e-256 or v5p-128 (64 chips), or 8 H200; the latter with --config.accumulate=2
Time:     next_scale 61 h, 105 h or 487 h; masked 14 h, 23 h or 109 h (estimates at 40% utilisation)
Settings: those published for d24, whatever the resolution
Result:   published for HMAR d24: FID 2.99, IS 304.1 in 15 passes (50,000 samples)
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
from hmar_jax.scales import ScaleLadder

IMAGES = 1_281_167  # of ImageNet's training set: an epoch


def get_config(stage: Stage = "next_scale") -> ml_collections.ConfigDict:
    """The config of a stage, `next_scale` or `masked`."""
    masked = stage == "masked"
    return to_config_dict(
        TrainConfig(
            stage=stage,
            steps=(100 if masked else 350) * IMAGES // 768,
            batch_size=768,
            sides=ScaleLadder.preset("512").sides,  # those of init_from, for compile-check before that is there
            init_from="runs/imagenet512_d24/model" if masked else "runs/imagenet512_tokenizer/model",
            transformer=TransformerConfig.preset("d24", masked=False),
            data=DataConfig("tokens", path="runs/imagenet512_tokens"),
            optimizer=OptimizerConfig(base_lr=8e-5, final_lr=0.01),
            mesh=MeshConfig(fsdp=8),
            log_every=100,
            sample_every=10_000,
            checkpoint_every=2_000,
            # Bald eagle, macaw, golden retriever, red panda, balloon, cheeseburger, coral reef, volcano.
            sample_labels=(22, 88, 207, 387, 417, 933, 973, 980),
            sample_schedule="official-512" if masked else "next-scale",
            evals=(EvalConfig(every=5_000, count=8192),),  # if there are held-out tokens
        )
    )
