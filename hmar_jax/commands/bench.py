"""`hmar-jax bench`: what runs here → how fast, next to its bound and its peers."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hmar_jax.commands import options
from hmar_jax.commands.options import LocalPath, PathOrName
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.errors import InputError, shown
from hmar_jax.scales import Pattern

MOST = 2**16  # of a batch, of heads, of repeats: beyond any device, and within XLA's sizes


def run(argv: Sequence[str]) -> None:
    """Runs one of the benchmarks, each of which writes its rows as it goes, so that they outlive a crash."""
    parser = Parser(prog="hmar-jax bench", description="Measure speed.")
    benchmarks = parser.add_subparsers(required=True, metavar="what")
    add_attention(benchmarks)
    add_train(benchmarks)
    add_sample(benchmarks)
    args = parser.parse_args(argv)
    args.run(args)


def add_attention(benchmarks: Any) -> None:
    """The arguments of `bench attention`."""
    what = "scale attention and its peers: forward, backward and both, against the bounds of this device"
    parser = benchmarks.add_parser("attention", help=what, description=f"Measure {what}.")
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
    _add_common(parser, "attention.{json,md,png}", repeats=20)


def add_train(benchmarks: Any) -> None:
    """The arguments of `bench train`."""
    what = "a train step: time, utilisation, memory, and what the time goes into"
    parser = benchmarks.add_parser("train", help=what, description=f"Measure {what}.")
    parser.set_defaults(run=train)
    parser.add_argument("--config", action=PathOrName, help=f"{options.CONFIG}; instead of --image and --model")
    parser.add_argument(
        "--image", help="pixels: 256, 512 or 1024; with --model, by default the four published settings"
    )
    parser.add_argument("--model", help="d16, d20, d24 or d30 (stage next_scale)")
    parser.add_argument("--batch", type=int, help="of examples")
    _add_common(parser, "train.{json,md}", repeats=10)


def add_sample(benchmarks: Any) -> None:
    """The arguments of `bench sample`."""
    what = "sampling, label to picture: time, memory, and what the time goes into"
    parser = benchmarks.add_parser("sample", help=what, description=f"Measure {what}.")
    parser.set_defaults(run=sample)
    parser.add_argument("--model-dir", action=PathOrName, help="a model directory, instead of --image and --model")
    parser.add_argument(
        "--image", help="pixels: 256, 512 or 1024; with --model, by default the five published settings"
    )
    parser.add_argument("--model", help="d16, d20, d24 or d30")
    parser.add_argument("--batch", type=int, help="of pictures")
    parser.add_argument("--var", action="store_true", help="VAR, with its key-value cache, instead of HMAR")
    _add_common(parser, "sample.{json,md}", repeats=10)


def _add_common(parser: argparse.ArgumentParser, files: str, repeats: int) -> None:
    parser.add_argument("--repeats", type=int, default=repeats, help="of each time (default: %(default)s)")
    default = Path("runs/bench")
    parser.add_argument("--output", action=LocalPath, default=default, help=f"folder for {files} (default: {default})")


def attention(args: argparse.Namespace) -> None:
    """`bench attention`: a table a setting, and a plot of all; with `--tune`, times of tiles instead."""
    _check_counts(args, "heads", "head_size")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX starts: PyTorch shares the card

    from hmar_jax.bench import attention, measurements
    from pallas_kernels.scale_attention.bench import table, times

    on_cpu = _is_cpu()
    settings = attention_settings(args, on_cpu)
    ours, peers = attention.parse_implementations(args.implementations), attention.parse_peers(args.peers)
    if on_cpu:
        attention.check_fit(settings)
    if args.tune:
        for setting in settings:
            for name in attention.kernels_to_tune(setting, None if args.implementations is None else ours):
                say(f"{name}, {setting}; × what is in use, forward and backward:", flush=True)
                say(f"{attention.tune(name, setting, args.repeats)}\n", flush=True)
        return
    endings = (".json", ".md", ".png")
    *files, plot = measurements.prepare_reports(args.output, "attention", "# Scale attention on", endings)
    if on_cpu and not args.pixels + args.sides:
        say("There is no accelerator here, hence a small setting; see --pixels, --sides, --batch and --heads.")
    rates = times.measure_rates(settings[0].dtype, args.repeats)
    speed = attention.speed(settings[0].dtype, rates)
    say(f"{measurements.device_name()}: {speed}\n{table.LEGEND}\n", flush=True)
    panels = attention.measure_all(settings, ours, peers, args.repeats, rates, args.output)
    _say_files([*files, *_draw(panels, plot)])


def attention_settings(args: argparse.Namespace, on_cpu: bool) -> list[Any]:
    """What the options of `bench attention` name."""
    from hmar_jax.bench import attention

    given = {name: getattr(args, name) for name in ("batch", "heads", "head_size", "dtype", "pattern", "norm")}
    return attention.settings(args.pixels, args.sides, **given, on_cpu=on_cpu)


def train(args: argparse.Namespace) -> None:
    """`bench train`: a row a setting."""
    _check_counts(args)

    from hmar_jax.bench import measurements, train

    rows = train.settings(args.config, args.image, args.model, args.batch, _is_cpu())
    files = measurements.prepare_reports(args.output, "train", "# Training on")
    if _is_cpu() and not (args.config or args.image):
        say("There is no accelerator here, hence a small setting; see --image, --model and --config.")
    rate = train.matmul_rate(rows, args.repeats)
    say(f"{train.title(rate)}\n{train.LEGEND}\n", flush=True)
    train.measure_all(rows, args.repeats, rate, args.output)
    _say_files(files)


def sample(args: argparse.Namespace) -> None:
    """`bench sample`: a row a setting."""
    _check_counts(args)

    from hmar_jax.bench import measurements, sample

    rows = sample.settings(args.model_dir, args.image, args.model, args.batch, args.var, _is_cpu())
    files = measurements.prepare_reports(args.output, "sample", "# Sampling on")
    if _is_cpu() and not (args.model_dir or args.image):
        say("There is no accelerator here, hence a small setting; see --image, --model and --model-dir.")
    rates = sample.measure_rates(args.repeats)
    say(f"{sample.title(rates)}\n{sample.LEGEND}\n", flush=True)
    sample.measure_all(rows, args.repeats, rates, args.output)
    _say_files(files)


def _check_counts(args: argparse.Namespace, *names: str) -> None:
    """InputError where --batch, --repeats or another of these options is given and out of range."""
    for name in ("batch", "repeats", *names):
        number = getattr(args, name)
        if number is not None and not 1 <= number <= MOST:
            raise InputError(f"--{name.replace('_', '-')} is {shown(number)}; expected a whole number, 1 to {MOST}.")


def _is_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def _draw(panels: Sequence[Any], path: Path) -> list[Path]:
    """Writes the plot, or says why there is none."""
    from hmar_jax import images, plots

    if not panels:
        say("Nothing right was measured, so there is no plot.")
        return []
    try:
        return [images.save_png(plots.bars(panels, 2, "ms"), path)]
    except InputError as problem:  # matplotlib is optional
        print(f"There is no plot: {problem}", file=sys.stderr)
        return []


def _say_files(files: Iterable[Path]) -> None:
    say(f"The same is in {', '.join(map(str, files))}")
