"""metrics of a step → JSON lines, a progress bar and, with its extra installed, TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from hmar_jax.files import local_path, open_regular, writing

_LONGEST = 2**20  # bytes of a line; one of a hundred metrics of ten scales has some 20,000

logger = logging.getLogger(__name__)


class Goodput:
    """Where the wall-clock time of a run goes, from when this is made.

    Args:
      start: steps done before this run.

    Attributes:
      seconds: of `compile` (the first step), `data_wait` (for the next batch, of which the device notices less, or
        nothing: it still has the step before to do), `step` and `checkpoint`.
    """

    def __init__(self, start: int):
        self.seconds = dict.fromkeys(("compile", "data_wait", "step", "checkpoint"), 0.0)
        self._start = time.perf_counter()
        self._steps, self._before = start, dict(self.seconds)

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Counts the time of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - start

    def speed(self, step: int, batch_size: int) -> dict[str, float]:
        """Metrics of the steps since this was last asked: seconds a step, images a second, share of data wait."""
        steps, self._steps = step - self._steps, step
        wait, work = (self.seconds[kind] - self._before[kind] for kind in ("data_wait", "step"))
        self._before = dict(self.seconds)
        total = max(wait + work, 1e-9)
        return {
            "step_seconds": total / steps,
            "images_per_second": batch_size * steps / total,
            "data_wait_share": wait / total,
        }

    def summary(self) -> dict[str, float]:
        """Seconds of each, of all else (samples, logs) as `other`, and of all together as `total`."""
        total = time.perf_counter() - self._start
        return self.seconds | {"other": total - sum(self.seconds.values()), "total": total}


class Profiler:
    """Traces some steps with `jax.profiler`, for TensorBoard or Perfetto. Only process 0 does.

    Args:
      chosen: steps to trace. run: steps that the run has to do; the log says so where none of them is chosen.
      folder: that the trace is written to.
    """

    def __init__(self, chosen: range, run: range, folder: Path):
        self._steps, self._folder, self._on = range(0), folder, False
        if not chosen or jax.process_index() != 0:
            return
        self._steps = range(max(chosen.start, run.start), min(chosen.stop, run.stop))
        if not self._steps:
            wanted, left = (f"{r[0]} to {r[-1]}" if r else "none" for r in (chosen, run))
            logger.warning("Nothing is traced: --profile names steps %s, and this run has %s to do.", wanted, left)

    def __call__(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """A block to run a step in; the first of those chosen begins the trace."""
        if step in self._steps and not self._on:
            jax.profiler.start_trace(self._folder)
            self._on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def ends(self, step: int) -> bool:
        """Whether the trace ends with this step, which is to be finished on the device before `close`."""
        return self._on and step == self._steps[-1]

    def close(self) -> None:
        """Writes the trace, if one was begun."""
        if self._on:
            jax.profiler.stop_trace()
            logger.info("A trace of steps %d to %d is in %s.", self._steps[0], self._steps[-1], self._folder)
        self._on, self._steps = False, range(0)


class MetricsWriter:
    """Writes `metrics.jsonl` (one object a line, a list for what there is per scale) and shows the bar.

    What is not finite is written as null: JSON has no NaN.

    The bar is quiet where standard error is no terminal. Only process 0 writes.
    """

    def __init__(self, workdir: Path, *, steps: int, start: int, name: str):
        workdir = local_path(workdir, "workdir")
        self._main = jax.process_index() == 0
        self._board = _tensorboard(workdir) if self._main else None
        self._path = workdir / "metrics.jsonl"
        self._bar = tqdm.tqdm(
            total=steps, initial=start, desc=name, unit="step", disable=None if self._main else True, dynamic_ncols=True
        )

    def advance(self) -> None:
        """One step done."""
        self._bar.update()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Scalars or (K,) arrays at a step."""
        if not self._main:
            return
        plain = {name: _rounded(value) for name, value in metrics.items()}
        self._append({"step": step} | plain)
        shown = {name: plain[name] for name in ("loss", "accuracy", "images_per_second") if name in plain}
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
        if self._bar.disable:
            logger.info("Step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        if self._board is not None:
            self._board.write_scalars(step, dict(_scalars(plain)))

    def write_goodput(self, seconds: dict[str, float]) -> None:
        """A line of its own, {"goodput": {…}}, for the run that ends."""
        if not self._main:
            return
        self._append({"goodput": {name: round(value, 3) for name, value in seconds.items()}})
        parts = dict(seconds)
        total = parts.pop("total")
        each = (f"{name.replace('_', ' ')} {value:.1f} s ({value / total:.1%})" for name, value in parts.items())
        logger.info("Time spent: %s; %.1f s in all.", ", ".join(each), total)

    def close(self) -> None:
        """Closes files and bar."""
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def _append(self, line: dict[str, Any]) -> None:
        with writing(self._path), self._path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")  # a killed run left half a line
            file.write(json.dumps(_finite(line), allow_nan=False).encode() + b"\n")


def _finite(value: Any) -> Any:
    """The same, with None for each float in it that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: Any) -> Any:
    """A scalar or array as floats of as few digits as tell which float32 they are."""
    return np.vectorize(lambda x: float(str(np.float32(x))), otypes=[float])(value).tolist()


def _scalars(plain: dict[str, Any]) -> Any:
    for name, value in plain.items():
        if isinstance(value, list):
            yield from ((f"{name}/{i:02d}", item) for i, item in enumerate(value, 1))
        else:
            yield name, value


def _tensorboard(workdir: Path) -> Any:
    """A clu writer where the extra `tensorboard` is installed, else None."""
    if importlib.util.find_spec("tensorflow") is None or importlib.util.find_spec("tensorboard") is None:
        return None
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(workdir / "tensorboard"))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of steps in a `metrics.jsonl`, in order; where a resumed run wrote a step again, the later line.

    null is read as NaN. What is no line of a step, such as half a line that a killed run left, is passed over; where
    there is no file, there are no lines.

    Raises:
      InputError: it is no regular file, or may not be read.
    """
    lines = {}
    try:
        with open_regular(file, "Metrics file") as stream:
            while text := stream.readline(_LONGEST):
                line = _line(text)
                if line is not None:
                    lines[line["step"]] = line
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [line for _, line in sorted(lines.items())]


def _line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics at a step: numbers, or lists of them, by name; None where it is none."""
    try:  # Python's parser, since lines of earlier versions may have NaN, which JSON has not
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    plain = {
        name: [_number(x) for x in value] if type(value) is list else _number(value) for name, value in line.items()
    }
    known = all(None not in value if type(value) is list else value is not None for value in plain.values())
    return plain if known else None


def _number(value: Any) -> float | int | None:
    """A number of a line, NaN for null; None where it is no number, or larger than a float can be."""
    if value is None:
        return math.nan
    if type(value) is int:
        return value if abs(value) < 2**63 else None
    return value if type(value) is float else None
