"""The smallest configs of the three stages that still have every part, for the tests of training and commands."""

import contextlib
import dataclasses
import fcntl
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax import params as trees
from hmar_jax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TrainConfig,
    TransformerConfig,
)
from hmar_jax.data.tokens import write_token_cache
from hmar_jax.formats.model_directory import tokenizer_fingerprint
from hmar_jax.model import Model
from hmar_jax.networks import init_params
from hmar_jax.parallel import sharding
from hmar_jax.scales import ScaleLadder
from hmar_jax.training.objectives import base

LADDER = ScaleLadder((1, 2, 8))
SIZE = 16
CLASSES = ("A", "B", "C")
TOKENIZER = TokenizerConfig(
    channels=8, multipliers=(1, 1), encoder_blocks=1, decoder_blocks=1, norm_groups=4, latent_channels=4,
    codebook_size=16, downsampling=2, phis=2,
)  # fmt: skip
TRANSFORMER = TransformerConfig(
    depth=2, width=16, heads=2, num_classes=len(CLASSES), branch_depth=1, drop_path=0.1, gate_init=0.5
)
LOSS = TokenizerLossConfig(
    l1=0.2, adversarial_start=1, adversarial_ramp=0, discriminator_channels=4, discriminator_layers=1, kmeans_batches=1,
    dead_below=0.9, revive_every=2, usage_decay=0.5, scale_dropout=0.5,
)  # fmt: skip
_COMMON = {"batch_size": 8, "dtype": "float32", "log_every": 1, "sample_every": 0, "keep": 2}


def tokenizer_config(**changes):
    base = _COMMON | {
        "stage": "tokenizer", "steps": 5, "sides": LADDER.sides, "tokenizer": TOKENIZER, "checkpoint_every": 2,
        "data": DataConfig("glyphs", classes="".join(CLASSES)), "optimizer": OptimizerConfig(base_lr=0.1),
        "tokenizer_loss": LOSS,
    }  # fmt: skip
    return TrainConfig(**(base | changes))


def next_scale_config(folder, **changes):
    base = _COMMON | {
        "stage": "next_scale", "steps": 5, "init_from": str(folder / "tokenizer"), "transformer": TRANSFORMER,
        "data": DataConfig("tokens", path=str(folder / "tokens")), "optimizer": OptimizerConfig(base_lr=0.1),
        "checkpoint_every": 2,
    }  # fmt: skip
    return TrainConfig(**(base | changes))


def masked_config(folder, **changes):
    return next_scale_config(folder, **({"stage": "masked", "init_from": str(folder / "next_scale")} | changes))


def stage_config(stage, folder, **changes):
    makers = {"next_scale": next_scale_config, "masked": masked_config}
    return makers[stage](folder, **changes) if stage in makers else tokenizer_config(**changes)


def write_starts(folder):
    """A tokenizer and a next-scale model with random parameters, and a cache of random tokens, in `folder`."""
    whole = ModelConfig(LADDER, TOKENIZER, TRANSFORMER, CLASSES)
    alone = ModelConfig(LADDER, TOKENIZER, None, CLASSES)
    params = jax.tree.map(np.asarray, init_params(whole, 3))
    tokenizer = Model(alone, {"tokenizer": params["tokenizer"]})
    tokenizer.save(folder / "tokenizer", source="made for a test")
    Model(whole, params).save(folder / "next_scale", source="made for a test")
    rng = np.random.default_rng(0)
    batch = rng.integers(0, TOKENIZER.codebook_size, (2, 32, LADDER.length)), rng.integers(0, len(CLASSES), 32)
    write_token_cache(
        folder / "tokens",
        [batch],
        ladder=LADDER,
        codebook_size=TOKENIZER.codebook_size,
        crops=2,
        class_names=CLASSES,
        tokenizer=tokenizer_fingerprint(tokenizer.config, tokenizer.params),
        source="random",
    )


def shared_folder(tmp_path_factory):
    """A folder that all pytest-xdist workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(folder, make):
    """`folder`, filled by `make(folder)` in whichever worker comes first; the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            folder.mkdir(exist_ok=True)
            with quick_compilation(folder.parent / "compiled"):
                make(folder)
            (folder / "whole").touch()
    return folder


@contextlib.contextmanager
def quick_compilation(cache):
    """Compiles fast rather than fast code, and each program once for all workers and subprocesses.

    `init_params` of the objectives runs once for each config; callers get arrays of their own, to change or to donate.
    """
    made = functools.cache(lambda *config: jax.tree.map(np.asarray, init_params(*config)))

    def placed(config, seed, only, place):
        if isinstance(jnp.zeros(()), jax.core.Tracer):  # only shapes are asked for
            return init_params(config, seed, only, place)
        flat = trees.flatten({only: made(config, seed, only)})
        return trees.unflatten({name: sharding.put(name, np.array(leaf)) for name, leaf in flat.items()})[only]

    quick = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in quick}
    environment = {name.upper(): str(value) for name, value in quick.items()}
    saved = {name: os.environ.get(name) for name in environment}
    for name, value in quick.items():
        jax.config.update(name, value)
    os.environ |= environment
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "init_params", placed)
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def sound_argmax():
    """Optimises again inside `quick_compilation`: without, XLA:CPU miscompiles the sampler's draws."""
    quick = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", quick)


def assert_bit_equal(a, b):
    """Two trees of arrays are the same, bit for bit."""
    left, right = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, x), (_, y) in zip(left, right, strict=True):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


def differing(a, b):
    """Dotted names of the leaves in which two trees of nested dicts differ."""
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    return {name for name in a if np.asarray(a[name]).tobytes() != np.asarray(b[name]).tobytes()}


def describe(state):
    """Shapes, dtypes and shardings of a state, as `Checkpoints.restore` wants them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def idle_steps(spoil=lambda step, metrics: metrics):
    """A stand-in for `make_train_step` whose steps only count; `spoil` may change the metrics of a step."""

    def make(config, objective, optimizer):
        def step(state, frozen, batch):
            done = state.step + 1
            metrics = {"loss": 1.0 / done, "gradient_norm": 0.5 / done, "scale_loss": 1.0 / (done + np.arange(3))}
            return dataclasses.replace(state, step=done), spoil(done, metrics)

        return step

    return make


def steps_on_disk(workdir):
    """Names in the folder of checkpoints, whole or not."""
    return {entry.name for entry in (workdir / "checkpoints").iterdir()}
