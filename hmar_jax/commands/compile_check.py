"""`hmar-jax compile-check`: config + devices that are not here → does it fit there, and how fast could it be."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tqdm

from hmar_jax.commands import options
from hmar_jax.commands.options import LocalPath
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.compile_check import ENVIRONMENT
from hmar_jax.config import TrainConfig, load
from hmar_jax.errors import InputError, shown
from hmar_jax.files import check_files, check_kind, json_files, note_replaced, write_whole

MOST_PICTURES = 2**16  # of one sampler; more than any memory holds, and few enough for XLA's sizes


def run(argv: Sequence[str]) -> None:
    """Compiles, prints a report, and exits with 1 where a program does not fit."""
    parser = Parser(
        prog="hmar-jax compile-check",
        description="Compile a stage's train step and sampler for TPUs or an H200 that need not be here, and report "
        "memory, largest arrays, collectives, FLOPs and the time that a step takes at least. Exits with 1 where "
        "something does not fit. No data and no weights are read: what is in init_from is told by its config.json or, "
        "where that is not here, by sides, tokenizer and, in stage masked, transformer of the config.",
        epilog="Any field of the config can be set: --config.mesh.fsdp=8 --config.remat=all "
        "--config.sides='(1,2,3,4,6,9,13,18,24,32)'",
    )
    options.add_config(parser)
    parser.add_argument(
        "--topology", required=True, help="such as v5e:16x16, v5p:4x4x8, v6e:8x8, v5e:16x16*2 (slices), h200, h200:8"
    )
    parser.add_argument(
        "--sample-batch",
        type=int,
        help="pictures that the sampler draws; as many as the config's sample_labels by default, 0 for no sampler",
    )
    parser.add_argument(
        "--output", action=LocalPath, help="a .json file for all figures, or a .md file for a table of them"
    )
    args, overrides = options.parse_overrides(parser, argv)
    if args.output is not None and args.output.suffix.lower() not in (".json", ".md"):
        raise InputError(f"--output is {args.output}; expected a file that ends in .json or .md.")
    if args.sample_batch is not None and not 0 <= args.sample_batch <= MOST_PICTURES:
        raise InputError(
            f"--sample-batch is {shown(args.sample_batch)}; expected pictures, at most {MOST_PICTURES}, or 0 for no "
            "sampler."
        )
    if args.output is not None:
        check_files("--output", [args.output])
        check_kind("--output", args.output, _is_report, "a report of compile-check")
    config = load(args.config, overrides)
    if not check(args, config):
        sys.exit(1)


def check(args: argparse.Namespace, config: TrainConfig) -> bool:
    """Compiles and reports; whether everything fits."""
    os.environ.update(ENVIRONMENT)

    from hmar_jax.compile_check import programs, report
    from hmar_jax.compile_check.topology import open_topology

    topology = open_topology(args.topology)
    setup = programs.prepare(config, topology)
    pictures = sampled(args.sample_batch, config, setup.ways)
    found = []
    with tqdm.tqdm(total=1 + bool(pictures), desc="compiling", disable=None, leave=False) as bar:
        step = programs.compile_lowered(programs.lower_train_step(setup))
        found.append(report.report(setup, topology, step))
        bar.update()
        if pictures:
            sampler = programs.compile_lowered(programs.lower_sampler(setup, pictures))
            found.append(report.report(setup, topology, sampler, pictures))
            bar.update()
    advice = [] if found[0].fits else report.remedies(setup, topology, found[0].memory.total)
    say(report.text(setup, topology, found, advice))
    if args.output is not None:
        content = report.markdown(setup, topology, found, Path(args.config).stem)
        if args.output.suffix.lower() == ".json":
            content = json.dumps(report.as_json(setup, topology, found, advice), indent=1) + "\n"
        note_replaced([args.output])
        write_whole(args.output, content.encode())
    return all(program.fits for program in found)


def _is_report(content: bytes) -> bool:
    if content.startswith(b"| config | topology |"):
        return True
    return {"topology", "programs"} <= json_files.parse(content, "It", "write it again").keys()


def sampled(asked: int | None, config: TrainConfig, ways: int) -> int:
    """Pictures that the sampler draws: the config's, or as many as asked for, a multiple of the devices' parts."""
    if config.stage == "tokenizer":
        return 0
    count = (len(config.sample_labels) if config.sample_every else 0) if asked is None else asked
    return -(-count // ways) * ways
