"""`hmar-jax export`: work directory → model directory; pictures + tokenizer → token cache; model → PyTorch file."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import typing
from collections.abc import Sequence
from pathlib import Path

from hmar_jax.commands import options
from hmar_jax.commands.options import LocalPath, PathOrName
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.config import DataConfig, Kind, load
from hmar_jax.config.loading import find
from hmar_jax.errors import InputError, device_memory
from hmar_jax.files import check_outputs


def run(argv: Sequence[str]) -> None:
    """Writes what `export model`, `export tokens` or `export torch` names."""
    parser = Parser(
        prog="hmar-jax export", description="Write a model directory, a token cache or an official PyTorch checkpoint."
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    model = kinds.add_parser("model", help="the newest checkpoint of a training run as a model directory")
    model.add_argument("--workdir", required=True, action=LocalPath, help="of the training run")
    model.add_argument(
        "--init-from",
        default="",
        action=PathOrName,
        help="where the model that the run started from is now, if it or the run was moved",
    )
    model.add_argument("--output", required=True, action=LocalPath, help="model directory to write; must not exist")
    tokens = kinds.add_parser("tokens", help="pictures as tokens, for the two transformer stages to train from")
    tokens.add_argument(
        "--model", required=True, action=PathOrName, help="model directory or hub id, with the tokenizer"
    )
    options.add_config(tokens, "; its `data` names the pictures")
    tokens.add_argument("--crops", type=int, default=1, help="versions of each picture (default: %(default)s)")
    tokens.add_argument("--count", type=int, help="pictures to take; all by default, needed for glyphs")
    tokens.add_argument("--batch-size", type=int, help="pictures at a time on each device (default: by their size)")
    tokens.add_argument("--seed", type=int, default=0, help="of crops and flips")
    tokens.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the encoder (default: %(default)s)"
    )
    tokens.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out pictures that cannot be read; the cache's broken.txt has them",
    )
    tokens.add_argument("--output", required=True, action=LocalPath, help="cache to write; running again goes on")
    options.add_processes(tokens)
    torch = kinds.add_parser("torch", help="a model directory in the layout of the official PyTorch code")
    torch.add_argument("--model", required=True, action=PathOrName, help="model directory or hub id")
    torch.add_argument(
        "--kind",
        dest="layout",
        choices=typing.get_args(Kind),
        help="vae for the tokenizer; by default the transformer as it was converted, or as what it is",
    )
    torch.add_argument("--output", required=True, action=LocalPath, help=".safetensors or .pth file; must not exist")
    args, overrides = options.parse_overrides(parser, argv)
    if args.kind == "model":
        _export_model(args.workdir, args.output, args.init_from)
    elif args.kind == "torch":
        _export_torch(args.model, args.output, args.layout)
    else:
        _export_tokens(args, load(args.config, overrides).data)


def _export_model(workdir: Path, output: Path, init_from: str) -> None:
    from hmar_jax.training.trained import load_trained

    check_outputs("--output", [output], {"--workdir": workdir, "--init-from": init_from})
    if output.exists():
        raise InputError(f"{output} exists already; remove it, or choose another output directory.")
    say(f"The model is in {load_trained(workdir, init_from).save(output)}")


def _export_torch(model: str, output: Path, layout: Kind | None) -> None:
    from hmar_jax.formats.convert import export_torch

    written = export_torch(model, output, layout)
    rest = "" if written == "vae" else "; --kind=vae writes its tokenizer"
    say(f"The {written} state dict is in {output}, without the buffers that the official code derives{rest}")


def _export_tokens(args: argparse.Namespace, data: DataConfig) -> None:
    inputs = {"--model": args.model, "--config": find(args.config).partition(":")[0], "data.path": data.path}
    check_outputs("--output", [args.output], inputs)
    data = dataclasses.replace(data, skip_broken=args.skip_broken or data.skip_broken)
    options.join_processes(args)

    from hmar_jax.bulk.token_caches import BROKEN, export_tokens
    from hmar_jax.parallel import processes

    # A run that is killed goes on; in a job JAX would note the signal, and wait to be asked for it. After the imports,
    # since array_record prints a stack trace at the signal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    names = ("crops", "count", "batch_size", "seed", "dtype")
    with device_memory("choose a smaller --batch-size"):
        written = export_tokens(args.model, data, args.output, **{name: getattr(args, name) for name in names})
    if processes.is_first():
        say(f"Tokens of {written} pictures in {args.crops} crops are in {args.output}")
        for file in (args.output / BROKEN, args.output / "validation" / BROKEN):
            if file.is_file():
                count = len(file.read_bytes().splitlines())
                say(f"Broken pictures that were left out: {count}, listed in {file}")
