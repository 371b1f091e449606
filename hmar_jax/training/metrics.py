"""metrics of a step → JSON lines, a progress bar and, with its extra installed, TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from hmar_jax.files import writing

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes `metrics.jsonl` (one object a line, a list for what there is per scale) and shows the bar.

    The bar is quiet where standard error is no terminal. Only process 0 writes.
    """

    def __init__(self, workdir: Path, *, steps: int, start: int, name: str):
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
        plain = {name: np.asarray(value, np.float64).round(7).tolist() for name, value in metrics.items()}
        with writing(self._path), self._path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")  # a killed run left half a line
            file.write(json.dumps({"step": step} | plain).encode() + b"\n")
        shown = {name: plain[name] for name in ("loss", "accuracy", "images_per_second") if name in plain}
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
        if self._bar.disable:
            logger.info("Step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        if self._board is not None:
            self._board.write_scalars(step, dict(_scalars(plain)))

    def close(self) -> None:
        """Closes files and bar."""
        self._bar.close()
        if self._board is not None:
            self._board.close()


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
    """The lines of a `metrics.jsonl` in order of step; where a resumed run wrote a step again, the later line."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # half a line, left by a killed run
            lines.append(json.loads(text))
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]
