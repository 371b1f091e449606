"""`hmar-jax bench train`: train configs → time, utilisation and memory of a step, and what the time goes into.

A step is the one that `hmar-jax train` runs: teacher forcing, transformer, loss, gradients, AdamW. Weights and tokens
are made up, so that neither a model nor data need be there; so are the pictures of stage `tokenizer`, whose FLOPs are
those that XLA counts in the whole step. Of `init_from`, where it is here, the sizes are taken.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hmar_jax.bench import measurements
from hmar_jax.bench.measurements import GIB, Kernel
from hmar_jax.config import DataConfig, ModelConfig, TokenizerConfig, TrainConfig, TransformerConfig, load
from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder

PUBLISHED = (("256", "d16", 64), ("256", "d30", 32), ("512", "d24", 16), ("1024", "d24", 2))  # pixels, model, batch
LEGEND = (
    "ms: a whole step, median of the repeats and their ends. used: share of the device's measured matrix product rate "
    "that the step's model FLOPs take (nothing counts twice because it is recomputed); bound: the time they would take "
    "at that rate. GiB: of the compiled program, arguments and all."
)
_PARTS = ("matrix products", "attention", "head", "optimizer", "rest")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row.

    Attributes:
      seconds: of each repeat. compile_seconds: of tracing and compiling. memory: bytes. flops: of the model in a step.
      parts: device seconds of a step by part, in the order of `_PARTS`; empty where the profiler has no device.
    """

    name: str
    config: TrainConfig
    seconds: tuple[float, ...]
    compile_seconds: float
    memory: int
    flops: float
    parts: Mapping[str, float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def settings(
    config: str | None, image: str | None, model: str | None, batch: int | None, on_cpu: bool
) -> dict[str, TrainConfig]:
    """Name → config of what to measure: of a config file or name, of pixels and a transformer, or what is usual."""
    if config:
        if image or model:
            raise InputError("--config says what to measure; leave --image and --model out.")
        loaded = load(config)
        loaded = dataclasses.replace(loaded, batch_size=batch or loaded.batch_size)
        return {f"{config} B={loaded.batch_size}": loaded}
    if (image is None) != (model is None):
        raise InputError("--image and --model go together, such as --image=256 --model=d16.")
    if image and model:
        usual = {(image, model): batch for image, model, batch in PUBLISHED}
        return dict([_published(image, model, batch or usual.get((image, model), 16))])
    if on_cpu:
        return {f"128 px, two small blocks, B={batch or 4}": _tiny(batch or 4)}
    return dict(_published(image, model, batch or usual) for image, model, usual in PUBLISHED)


def matmul_rate(rows: Mapping[str, TrainConfig], repeats: int) -> float:
    """FLOP/s of matrix products on all devices here."""
    import jax

    from pallas_kernels.scale_attention.bench import times

    return times.measure_rates(next(iter(rows.values())).dtype, repeats).matmul * jax.device_count()


def title(rate: float) -> str:
    """What a report is about, in a line."""
    import jax

    return f"{jax.device_count()} × {measurements.device_name()}, {rate / 1e12:.3g} TFLOP/s in matrix products"


def measure_all(rows: Mapping[str, TrainConfig], repeats: int, rate: float, folder: Path) -> None:
    """Prints a row a setting and writes all to train.json and train.md in a folder, which exists, as it goes."""
    import jax

    measurements.measure_all(
        "train",
        folder,
        {name: functools.partial(measure, name, config, repeats) for name, config in rows.items()},
        facts={"devices": jax.device_count(), "matmul_rate": rate},
        as_lines=functools.partial(as_lines, rate=rate),
        as_json=functools.partial(as_json, rate=rate),
        as_page=functools.partial(as_page, title(rate), rate=rate),
    )


def _published(image: str, model: str, batch: int) -> tuple[str, TrainConfig]:
    transformer = TransformerConfig.preset(model, masked=False)
    return f"{image} {model} B={batch}", _config(ScaleLadder.preset(image).sides, batch, transformer=transformer)


def _tiny(batch: int) -> TrainConfig:
    tokenizer = TokenizerConfig(
        channels=8, encoder_blocks=1, decoder_blocks=1, norm_groups=4, codebook_size=256, latent_channels=8
    )
    transformer = TransformerConfig(2, 64, 2, num_classes=10, branch_depth=1)
    return _config(
        ScaleLadder.preset("128").sides, batch, tokenizer=tokenizer, transformer=transformer, dtype="float32"
    )


def _config(sides: tuple[int, ...], batch: int, **fields: Any) -> TrainConfig:
    return TrainConfig(sides=sides, batch_size=batch, init_from="nothing", data=DataConfig("tokens"), **fields)


def measure(name: str, config: TrainConfig, repeats: int) -> Measured:
    """Compiles a config's train step for the devices here, runs and profiles it."""
    import jax

    from hmar_jax.flops import model_flops
    from hmar_jax.parallel import sharding
    from hmar_jax.training.state import jit_train_step, make_train_step

    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    with jax.set_mesh(mesh):
        objective, state, frozen, optimizer = _fresh(config)
        batch = _random_batch(config, objective.model_config, mesh)
        start = time.perf_counter()
        step = jit_train_step(make_train_step(config, objective, optimizer), state, mesh)
        lowered = step.lower(state, frozen, batch)
        compiled = lowered.compile()
        compile_seconds = time.perf_counter() - start

        def steps(count: int) -> Iterable[float]:
            nonlocal state
            for _ in range(count):
                start = time.perf_counter()
                state, metrics = compiled(state, frozen, batch)
                jax.block_until_ready(metrics)
                yield time.perf_counter() - start

        list(steps(3))  # the first ones load kernels
        seconds = tuple(steps(repeats))
        parts = by_part(measurements.profile(lambda: list(steps(2))), compiled.as_text() or "", 2)
    counted: Any = lowered.cost_analysis()  # of the whole step, before it is optimised
    flops = sum(model_flops(config, objective.model_config).values()) or counted["flops"]
    return Measured(name, config, seconds, compile_seconds, measurements.program_bytes(compiled), flops, parts)


def _fresh(config: TrainConfig) -> tuple[Any, Any, Any, Any]:
    """Objective, state, frozen parameters and optimizer of a stage that starts from made-up weights."""
    from hmar_jax.compile_check.programs import absent_start
    from hmar_jax.parallel import sharding
    from hmar_jax.training.objectives import make_objective
    from hmar_jax.training.state import TrainState, optimizer_of

    start = absent_start(config)
    assert start.config is not None  # `absent_start` makes one up
    objective = make_objective(dataclasses.replace(config, init_from="nothing"), (), start)
    parts = objective.init(_made_up_params(start.config, sharding.shardings_in_use), [])
    optimizer = optimizer_of(config, parts.trained)
    return objective, TrainState.create(config, parts, optimizer), parts.frozen, optimizer


def _made_up_params(model: ModelConfig, place: Callable[[Any], Any]) -> Any:
    """Small numbers that differ, laid out by `place`; to compile hundreds of random draws takes a minute on a GPU."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hmar_jax.networks import structure

    def some(leaf: Any) -> jax.Array:
        mixed = (jnp.arange(leaf.size, dtype=jnp.uint32) * jnp.uint32(2654435761)) >> 8  # Knuth's hash, 24 bits of it
        return 0.04 * (mixed.astype(jnp.float32) / 2**24 - 0.5).reshape(leaf.shape)

    shapes = nnx.to_pure_dict(structure(model)[1])
    return jax.jit(lambda: jax.tree.map(some, shapes), out_shardings=place(shapes))()


def _random_batch(config: TrainConfig, model: ModelConfig, mesh: Any) -> Any:
    import numpy as np

    from hmar_jax.parallel import sharding

    rng, rows = np.random.default_rng(config.seed), len(sharding.host_rows(mesh, config.batch_size))
    if config.stage == "tokenizer":
        images = rng.integers(0, 256, (rows, model.image_size, model.image_size, 3), np.uint8)
        return sharding.put_batch({"image": images, "label": np.zeros(rows, np.int32)}, mesh)
    tokens = rng.integers(0, model.tokenizer.codebook_size, (rows, model.ladder.length), np.int32)
    return sharding.put_batch({"tokens": tokens, "label": rng.integers(0, model.num_classes, rows, np.int32)}, mesh)


def by_part(kernels: Sequence[Kernel], program: str, steps: int) -> dict[str, float]:
    """Seconds a step of each part.

    Args:
      kernels: of a profile, all steps together; XLA names its own after the operation. program: the optimized HLO,
        which says where an operation comes from.
    """
    origin = measurements.origins(program)
    total = dict.fromkeys(_PARTS, 0.0)
    for _, name, seconds in kernels:
        where = origin.get(measurements.plain(name), "")
        if "scale_attention" in name or "scale_attention" in where:
            part = "attention"
        elif "dot_general" in where or "conv_general" in where or re.search("gemm|nvjet|xmma|cutlass", name):
            part = "matrix products"
        else:
            part = next((part for part in ("optimizer", "head") if f"{part}/" in where or f"({part})" in where), "rest")
        total[part] += seconds / steps
    return total if kernels else {}


def as_json(row: Measured, rate: float) -> dict[str, Any]:
    """A row as plain values: seconds, bytes, FLOPs."""
    return {
        "name": row.name,
        "median": row.median,
        "low": min(row.seconds),
        "high": max(row.seconds),
        "images_per_second": row.config.batch_size / row.median,
        "model_flops": row.flops,
        "utilisation": row.flops / row.median / rate,
        "bound": row.flops / rate,
        "memory": row.memory,
        "compile": row.compile_seconds,
        "parts": dict(row.parts),
    }


def as_lines(row: Measured, rate: float) -> str:
    """A row for a terminal."""
    found = as_json(row, rate)
    ends = f"{1e3 * found['low']:.1f} to {1e3 * found['high']:.1f}"
    line = (
        f"{row.name}: {1e3 * row.median:.1f} ms ({ends}), {found['images_per_second']:.4g} images/s, used "
        f"{found['utilisation']:.1%}, bound {1e3 * found['bound']:.1f} ms, {row.memory / GIB:.1f} GiB, compiled in "
        f"{row.compile_seconds:.0f} s"
    )
    if row.parts:
        line += "\n  ms a step: " + ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in row.parts.items())
    return line


def as_page(title: str, rows: list[Measured], rate: float) -> str:
    """All rows as Markdown."""
    head = [
        "setting",
        "ms",
        "ends",
        "images/s",
        "used",
        "bound, ms",
        "GiB",
        "compile, s",
        *(f"{p}, ms" for p in _PARTS),
    ]
    lines = [f"# Training on {title}", "", LEGEND, "", f"| {' | '.join(head)} |", "| --- " + "| ---: " * 12 + "|"]
    for row in rows:
        found = as_json(row, rate)
        cells = [row.name, f"{1e3 * row.median:.1f}", f"{1e3 * found['low']:.1f} to {1e3 * found['high']:.1f}"]
        cells += [f"{found['images_per_second']:.4g}", f"{found['utilisation']:.1%}", f"{1e3 * found['bound']:.1f}"]
        cells += [f"{row.memory / GIB:.1f}", f"{row.compile_seconds:.0f}"]
        cells += [f"{1e3 * row.parts[part]:.1f}" if row.parts else "" for part in _PARTS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
