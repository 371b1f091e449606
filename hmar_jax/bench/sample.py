"""`hmar-jax bench sample`: settings → time, memory and bound of label to picture, and what the time goes into.

A run is one of `Model.sample` with the published schedule. Weights are random at full geometry unless a model directory
is given: no figure here depends on their values.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hmar_jax.bench import measurements
from hmar_jax.bench.measurements import GIB, Kernel
from hmar_jax.config import ModelConfig, TokenizerConfig, TransformerConfig
from hmar_jax.errors import InputError
from hmar_jax.scales import Pattern, ScaleLadder

PUBLISHED = (("256", "d16", 8), ("256", "d16", 64), ("256", "d30", 8), ("512", "d24", 8), ("1024", "d24", 4))
# The official PyTorch code on an H200 (torch 2.11, triton 3.6, fp16 autocast), decoder and all: ms and GiB of HMAR, of
# VAR with its key-value cache.
OFFICIAL = {
    ("256", "d16", 8): ((169, 3.5), (174, 3.5)),
    ("256", "d16", 64): ((444, 12.8), (469, 12.6)),
    ("256", "d30", 8): ((299, 11.3), (301, 13.8)),
    ("512", "d24", 8): ((443, 11.0), (512, 14.1)),
    ("1024", "d24", 4): ((848, 16.8), (1042, 23.7)),
}
LEGEND = (
    "ms: the compiled program, label to picture, median of the repeats and their ends; with fetch: Model.sample, which "
    "hands the pictures over as NumPy arrays, and its images/s. bound: the time of its matrix products at the device's "
    "measured rate, or of reading its weights where that takes longer, pass by pass. GiB: of the compiled program, "
    "weights and all. official: the published PyTorch code on an H200, the same setting."
)
PARTS = ("transformer", "filters", "quantizer", "decoder", "rest")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A row: `build` makes its model, `official` are ms and GiB of the published code, if it was measured."""

    name: str
    build: Callable[[], Any]
    batch: int
    official: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row.

    Attributes:
      seconds: of each run of the program. whole: of each `Model.sample`. compile_seconds: of tracing and compiling.
      bound: seconds. memory: bytes.
      parts: device seconds of a run by part, in the order of `PARTS`; empty where the profiler has no device.
    """

    setting: Setting
    seconds: tuple[float, ...]
    whole: tuple[float, ...]
    compile_seconds: float
    bound: float
    memory: int
    parts: Mapping[str, float]


def settings(
    model_dir: str | None, image: str | None, model: str | None, batch: int | None, var: bool, on_cpu: bool
) -> list[Setting]:
    """What to measure: a model directory, a published transformer for pictures of some pixels, or what is usual."""
    if model_dir:
        if image or model or var:
            raise InputError("--model-dir says what to measure; leave --image, --model and --var out.")
        from hmar_jax.model import from_pretrained

        loaded, batch = from_pretrained(model_dir, _dtype(on_cpu)), batch or 8
        return [Setting(f"{model_dir} B={batch}", lambda: loaded, batch)]
    if (image is None) != (model is None):
        raise InputError("--image and --model go together, such as --image=256 --model=d16.")
    if image and model:
        return [_published(image, model, batch or _batch(image, model), var)]
    if on_cpu:
        return [_tiny(batch or 2, var)]
    return [_published(image, model, batch or usual, var) for image, model, usual in PUBLISHED]


def measure_rates(repeats: int) -> Any:
    """What the devices here do in a second, in the dtype that models are measured in."""
    import jax

    from pallas_kernels.scale_attention.bench import times

    return times.measure_rates(_dtype(jax.default_backend() == "cpu"), repeats)


def title(rates: Any) -> str:
    """What a report is about, in a line."""
    import jax

    found = f"{jax.local_device_count()} × {measurements.device_name()}, each {rates.matmul / 1e12:.3g} TFLOP/s in "
    return f"{found}matrix products, copies {rates.copy / 1e9:.4g} GB/s"


def measure_all(rows: Sequence[Setting], repeats: int, rates: Any, folder: Path) -> None:
    """Prints a row a setting and writes all to sample.json and sample.md in a folder, which exists, as it goes."""
    import jax

    measurements.measure_all(
        "sample",
        folder,
        {setting.name: functools.partial(measure, setting, rates, repeats) for setting in rows},
        facts={"devices": jax.local_device_count(), "rates": vars(rates)},
        as_lines=as_lines,
        as_json=as_json,
        as_page=functools.partial(as_page, title(rates)),
    )


def _batch(image: str, model: str) -> int:
    """The smallest published batch of a setting, or 8."""
    return min((batch for *setting, batch in PUBLISHED if setting == [image, model]), default=8)


def _dtype(on_cpu: bool) -> str:
    return "float32" if on_cpu else "bfloat16"


def _published(image: str, model: str, batch: int, var: bool) -> Setting:
    causal = {"masked": False, "pattern": "block_causal"} if var else {}
    transformer = TransformerConfig.preset(model, **causal)
    config = ModelConfig(ScaleLadder.preset(image), TokenizerConfig(), transformer)
    figures = OFFICIAL.get((image, model, batch))
    name = f"{'VAR ' if var else ''}{image} {model} B={batch}"
    return Setting(name, lambda: random_model(config), batch, figures and figures[var])


def _tiny(batch: int, var: bool) -> Setting:
    pattern: Pattern = "block_causal" if var else "block_diagonal"
    transformer = TransformerConfig(2, 64, 2, num_classes=10, branch_depth=1, masked=not var, pattern=pattern)
    tokenizer = TokenizerConfig(channels=8, norm_groups=4, codebook_size=256, latent_channels=8)
    config = ModelConfig(ScaleLadder((1, 2, 4)), tokenizer, transformer)
    name = f"{'VAR ' if var else ''}64 px, two small blocks, B={batch}"
    return Setting(name, lambda: random_model(config), batch)


def random_model(config: ModelConfig) -> Any:
    """A model of random weights in the dtypes that it holds them in, made on the device from few random numbers."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hmar_jax import params
    from hmar_jax.model import Model
    from hmar_jax.networks import held_dtypes, structure

    dtype = _dtype(jax.default_backend() == "cpu")
    noise = 0.02 * jax.random.normal(jax.random.key(0), (2**20,))
    held = held_dtypes(config, dtype)
    shapes = params.flatten(nnx.to_pure_dict(structure(config)[1]))
    leaves = {n: jnp.resize(noise.astype(held.get(n, leaf.dtype)), leaf.shape) for n, leaf in shapes.items()}
    return Model(config, params.unflatten(leaves), dtype)


