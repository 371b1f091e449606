"""setting → the sizes of a kernel's tiles that are worth timing, each checked and timed → the best, if it beats ours.

Forward and backward are timed as one program: one compilation for each size.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from pallas_kernels.scale_attention.bench.cases import Case, Setting
from pallas_kernels.scale_attention.bench.peers import JaxProgram
from pallas_kernels.scale_attention.bench.times import Row, measure


class Trial(NamedTuple):
    """Blocks, a frozen dataclass of the kernel's own, and the row of `both` that they got."""

    blocks: Any
    row: Row

    @property
    def seconds(self) -> float:
        return self.row.times["both"].median


def candidates(name: str, setting: Setting) -> list[Any]:
    """The blocks that kernel `name` uses for a setting, then others worth timing."""
    found: list[Any] = _kernel(name).candidates(setting.key_ranges, setting.head_size, setting.dtype, setting.norm)
    return found


def table_entry(name: str, setting: Setting) -> str:
    """Where the table of kernel `name` has its blocks for a setting on this device."""
    entry: str = _kernel(name).table_entry(setting.key_ranges, setting.head_size, setting.dtype, setting.norm)
    return entry


def trials(name: str, case: Case, blocks: Sequence[Any], repeats: int) -> Iterator[Trial]:
    """Each of the blocks checked and timed; what fails to compile is a row that says why."""
    for one in blocks:
        row = measure(repr(one), functools.partial(_start, name, one), case, repeats, ours=True, passes=["both"])
        yield Trial(one, row)


def _start(name: str, blocks: Any, case: Case) -> JaxProgram:
    attend, ranges = getattr(_kernel(name), f"{name}_attention"), case.setting.key_ranges

    def with_blocks(q: jax.Array, k: jax.Array, v: jax.Array, q_scale: jax.Array | None = None) -> jax.Array:
        out: jax.Array = attend(q, k, v, ranges, q_scale, blocks=blocks)
        return out

    return JaxProgram(with_blocks, case)


def _kernel(name: str) -> Any:
    return importlib.import_module(f"pallas_kernels.scale_attention.{name}.attention")


def finalists(tried: Sequence[Trial]) -> list[Any]:
    """What is to be timed again, as the best of many times is partly luck: the first blocks, the best, and both joined.

    Joined are the fields in which blocks that beat the first ones differ from them, each as the fastest has it: blocks
    of several kernels are tried one kernel at a time.
    """
    first, *others = tried
    right = sorted((trial for trial in others if trial.row.right), key=lambda trial: trial.seconds)
    if first.row.right:
        right = [trial for trial in right if trial.seconds < first.seconds]
    changes: dict[str, Any] = {}
    for trial in right:
        fields = {field.name: getattr(trial.blocks, field.name) for field in dataclasses.fields(trial.blocks)}
        changes = {name: new for name, new in fields.items() if new != getattr(first.blocks, name)} | changes
    joined = dataclasses.replace(first.blocks, **changes)
    return list(dict.fromkeys([first.blocks, *(trial.blocks for trial in right[:1]), joined]))


def verdict(last: Sequence[Trial], entry: str) -> str:
    """Of the finalists, the blocks in use first: what to paste as the table's `entry`, or that those in use stay."""
    used, *others = last
    right = [trial for trial in others if trial.row.right]
    if not right:
        return f"Nothing right beats what is in use, {used.blocks}."
    best = min(right, key=lambda trial: trial.seconds)
    if not used.row.right:
        return f"What is in use, {used.blocks}, does not work here; use\n{entry} = {best.blocks}"
    mine, theirs = used.row.times["both"], best.row.times["both"]
    times = f"{1e3 * mine.median:.4g} → {1e3 * theirs.median:.4g} ms forward and backward"
    if theirs.high >= mine.low:
        return f"What is in use is best within the noise ({times} at best): {used.blocks}."
    gain = mine.median / theirs.median - 1
    return f"{gain:.1%} faster ({times}): replace {used.blocks} by\n{entry} = {best.blocks}"


def line(trial: Trial, used: Trial) -> str:
    """A trial next to the blocks in use, for a terminal."""
    row = trial.row
    if row.absent is not None:
        return f"{'absent':>9}  {'':>16}  {trial.blocks}: {row.absent}"
    time = row.times["both"]
    ratio = f"{trial.seconds / used.seconds:.3f}" if row.right and used.row.times else ""
    spread = f"{1e3 * time.median:.4g} ± {1e3 * (time.high - time.low) / 2:.1g} ms"
    return f"{ratio if row.right else 'wrong':>9}  {spread:>16}  {trial.blocks}"
