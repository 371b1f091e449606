"""Settings of scale attention → each implementation and peer timed against the bounds of this device; tiles tuned."""

from __future__ import annotations

import contextlib
import json
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm

from hmar_jax.bench.measurements import check_memory, device_name, versions
from hmar_jax.errors import InputError, printable, shown
from hmar_jax.files import write_whole
from hmar_jax.scales import Pattern, ScaleLadder
from pallas_kernels.scale_attention import api
from pallas_kernels.scale_attention.bench import cases, table, times, tuning
from pallas_kernels.scale_attention.bench.cases import Setting
from pallas_kernels.scale_attention.bench.peers import PEERS
from pallas_kernels.scale_attention.bench.times import Rates, Row

PUBLISHED = {"256": (64, 16), "512": (16, 24), "1024": (2, 24)}  # sides → batch, heads
ON_A_CPU = {"128": (2, 4)}


def settings(
    pixels: Sequence[str],
    sides: Sequence[str],
    *,
    batch: int | None = None,
    heads: int | None = None,
    head_size: int = 64,
    dtype: str | None = None,
    pattern: Pattern = "block_diagonal",
    norm: bool | None = None,
    on_cpu: bool,
) -> list[Setting]:
    """What to measure: the arguments, None filled up with what is published, on a CPU with what is small.

    Args:
      pixels, sides: published and other ladders; the usual ones where both are empty. norm: QK-norm; None for both.
    """
    usual, other = (ON_A_CPU, (2, 4)) if on_cpu else (PUBLISHED, (16, 16))
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    ladders = [(ScaleLadder.preset(size), *usual.get(size, other)) for size in pixels]
    ladders += [(ScaleLadder.parse(text), *other) for text in sides]
    ladders = ladders or [(ScaleLadder.preset(size), *shape) for size, shape in usual.items()]
    return [
        Setting(ladder, batch or usual_batch, heads or usual_heads, head_size, dtype, pattern, with_norm)
        for ladder, usual_batch, usual_heads in ladders
        for with_norm in ((False, True) if norm is None else (norm,))
    ]


def check_fit(settings: Sequence[Setting]) -> None:
    """InputError where a CPU's memory does not hold q, k, v and what comes out, in float32 for the truth."""
    for setting in settings:
        size = setting.batch * setting.ladder.length * setting.heads * setting.head_size
        check_memory(4 * size, printable(str(setting), 200))


def parse_implementations(text: str | None) -> list[str]:
    """Names out of `xla,reference`; all of ours for None."""
    known = typing.get_args(api.Implementation)
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"--implementations names {shown(name)}; expected some of {','.join(known)}.")
    return names


def parse_peers(text: str | None) -> list[str]:
    """Names that start as those in `flex,cudnn` do; all for None, none for `none`."""
    if text is None or text == "none":
        return [] if text else list(PEERS)
    found: list[str] = []
    for start in text.split(","):
        names = [name for name in PEERS if name.casefold().startswith(start.strip().casefold())]
        if not start.strip() or not names:
            raise InputError(f"--peers names {shown(start)}; expected none, or beginnings of {'; '.join(PEERS)}.")
        found += [name for name in names if name not in found]
    return found


def speed(dtype: str, rates: Rates) -> str:
    """What a device does in a second."""
    return f"copies {rates.copy / 1e9:.4g} GB/s, multiplies {rates.matmul / 1e12:.3g} TFLOP/s in {dtype}"


def measure_all(
    settings: Sequence[Setting], ours: Sequence[str], peers: Sequence[str], repeats: int, rates: Rates, folder: Path
) -> list[Any]:
    """Prints a table a setting and writes all to a folder as it goes, so that what was measured outlives a crash.

    Args:
      ours, peers: names of implementations. folder: of attention.json and attention.md; it exists.

    Returns:
      The panels of a plot (`plots.bars`): forward beside backward for each setting, of what is right.

    Raises:
      InputError: the device has no memory for a setting's inputs.
    """
    device = device_name()
    report: dict[str, Any] = {"device": device, "versions": versions(), "rates": vars(rates), "settings": []}
    said = speed(settings[0].dtype, rates)
    pages = [f"# Scale attention on {device}\n\nIt {said}; the bounds follow from these. {table.LEGEND}\n"]
    panels: list[Any] = []
    with tqdm.tqdm(total=len(settings) * len([*ours, *peers]), desc="attention", disable=None, leave=False) as bar:
        for setting in settings:
            rows: list[Row] = []
            report["settings"].append(None)
            pages.append("")
            with _preparing(setting):
                for row in times.measure_all(setting, ours, peers, repeats):
                    rows.append(row)
                    bar.update(row.name in ours or row.name in peers)
                    report["settings"][-1] = table.as_json(setting, rows, rates)
                    pages[-1] = table.render(setting, rows, rates, markdown=True)
                    write_whole(folder / "attention.json", (json.dumps(report, indent=1) + "\n").encode())
                    write_whole(folder / "attention.md", "\n".join(pages).encode())
            bar.write(table.render(setting, rows, rates))
            panels.extend(_panels(setting, rows, rates))
    return panels


def _panels(setting: Setting, rows: Sequence[Row], rates: Rates) -> list[Any]:
    panels = []
    for name in ("forward", "backward"):
        bars = sorted((1e3 * row.times[name].median, row.name, row.ours) for row in rows if row.right)
        norm = ", QK-norm" if setting.norm else ""
        title = f"{name}, N={setting.ladder.length} B={setting.batch} H={setting.heads}{norm}"
        if bars:
            lengths = [(which, length, ours) for length, which, ours in bars]
            panels.append((title, lengths, 1e3 * rates.bound(setting, name)))
    return panels


def kernels_to_tune(setting: Setting, wanted: Sequence[Any] | None) -> list[str]:
    """Those wanted, or what a setting runs as here; InputError if that is no kernel, or one that cannot run here."""
    q = jax.ShapeDtypeStruct((setting.batch, setting.ladder.length, setting.heads, setting.head_size), setting.dtype)
    try:
        names = [api.choose(q, setting.ladder.length, name) for name in wanted or (None,)]
    except ValueError as problem:
        raise InputError(str(problem)) from None
    for name in names:
        if name in ("xla", "reference"):
            kind = jax.devices()[0].device_kind
            raise InputError(f"There is no kernel to tune here: {setting} runs as {name!r} on {kind}.")
    return list(names)


def tune(name: str, setting: Setting, repeats: int) -> str:
    """Prints each size of tiles with its time as it is measured; returns an entry for the kernel's table, if better."""
    with _preparing(setting):  # blocks have an error of their own
        case = cases.make_case(setting)
    blocks, tried = tuning.candidates(name, setting), []
    with tqdm.tqdm(total=len(blocks), desc=f"tuning {name}", disable=None, leave=False) as bar:
        for trial in tuning.trials(name, case, blocks, repeats):
            tried.append(trial)
            bar.update()
            bar.write(tuning.line(trial, tried[0]))
        last = list(tuning.trials(name, case, tuning.finalists(tried), repeats))
    return tuning.verdict(last, tuning.table_entry(name, setting))


@contextlib.contextmanager
def _preparing(setting: Setting) -> Iterator[None]:
    """Turns what JAX raises of inputs and their truth into an InputError; implementations report their own."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = printable(str(error).partition("\n")[0], 100)
        raise InputError(f"This device cannot prepare {setting} ({said}); choose a smaller --batch.") from None
