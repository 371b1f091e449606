"""The tokenizer at full size on ImageNet at 256 pixels: 109M parameters. It serves 512 pixels too.

Before:   ImageNet as TFDS array_record in DATA, and a file of LPIPS weights: README.md and
          hmar_jax/tokenizer/perceptual.py say how to make them
Command:  hmar-jax train --config=configs/imagenet256_tokenizer.py --config.data.path=DATA \
              --config.tokenizer_loss.perceptual_weights=FILE --workdir=runs/imagenet256_tokenizer
Hardware: a TPU v5e-256 or v5p-128 (64 chips), or 8 H200
Time:     1.3, 2.2 or 10 h (estimates at 40% utilisation, without discriminator and LPIPS)
Settings: ours, none are published; the released tokenizer reconstructs ImageNet with an FID of about 0.9

Or take the released one:
    hmar-jax convert --kind=vae --input=vae_ch160v4096z32.pth --sides=1,2,3,4,5,6,8,10,13,16 \
        --output=runs/imagenet256_tokenizer/model
The tokens that configs/imagenet256_d*.py train from, 8 crops of each picture, none mirrored, in 14 GB:
    hmar-jax export tokens --config=configs/imagenet256_tokenizer.py --config.data.path=DATA --config.data.flip=False \
        --crops=8 --model=runs/imagenet256_tokenizer/model --output=runs/imagenet256_tokens
That takes 2.9 h on one H200 with 16 cores (985 crops a second), 22 minutes on eight; with --dtype=bfloat16
--config.data.workers=16 1.8 h (1,601 a second) and 13 minutes (measured 2026-11-30 at commit e984a75 on one H200 from
JPEGs of 500x375; eight are that divided by 8).
Held-out tokens, for the evals of those configs, are those of ImageNet's validation pictures:
    hmar-jax export tokens --config=configs/imagenet256_tokenizer.py --config.data.path=DATA --config.data.flip=False \
        --config.data.split=validation --model=runs/imagenet256_tokenizer/model \
        --output=runs/imagenet256_tokens/validation
On a pod any launcher runs the same on all machines, and again where it was after a preemption:
    bash launch/tpu_vm.sh --project=P --zone=Z --name=NAME --bucket=B --repository=URL --revision=COMMIT -- \
        export tokens --config=configs/imagenet256_tokenizer.py --config.data.path=DATA --config.data.flip=False \
        --crops=8 --model=runs/imagenet256_tokenizer/model --output=runs/imagenet256_tokens
The same tokenizer with the scales of 512 pixels, and the tokens that configs/imagenet512_d*.py train from, 46 GB:
    hmar-jax export torch --kind=vae --model=runs/imagenet256_tokenizer/model --output=runs/tokenizer.safetensors
    hmar-jax convert --kind=vae --input=runs/tokenizer.safetensors --sides=1,2,3,4,6,9,13,18,24,32 \
        --output=runs/imagenet512_tokenizer/model
    hmar-jax export tokens --config=configs/imagenet256_tokenizer.py --config.data.path=DATA --config.data.flip=False \
        --crops=8 --model=runs/imagenet512_tokenizer/model --output=runs/imagenet512_tokens
"""

import ml_collections

from hmar_jax.config import DataConfig, OptimizerConfig, TokenizerLossConfig, TrainConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
    """The stage's config; sides and tokenizer are the defaults."""
    return to_config_dict(
        TrainConfig(
            stage="tokenizer",
            steps=200_000,
            batch_size=256,
            data=DataConfig("tfds", name="imagenet2012", flip=True, workers=16),
            optimizer=OptimizerConfig(base_lr=1e-4, weight_decay=0.0, final_weight_decay=0.0, clip=1.0, ema=0.999),
            tokenizer_loss=TokenizerLossConfig(l1=0.2),
            log_every=100,
            sample_every=5_000,
            checkpoint_every=5_000,
        )
    )
