"""`hmar-jax edit`: model directory + picture + region → the picture with that region drawn anew."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hmar_jax.commands import options
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.errors import InputError, device_memory, shown
from hmar_jax.files import check_files, check_outputs, check_pictures, note_replaced
from hmar_jax.labels import parse_label
from hmar_jax.sampling import regions

_MOST_VARIANTS = 10_000  # all are drawn at once
_GREY, _COLUMNS = 0.5, 10  # of the grid: the colour of what is to be drawn, and pictures a row


def run(argv: Sequence[str]) -> None:
    """Writes the edited picture, or several, and a grid: input, mask, results."""
    args = _parser().parse_args(argv)
    if args.output.suffix.lower() != ".png":
        raise InputError(f"--output is {args.output}; pictures are written as PNG, so let its name end in .png.")
    *results, grid = files = outputs(args.output, args.variants)
    check_outputs("--output", files, {"--image": args.image, "--mask": args.mask})
    check_files("--output", files)
    check_pictures("--output", files)
    image, mask = regions.picture_and_mask(args.image, mask=args.mask, box=args.box, keep=args.keep, pad=args.pad)

    from hmar_jax import images
    from hmar_jax.model import from_pretrained

    model = from_pretrained(args.model, args.dtype, revision=args.revision)
    image, mask = regions.to_square(image, mask, model.config.image_size)
    config, labels = model.config, None
    if args.label is not None:
        labels = [parse_label(args.label, config.class_names, config.num_classes).number]
    settings = {name: getattr(args, name) for name in ("variants", "composite", "feather", "seed", "greedy")}
    with device_memory("choose fewer --variants"):
        out = model.edit(image, mask, labels, args.schedule, **settings, **options.changes(args))
    note_replaced(files)
    for file, result in zip(results, out.pil(), strict=True):
        images.save_png(result, file)
    given = images.to_unit(image)[None]
    stacked = np.concatenate([given, np.where(mask[..., None], _GREY, given), out.images])
    images.save_png(images.grid(stacked, min(len(stacked), _COLUMNS)), grid)
    say(f"{' '.join(file.name for file in results)} and {grid.name} (input, mask, results) are in {grid.parent}")


def outputs(output: Path, variants: int) -> list[Path]:
    """The files that are written: `output`, or NAME-0.png, … where there are several variants; and NAME-grid.png."""
    if not 1 <= variants <= _MOST_VARIANTS:
        raise InputError(f"--variants is {shown(variants)}; expected 1 to {_MOST_VARIANTS}.")
    numbers = [""] if variants == 1 else [f"-{i}" for i in range(variants)]
    return [output.with_name(f"{output.stem}{ending}{output.suffix}") for ending in (*numbers, "-grid")]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hmar-jax edit",
        description="Draw a part of a picture anew. Of a picture that is not square the middle is taken; it is resized "
        "to the model's size. Regions are in pixels of the file; a box is left,top,right,bottom.",
    )
    options.add_model(parser)
    parser.add_argument("--image", required=True, action=options.LocalPath, help="picture file")
    region = parser.add_mutually_exclusive_group(required=True)
    region.add_argument("--mask", action=options.LocalPath, help="picture of the same size, white where to draw anew")
    region.add_argument("--box", help="draw anew inside this box")
    region.add_argument("--keep", help="draw anew outside this box")
    region.add_argument("--pad", type=int, help="draw so many pixels more on every side")
    parser.add_argument(
        "--label", help="class, by name, or by number as in `sample`; by default the surroundings decide"
    )
    parser.add_argument("--variants", type=int, default=1, help="how many edits (default: %(default)s)")
    parser.add_argument("--composite", action="store_true", help="leave the pixels outside the region untouched")
    parser.add_argument("--feather", type=int, help="width of the seam inside the region (default: half a token)")
    options.add_schedule(parser, "small, or what the model can do")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token everywhere")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", required=True, action=options.LocalPath, help="the .png file to write")
    return parser
