"""Options of the commands that several processes run together."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `join` takes."""
    several = parser.add_argument_group(
        "several processes", "TPU pods and Slurm jobs are recognised; elsewhere give the first three, to every process."
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="an address of process 0, and a free port there")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    several.add_argument("--no-distributed", action="store_true", help="run with this process's devices alone")


def join(args: argparse.Namespace) -> None:
    """Makes this process a part of its job, before anything asks JAX for devices."""
    from hmar_jax.training import distributed

    if not args.no_distributed:
        distributed.join(args.coordinator, args.processes, args.process)
