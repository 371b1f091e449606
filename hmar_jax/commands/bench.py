"""`hmar-jax bench`: what runs here → how fast, next to its bound and its peers."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tqdm

from hmar_jax.bench.measurements import check_counts, check_memory, check_reports, versions
from hmar_jax.bench.sample import add_sample
from hmar_jax.bench.train import add_train
from hmar_jax.commands.options import LocalPath
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.errors import InputError, printable, shown
from hmar_jax.files import note_replaced, write_whole, writing
from hmar_jax.scales import Pattern, ScaleLadder

PUBLISHED = {"256": (64, 16), "512": (16, 24), "1024": (2, 24)}  # sides → batch, heads
ON_A_CPU = {"128": (2, 4)}
REPEATS = 20


def run(argv: Sequence[str]) -> None:
    """Runs one of the benchmarks."""
    parser = Parser(prog="hmar-jax bench", description="Measure speed.")
    subparsers = parser.add_subparsers(required=True, metavar="what")
    add_attention(subparsers)
    add_train(subparsers)
    add_sample(subparsers)
    args = parser.parse_args(argv)
    args.run(args)


def add_attention(subparsers: Any) -> None:
    """The arguments of `bench attention`."""
    what = "scale attention and its peers: forward, backward and both, against the bounds of this device"
    parser = subparsers.add_parser("attention", help=what, description=f"Measure {what}.")
    parser.set_defaults(run=attention)
    parser.add_argument(
        "--pixels",
        action="append",
        default=[],
        help="256, 512, 1024: a published ladder; may be repeated; by default those three, without an accelerator the "
        "one of 128 pixels, which takes less than a minute",
    )
    parser.add_argument(
        "--sides", action="append", default=[], help="of the token maps instead, such as 1,2,3,4 or 16; may be repeated"
    )
    parser.add_argument("--batch", type=int, help="sequences; by default as published for the ladder, else 16")
    parser.add_argument("--heads", type=int, help="by default as published for the ladder, else 16")
    parser.add_argument("--head-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="by default bfloat16, without an accelerator float32",
    )
    parser.add_argument(
        "--pattern", default="block_diagonal", choices=typing.get_args(Pattern), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--norm", action=argparse.BooleanOptionalAction, help="QK-norm; by default both without and with it"
    )
    parser.add_argument("--implementations", help="of ours, such as xla,reference; by default all that can run")
    parser.add_argument("--peers", help="of others, by how their names start, such as flex,cudnn; none; by default all")
    parser.add_argument(
        "--tune", action="store_true", help="time sizes of tiles of the kernel that runs here (or --implementations)"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each time (default: %(default)s)")
    parser.add_argument(
        "--output",
        action=LocalPath,
        default=Path("runs/bench"),
        help="folder for attention.{json,md,png} (default: %(default)s)",
    )


def attention(args: argparse.Namespace) -> None:
    """Prints a table a setting and writes all to a folder as it goes, so that what was measured outlives a crash."""
    check_counts(args, "heads", "head_size")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX starts: PyTorch shares the card

    import jax

    from pallas_kernels.scale_attention import bench, bench_table

    on_cpu = jax.default_backend() == "cpu"
    settings = attention_settings(args, on_cpu)
    ours, peers = parse_implementations(args.implementations), parse_peers(args.peers)
    for setting in settings if on_cpu else ():  # q, k, v and what comes out, in float32 for the truth
        size = setting.batch * setting.ladder.length * setting.heads * setting.head_size
        check_memory(4 * size, printable(str(setting), 200))
    if args.tune:
        for setting in settings:
            for name in kernels_to_tune(setting, None if args.implementations is None else ours):
                tune(name, setting, args.repeats)
        return
    check_reports(args.output, "attention", "# Scale attention on", (".json", ".md", ".png"))
    with writing(args.output):  # better now than after all the measuring
        args.output.mkdir(parents=True, exist_ok=True)
    note_replaced(args.output / f"attention{ending}" for ending in (".json", ".md", ".png"))
    device = jax.devices()[0].device_kind if not on_cpu else f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    if on_cpu and not args.pixels + args.sides:
        say("There is no accelerator here, hence a small setting; see --pixels, --sides, --batch and --heads.")
    rates = bench.measure_rates(settings[0].dtype, args.repeats)
    speed = f"copies {rates.copy / 1e9:.4g} GB/s, multiplies {rates.matmul / 1e12:.3g} TFLOP/s in {settings[0].dtype}"
    say(f"{device}: {speed}\n{bench_table.LEGEND}\n", flush=True)
    report: dict[str, Any] = {"device": device, "versions": versions(), "rates": vars(rates), "settings": []}
    pages = [f"# Scale attention on {device}\n\nIt {speed}; the bounds follow from these. {bench_table.LEGEND}\n"]
    panels: list[Any] = []
    with tqdm.tqdm(total=len(settings) * len([*ours, *peers]), desc="attention", disable=None, leave=False) as bar:
        for setting in settings:
            rows: list[Any] = []
            report["settings"].append(None)
            pages.append("")
            try:
                for row in bench.measure_all(setting, ours, peers, args.repeats):
                    rows.append(row)
                    bar.update(row.name in ours or row.name in peers)
                    report["settings"][-1] = bench_table.as_json(setting, rows, rates)
                    pages[-1] = bench_table.table(setting, rows, rates, markdown=True)
                    write_whole(args.output / "attention.json", (json.dumps(report, indent=1) + "\n").encode())
                    write_whole(args.output / "attention.md", "\n".join(pages).encode())
            except jax.errors.JaxRuntimeError as error:  # of inputs and truth; a row has its own
                raise _unprepared(setting, error) from None
            bar.write(bench_table.table(setting, rows, rates))
            panels.extend(attention_panels(setting, rows, rates))
    files = [args.output / "attention.json", args.output / "attention.md"]
    files += draw(panels, args.output / "attention.png")
    say(f"The same is in {', '.join(map(str, files))}")


def attention_settings(args: argparse.Namespace, on_cpu: bool) -> list[Any]:
    """What to measure: the arguments, filled up with what is published or small."""
    from pallas_kernels.scale_attention.bench import Setting

    usual, other = (ON_A_CPU, (2, 4)) if on_cpu else (PUBLISHED, (16, 16))
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    ladders = [(ScaleLadder.preset(pixels), *usual.get(pixels, other)) for pixels in args.pixels]
    ladders += [(ScaleLadder.parse(sides), *other) for sides in args.sides]
    ladders = ladders or [(ScaleLadder.preset(pixels), *shape) for pixels, shape in usual.items()]
    norms = (False, True) if args.norm is None else (args.norm,)
    return [
        Setting(ladder, args.batch or batch, args.heads or heads, args.head_size, dtype, args.pattern, norm)
        for (ladder, batch, heads), norm in itertools.product(ladders, norms)
    ]


def parse_implementations(text: str | None) -> list[str]:
    """Names out of `xla,reference`; all of ours for None."""
    from pallas_kernels.scale_attention import api

    known = typing.get_args(api.Implementation)
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"--implementations names {shown(name)}; expected some of {','.join(known)}.")
    return names


def parse_peers(text: str | None) -> list[str]:
    """Names that start as those in `flex,cudnn` do; all for None, none for `none`."""
    from pallas_kernels.scale_attention.bench_peers import PEERS

    if text is None or text == "none":
        return [] if text else list(PEERS)
    found: list[str] = []
    for start in text.split(","):
        names = [name for name in PEERS if name.casefold().startswith(start.strip().casefold())]
        if not start.strip() or not names:
            raise InputError(f"--peers names {shown(start)}; expected none, or beginnings of {'; '.join(PEERS)}.")
        found += [name for name in names if name not in found]
    return found


def kernels_to_tune(setting: Any, wanted: Sequence[Any] | None) -> list[str]:
    """Those wanted, or what a setting runs as here; InputError if that is no kernel, or one that cannot run here."""
    import jax

    from pallas_kernels.scale_attention import api

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


def tune(name: str, setting: Any, repeats: int) -> None:
    """Prints each size of tiles with its time as it is measured, then an entry for the kernel's table, if better."""
    import jax

    from pallas_kernels.scale_attention import bench, bench_tune

    say(f"{name}, {setting}; × what is in use, forward and backward:", flush=True)
    try:
        case = bench.make_case(setting)
    except jax.errors.JaxRuntimeError as error:  # of inputs and truth; blocks have their own
        raise _unprepared(setting, error) from None
    blocks, tried = bench_tune.candidates(name, setting), []
    with tqdm.tqdm(total=len(blocks), desc=f"tuning {name}", disable=None, leave=False) as bar:
        for trial in bench_tune.trials(name, case, blocks, repeats):
            tried.append(trial)
            bar.update()
            bar.write(bench_tune.line(trial, tried[0]))
        last = list(bench_tune.trials(name, case, bench_tune.finalists(tried), repeats))
    say(f"{bench_tune.verdict(last, bench_tune.table_entry(name, setting))}\n", flush=True)


