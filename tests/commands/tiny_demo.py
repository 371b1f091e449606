"""The demo in miniature: two steps a stage, two of five scales, two of four blocks, 32 pictures."""

import contextlib
import dataclasses

import pytest

from hmar_jax.training import demo

BLOCKS = {"depth": 2, "branch_depth": 1}
STEPS = 2


@contextlib.contextmanager
def miniature():
    """Has `hmar-jax demo --quick` compile and train as little as that in the block."""
    full = demo.stage_config

    def smaller(stage, *args, **options):
        config = full(stage, *args, **options)
        if stage == "tokenizer":
            return dataclasses.replace(config, sides=(1, 6))
        blocks = dataclasses.replace(config.transformer, **BLOCKS)
        return dataclasses.replace(config, transformer=blocks) if stage == "next_scale" else config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "stage_config", smaller)
        patch.setattr(demo, "QUICK_STEPS", dict.fromkeys(demo.STAGES, STEPS))
        patch.setattr(demo, "QUICK_PICTURES", 32)
        yield
