"""Stage 1 of 3 on glyphs, the embedded data: the tokenizer. 24x24 pictures, 4 pixels a token, scales 1 to 6.

Command:  hmar-jax train --config=configs/glyphs_tokenizer.py --workdir=runs/tokenizer
"""

import ml_collections

from hmar_jax.config import (
    DataConfig,
    OptimizerConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TrainConfig,
    to_config_dict,
)

CLASSES = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"

SIDES = (1, 2, 3, 4, 6)
TOKENIZER = TokenizerConfig(
    channels=16,
    multipliers=(1, 2, 4),
    encoder_blocks=1,
    decoder_blocks=1,
    norm_groups=8,
    latent_channels=16,
    codebook_size=256,
    downsampling=4,
)


def get_config() -> ml_collections.ConfigDict:
    """The stage's config."""
    return to_config_dict(
        TrainConfig(
            stage="tokenizer",
            steps=1000,
            batch_size=16,
            sides=SIDES,
            tokenizer=TOKENIZER,
            data=DataConfig("glyphs", classes=CLASSES),
            optimizer=OptimizerConfig(base_lr=0.02, weight_decay=0.0, final_weight_decay=0.0, clip=1.0),
            tokenizer_loss=TokenizerLossConfig(l1=0.2, adversarial=0.0),
            dtype="float32",
            log_every=50,
            sample_every=500,
            checkpoint_every=500,
        )
    )
