"""Options that several commands share, and how options that are paths are read. Importing this needs no JAX."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hmar_jax.files import local_path
from hmar_jax.sampling.presets import ORDERS

if TYPE_CHECKING:
    from hmar_jax.sampling.schedule import Changes

SCHEDULE = (
    "name of a schedule that the model itself recommends, or else of a preset; a .json file; or a curve and its steps "
    "such as cosine:4@5-9 (scales from 1)"
)
SIDES = "of the token maps, coarse to fine, such as 1,2,3,4; or 256, the published ladder for so many pixels"
CONFIG = "config file, or the name of an installed config such as glyphs_tokenizer or imagenet256_d16:masked"
MODEL = "model directory, or id on the Hugging Face hub"


class LocalPath(argparse.Action):
    """An option that is a path of this machine: `add_argument("--output", action=LocalPath)` gives a `Path`.

    An action and not a `type`, because argparse would turn the sentence of a `type`'s error into one of its own.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, local_path(values, option_string or self.dest))


class PathOrName(LocalPath):
    """An option that is a path of this machine or a name, such as a hub id, a preset or FILE:ARGUMENT; gives the text.

    It is checked as a `LocalPath`, but stays as it is written: `./a/b` is a path, while `a/b` may be a hub id. What
    takes it for a path expands its `~`.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, values)


def add_config(parser: argparse.ArgumentParser, what: str = "") -> None:
    """Adds a train config, whose fields `--config.FIELD=VALUE` changes. what: what the help says it is for."""
    parser.add_argument("--config", required=True, action=PathOrName, metavar="FILE|NAME", help=CONFIG + what)


def parse_overrides(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those of the form `--config.FIELD=VALUE`."""
    args, overrides = parser.parse_known_args(argv)
    for override in overrides:
        if not override.startswith("--config.") or "config" not in args:
            parser.error(f"unrecognized argument: {override}")
    return args, overrides


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model to sample from, and its revision."""
    parser.add_argument("--model", required=True, action=PathOrName, help=MODEL)
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")


def add_schedule(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds a schedule, and what changes it. default: the schedule where neither user nor model says one."""
    what = f"{SCHEDULE} (default: the model's own `default`, or else {default})"
    parser.add_argument("--schedule", action=PathOrName, help=what)
    add_changes(parser)


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Adds the options that change a schedule, one for each that `Schedule.replace` takes."""
    parser.add_argument("--cfg", type=float, help="guidance of next-scale passes; the schedule's by default")
    parser.add_argument("--refine-cfg", type=float, help="guidance of masked passes; the schedule's, mostly none")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--noise", type=float, help="noise on the order of commitment by confidence")
    parser.add_argument("--order", choices=ORDERS, help="of commitment; the schedule's by default")


def changes(args: argparse.Namespace) -> Changes:
    """What the options of `add_changes` ask for, None where they are not given."""
    asked: Any = {
        name: getattr(args, name) for name in ("cfg", "temperature", "top_k", "top_p", "noise", "refine_cfg", "order")
    }
    return asked


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds what `join` takes."""
    several = parser.add_argument_group(
        "several processes", "TPU pods and Slurm jobs are recognised; elsewhere give the first three, to every process."
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="an address of process 0, and a free port there")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    several.add_argument("--no-distributed", action="store_true", help="run with this process's devices alone")


def join_processes(args: argparse.Namespace) -> None:
    """Makes this process a part of its job, before anything asks JAX for devices."""
    from hmar_jax.parallel import processes

    if not args.no_distributed:
        processes.join(args.coordinator, args.processes, args.process)
