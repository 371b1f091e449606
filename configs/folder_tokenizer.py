"""Stage 1 of 3 on a folder of your own pictures (class = subfolder, or one class): the tokenizer. 64x64 pixels.

Command:  hmar-jax train --config=configs/folder_tokenizer.py --config.data.path=PICTURES --workdir=runs/my_tokenizer
Sized for one accelerator and thousands of pictures. To try it on a CPU, add --config.dtype=float32 --config.steps=300
--config.tokenizer.channels=16 --config.tokenizer.norm_groups=8 --config.tokenizer_loss.adversarial=0.0
"""

import ml_collections

from hmar_jax.config import (
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TrainConfig,
    to_config_dict,
)

SIDES = (1, 2, 3, 4, 6, 8)
TOKENIZER = TokenizerConfig(
    channels=64, multipliers=(1, 2, 2, 4), latent_channels=32, codebook_size=4096, downsampling=8
)


def get_config() -> ml_collections.ConfigDict:
    """The stage's config."""
    return to_config_dict(
        TrainConfig(
            stage="tokenizer",
            steps=50_000,
            batch_size=64,
            sides=SIDES,
            tokenizer=TOKENIZER,
            data=DataConfig("folder", flip=True, held_out=0.02),
            optimizer=OptimizerConfig(base_lr=4e-4, weight_decay=0.0, final_weight_decay=0.0, clip=1.0, ema=0.999),
            tokenizer_loss=TokenizerLossConfig(l1=0.2, adversarial_start=10_000),
            evals=(EvalConfig(every=1000, count=512),),
        )
    )