def measure(setting: Setting, rates: Any, repeats: int) -> Measured:
    """Compiles a model's sampler for the devices here, runs and profiles it."""
    import jax
    import numpy as np

    from hmar_jax.arrays import mesh_in_use
    from hmar_jax.sampling import program
    from hmar_jax.sampling.presets import preset_for

    model = setting.build()
    if model.config.transformer is None:
        raise InputError("The model is a tokenizer alone; bench sample needs one that has a transformer.")
    schedule = model.schedule(preset_for(model.config.ladder, model.config.transformer))
    labels = np.arange(setting.batch) % model.config.num_classes
    with jax.set_mesh(mesh := mesh_in_use()):
        request = program.Request.of(model.config, model.dtype, schedule, model.placed(mesh), labels).on(mesh)
        start = time.perf_counter()
        compiled = program.sample.lower(request).compile()
        compile_seconds = time.perf_counter() - start

        def once() -> float:
            start = time.perf_counter()
            jax.block_until_ready(compiled(request))
            return time.perf_counter() - start

        def whole() -> float:
            start = time.perf_counter()
            model.sample(labels, schedule)
            return time.perf_counter() - start

        for _ in range(3):  # the first ones load kernels
            once()
        seconds = tuple(once() for _ in range(repeats))
        whole()
        wholes = tuple(whole() for _ in range(repeats))
        parts = by_part(measurements.profile(once), compiled.as_text() or "")
    bound = least_seconds(model, schedule.plan, len(request.labels) / mesh.size, rates)
    return Measured(setting, seconds, wholes, compile_seconds, bound, measurements.program_bytes(compiled), parts)