def _unprepared(setting: Any, error: Exception) -> InputError:
    said = printable(str(error).partition("\n")[0], 100)
    return InputError(f"This device cannot prepare {setting} ({said}); choose a smaller --batch.")


def attention_panels(setting: Any, rows: Sequence[Any], rates: Any) -> list[Any]:
    """Panels of `plots.bars`, forward and backward, of what is right; none where nothing is."""
    panels = []
    for name in ("forward", "backward"):
        bars = sorted((1e3 * row.times[name].median, row.name, row.ours) for row in rows if row.right)
        norm = ", QK-norm" if setting.norm else ""
        title = f"{name}, N={setting.ladder.length} B={setting.batch} H={setting.heads}{norm}"
        lengths = [(which, length, ours) for length, which, ours in bars]
        if lengths:
            panels.append((title, lengths, 1e3 * rates.bound(setting, name)))
    return panels


def draw(panels: Sequence[Any], path: Path) -> list[Path]:
    """Writes the plot, or says why there is none: a row a setting, forward beside backward."""
    from hmar_jax import images, plots

    if not panels:
        say("Nothing right was measured, so there is no plot.")
        return []
    try:
        return [images.save_png(plots.bars(panels, 2, "ms"), path)]
    except InputError as problem:  # matplotlib is optional
        print(f"There is no plot: {problem}", file=sys.stderr)
        return []
