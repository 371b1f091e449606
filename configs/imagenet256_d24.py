"""HMAR d24 on ImageNet at 256 pixels, both transformer stages: 1033M parameters, 1384M with the mask branch.

Before:   the tokenizer and its tokens at 256 pixels, which configs/imagenet256_tokenizer.py says how to make,
          on a pod too
Command:  hmar-jax train --config=configs/imagenet256_d24.py --workdir=runs/imagenet256_d24
          hmar-jax train --config=configs/imagenet256_d24.py:masked --workdir=runs/imagenet256_d24_masked
Hardware: a TPU v5e-256 or v5p-128 (64 chips), or 8 H200
Time:     next_scale 18 h, 30 h or 140 h; masked 3.9 h, 6.7 h or 31 h (estimates at 40% utilisation)
Result:   published for HMAR d24: FID 2.10, IS 324.3, precision .83, recall .60 in 14 passes (50,000 samples)
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
            steps=(100 if masked else 350) * IMAGES // 768,
            batch_size=768,
            init_from="runs/imagenet256_d24/model" if masked else "runs/imagenet256_tokenizer/model",
            transformer=TransformerConfig.preset("d24", masked=False),
            data=DataConfig("tokens", path="runs/imagenet256_tokens"),
            optimizer=OptimizerConfig(base_lr=8e-5, final_lr=0.01),
            mesh=MeshConfig(fsdp=8),
            log_every=100,
            sample_every=10_000,
            checkpoint_every=2_000,
            # Bald eagle, macaw, golden retriever, red panda, balloon, cheeseburger, coral reef, volcano.
            sample_labels=(22, 88, 207, 387, 417, 933, 973, 980),
            sample_schedule="official-256" if masked else "next-scale",
            evals=(EvalConfig(every=5_000, count=8192),),  # if there are held-out tokens
        )
    )