def least_seconds(model: Any, plan: Any, batch: float, rates: Any) -> float:
    """What a device cannot do it faster than: products at its rate, or every pass's weights read once, then decoding.

    The conditions' projections (AdaLN) are read once a picture; of the decoder only products count.
    """
    import jax
    import jax.numpy as jnp

    from hmar_jax import params
    from hmar_jax.flops import sample_flops
    from hmar_jax.networks import networks

    config = model.config
    size: collections.Counter[str] = collections.Counter()
    for name, leaf in params.flatten(model.params["transformer"]).items():
        part = "adaln" if ".adaln." in name else name.partition(".")[0]
        size[part] += sum(array.nbytes for array in jax.tree.leaves(leaf))
    steps = [step.step for scale in range(config.ladder.num_scales) for step in plan.passes(scale)]
    seconds = size["adaln"] / rates.copy
    for step, flops in zip(steps, sample_flops(config, plan), strict=True):
        weights = size["trunk"] + size["masked" if step else "next_scale"]
        seconds += max(batch * sum(flops.values()) / rates.matmul, weights / rates.copy)
    latents = jax.ShapeDtypeStruct((1, *[config.ladder.sides[-1]] * 2, config.tokenizer.latent_channels), jnp.float32)
    decode = jax.jit(lambda params, z: networks(config, params, model.dtype).tokenizer.decode_latents(z))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params)
    with jax.default_device(jax.devices("cpu")[0]):  # other clients don't count what isn't compiled
        counted: Any = decode.lower(shapes, latents).cost_analysis()
    return seconds + batch * counted["flops"] / rates.matmul


def by_part(kernels: Sequence[Kernel], program: str) -> dict[str, float]:
    """Seconds of each part.

    Args:
      kernels: of a profile. XLA names its own after the operation, and what others call theirs says nothing: such a
        kernel is counted with the one before it.
      program: the optimized HLO, which says in which named scope an operation was traced.
    """
    origin = measurements.origins(program)
    total, part = dict.fromkeys(PARTS, 0.0), "rest"
    for operation, name, seconds in kernels:
        where = origin.get(measurements.plain(operation), origin.get(measurements.plain(name)))
        if where is not None:
            part = part_of(where)
        total[part] += seconds
    return total if kernels else {}


def part_of(where: str) -> str:
    """The part whose named scope an operation was traced in."""
    scopes = re.split(r"\W+", where)
    return next((part for part in PARTS if part in scopes), "rest")


def as_json(row: Measured) -> dict[str, Any]:
    """A row as plain values: seconds and bytes."""

    def ends(seconds: Sequence[float]) -> dict[str, float]:
        return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}

    official = row.setting.official
    return {
        "name": row.setting.name,
        "program": ends(row.seconds),
        "whole": ends(row.whole),
        "images_per_second": row.setting.batch / statistics.median(row.whole),
        "bound": row.bound,
        "memory": row.memory,
        "compile": row.compile_seconds,
        "parts": dict(row.parts),
        "official": official and {"median": official[0] / 1e3, "memory": official[1] * GIB},
    }


def as_lines(row: Measured) -> str:
    """A row for a terminal."""
    found = as_json(row)
    once, whole = found["program"], found["whole"]
    line = (
        f"{row.setting.name}: {_ms(once)} ({_ms(once, 'low')} to {_ms(once, 'high')}) ms, bound {1e3 * row.bound:.1f}; "
        f"with fetch {_ms(whole)}, {found['images_per_second']:.4g} images/s; {row.memory / GIB:.1f} GiB, compiled in "
        f"{row.compile_seconds:.0f} s"
    )
    if row.setting.official:
        ms, gib = row.setting.official
        line += f"; official {ms} ms, {gib} GiB: {ms / 1e3 / once['median']:.1f} times as long"
    if row.parts:
        line += "\n  ms a run: " + ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in row.parts.items())
    return line


def as_page(title: str, rows: Sequence[Measured]) -> str:
    """All rows as Markdown."""
    head = ["setting", "ms", "ends", "bound, ms", "with fetch, ms", "images/s", "GiB", "compile, s"]
    head += [*(f"{part}, ms" for part in PARTS), "official, ms", "GiB", "times as long"]
    lines = [f"# Sampling on {title}", "", LEGEND, "", f"| {' | '.join(head)} |"]
    lines.append("| --- " + "| ---: " * (len(head) - 1) + "|")
    for row in rows:
        found = as_json(row)
        once = found["program"]
        cells = [row.setting.name, _ms(once), f"{_ms(once, 'low')} to {_ms(once, 'high')}", f"{1e3 * row.bound:.1f}"]
        cells += [_ms(found["whole"]), f"{found['images_per_second']:.4g}", f"{row.memory / GIB:.1f}"]
        cells += [f"{row.compile_seconds:.0f}"]
        cells += [f"{1e3 * row.parts[part]:.1f}" if row.parts else "" for part in PARTS]
        official = row.setting.official
        cells += [f"{official[0]}", f"{official[1]}"] if official else ["", ""]
        cells += [f"{official[0] / 1e3 / once['median']:.1f}" if official else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ms(times: Mapping[str, float], which: str = "median") -> str:
    return f"{1e3 * times[which]:.1f}"
