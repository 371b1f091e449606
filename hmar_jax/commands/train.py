"""`hmar-jax train`: config file + overrides → a trained stage in a work directory."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from hmar_jax.commands import options
from hmar_jax.commands.options import LocalPath
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.config import load
from hmar_jax.errors import shown
from hmar_jax.files import check_outputs


def run(argv: Sequence[str]) -> None:
    """Trains, or goes on training, one stage."""
    parser = Parser(
        prog="hmar-jax train",
        description="Train one stage. Running again with the same work directory resumes.",
        epilog="Any field of the config can be set: --config.batch_size=32 --config.optimizer.base_lr=2e-4",
    )
    options.add_config(parser)
    parser.add_argument("--workdir", required=True, action=LocalPath, help="where checkpoints, metrics and samples go")
    parser.add_argument(
        "--profile", type=_steps, default=range(0), metavar="FIRST:LAST", help="trace these steps into WORKDIR/profile"
    )
    options.add_processes(parser)
    args, overrides = options.parse_overrides(parser, argv)
    config = load(args.config, overrides)
    check_outputs("--workdir", [args.workdir / "model"], {"init_from": config.init_from})

    from hmar_jax.parallel import processes
    from hmar_jax.training.loop import train

    options.join_processes(args)
    model = train(config, args.workdir, profile=args.profile)
    if model is not None and processes.is_first():
        say(f"Trained. The model is in {args.workdir / 'model'}")


def _steps(text: str) -> range:
    """`100:110` → the steps from 100 to 110."""
    ends = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if ends is None or not 0 < int(ends[1]) <= int(ends[2]):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not FIRST:LAST, such as 100:110")
    return range(int(ends[1]), int(ends[2]) + 1)
