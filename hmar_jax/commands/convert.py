"""`hmar-jax convert`: official PyTorch file → model directory."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence

from hmar_jax.commands.options import LocalPath, PathOrName
from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder


def run(argv: Sequence[str]) -> None:
    """Converts a tokenizer, or a transformer together with its tokenizer's model directory."""
    from hmar_jax.convert import convert
    from hmar_jax.official import Kind

    parser = argparse.ArgumentParser(
        prog="hmar-jax convert", description="Turn an official PyTorch checkpoint into a model directory."
    )
    parser.add_argument("--kind", required=True, choices=typing.get_args(Kind), help="what the file holds")
    parser.add_argument(
        "--input", required=True, action=LocalPath, help=".safetensors file, or .pth where PyTorch is there"
    )
    parser.add_argument(
        "--tokenizer", action=PathOrName, help="model directory converted from a vae; for all other kinds"
    )
    parser.add_argument(
        "--next-scale",
        action=PathOrName,
        metavar="MODEL",
        help="for hmar-stage2: the model converted from its hmar-stage1, which gives the next-scale branch; without it "
        "the file's blocks serve both branches",
    )
    parser.add_argument("--sides", required=True, help="of the token maps, coarse to fine: 1,2,3,4,5,6,8,10,13,16")
    parser.add_argument("--key", help="of the state dict in a training checkpoint that holds several: model, ema.model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the large arrays")
    parser.add_argument("--output", required=True, action=LocalPath, help="model directory to write; must not exist")
    args = parser.parse_args(argv)
    written = convert(
        args.kind,
        args.input,
        parse_sides(args.sides),
        args.output,
        tokenizer=args.tokenizer,
        next_scale=args.next_scale,
        key=args.key,
        dtype=args.dtype,
    )
    print(f"The model is in {written}; its README.md says what it is and how to use it")


def parse_sides(text: str) -> ScaleLadder:
    """The ladder of `1,2,3,4`."""
    try:
        sides = tuple(int(side) for side in text.split(","))
    except ValueError:
        raise InputError(f"--sides={text} is not a list of whole numbers, such as 1,2,3,4.") from None
    return ScaleLadder(sides)
