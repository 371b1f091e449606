"""rows → a table for a terminal or a page, and JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pallas_kernels.scale_attention.bench.cases import Setting
from pallas_kernels.scale_attention.bench.times import PASSES, TOLERANCE, Rates, Row

LEGEND = (
    "* runs here by default; packed: of q, k and v as one projection gives them. Errors are norms of the difference to "
    "a float32 reference over its norm; ± is half the distance of the quartiles; × ours is against our fastest right "
    "one; FLOPs count visible pairs; MiB is what forward and backward need beyond their inputs."
)


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Right ones, fastest training first; then wrong ones; then absent ones."""
    return sorted(rows, key=lambda row: (row.absent is not None, not row.right, row.times and row.times["both"].median))


def ours_at_best(rows: Sequence[Row], name: str) -> float:
    """Seconds of a pass by our fastest right implementation; not a number if there is none."""
    return min((row.times[name].median for row in rows if row.ours and row.right), default=math.nan)


def render(setting: Setting, rows: Sequence[Row], rates: Rates, markdown: bool = False) -> str:
    """A setting's rows under its bounds, aligned for a terminal or as Markdown."""
    columns = {"forward": 4, "backward": 4, "both": 2}
    kinds = list(TOLERANCE[setting.dtype])[: 3 if setting.norm else 2]
    header, body, absent = ["", "error", *(f"of {kind}" for kind in kinds[1:])], [], []
    for name, width in columns.items():
        header += [f"{name}, ms", "× ours", "of bound", "TFLOP/s"][:width]
    for row in ranked(rows):
        if row.absent:
            absent.append(f"{row.name}: absent, {row.absent}.")
            continue
        cells = [f"{row.name} *" if row.default else row.name, *(f"{row.errors[kind]:.1e}" for kind in kinds)]
        for name, width in columns.items():
            cells += _pass_cells(setting, row, name, rates, ours_at_best(rows, name))[:width]
        body.append([*cells, "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.0f}"])
    lines = [[*header, "MiB"], *body]
    bounds = []
    for name in PASSES[:2]:
        limit = "bytes" if setting.least_bytes(name) / rates.copy > setting.flops(name) / rates.matmul else "FLOPs"
        bounds.append(
            f"{name} {1e3 * rates.bound(setting, name):.3g} ms by {limit} ({setting.flops(name) / 1e9:.4g} GFLOP)"
        )
    title, limits = str(setting), f"Bound: {', '.join(bounds)}."
    if markdown:
        drawn = ["| " + " | ".join(line) + " |" for line in lines]
        drawn.insert(1, "|---" + "|--:" * (len(lines[0]) - 1) + "|")
        return "\n".join([f"### {title}", "", limits, "", *drawn, "", *(f"* {line}" for line in absent), ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([title, limits, *drawn, *absent, ""])


def _pass_cells(setting: Setting, row: Row, name: str, rates: Rates, ours: float) -> list[str]:
    taken = row.times[name]
    milliseconds = f"{1e3 * taken.median:.3g} ± {1e3 * (taken.high - taken.low) / 2:.1g}"
    ratio = f"{taken.median / ours:.2f}" if row.right else "wrong"
    share = f"{rates.bound(setting, name) / taken.median:.0%}"
    return [milliseconds, ratio, share, f"{setting.flops(name) / taken.median / 1e12:.3g}"]


def as_json(setting: Setting, rows: Sequence[Row], rates: Rates) -> dict[str, Any]:
    """Everything in the table, in seconds, bytes and FLOPs; null where something is unknown or not finite."""
    shape = dataclasses.asdict(setting) | {"ladder": list(setting.ladder.sides), "length": setting.ladder.length}
    work = {}
    for name in PASSES:
        limits = {"flops": setting.flops(name), "bytes": setting.least_bytes(name)}
        work[name] = limits | {"bound": rates.bound(setting, name)}
    lines = []
    for row in ranked(rows):
        finite = {kind: error if math.isfinite(error) else None for kind, error in row.errors.items()}
        lines.append(dataclasses.asdict(row) | {"errors": finite})
    return {"setting": shape, "work": work, "rows": lines}
