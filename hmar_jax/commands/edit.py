"""`hmar-jax edit`: model directory + picture + region → the picture with that region drawn anew.

Axis letters: H, W height and width of the picture file, S pixels a side of the model's pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hmar_jax.commands import options
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.data.picture_files import decode
from hmar_jax.errors import InputError, device_memory, shown
from hmar_jax.files import check_files, check_outputs, check_pictures, note_replaced
from hmar_jax.labels import parse_label

_WHITE = 128  # of 255: from here on a pixel of a mask is to be drawn anew
_MOST_VARIANTS = 10_000  # all are drawn at once
_MOST_PADDING = 4096  # on each side of a picture: 200 MiB more of one that is as large
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
    image, mask = picture_and_mask(args)

    from hmar_jax import images
    from hmar_jax.model import from_pretrained

    model = from_pretrained(args.model, args.dtype, revision=args.revision)
    image, mask = to_square(image, mask, model.config.image_size)
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


def picture_and_mask(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """The picture (H,W,3) uint8, and where to draw it anew, (H,W) bool, from whichever region is given.

    Raises:
      InputError: a file cannot be read, sizes differ, or a box is none.
    """
    image = decode(args.image, f"Picture '{args.image}'")
    height, width = image.shape[:2]
    if args.mask is not None:
        # Paint programs save white strokes on nothing.
        white = Image.fromarray(decode(args.mask, f"Mask '{args.mask}'", background="black")).convert("L")
        if white.size != (width, height):
            sizes = f"{white.width}x{white.height} pixels, the picture {width}x{height}"
            raise InputError(f"Mask '{args.mask}' has {sizes}; make it as large as the picture.")
        brightest = int(np.asarray(white).max())
        if brightest < _WHITE:
            raise InputError(
                f"Mask '{args.mask}' leaves nothing to draw: its brightest pixel is {brightest} of 255. What is to be "
                f"drawn anew is white ({_WHITE} or more), the rest black; save the mask so."
            )
        return image, np.asarray(white) >= _WHITE
    if args.pad is not None:
        if not 1 <= args.pad <= _MOST_PADDING:
            raise InputError(f"--pad is {shown(args.pad)}; expected 1 to {_MOST_PADDING} pixels.")
        # Repeated edges, for the encoder sees what lies around a kept token.
        padded = np.pad(image, ((args.pad, args.pad), (args.pad, args.pad), (0, 0)), mode="edge")
        return padded, np.pad(np.zeros((height, width), bool), args.pad, constant_values=True)
    from hmar_jax.sampling.editing import box_mask  # JAX imports for seconds

    if args.keep is not None:
        return image, ~box_mask(read_box(args.keep), width, height)
    return image, box_mask(read_box(args.box), width, height)


def read_box(text: str) -> list[int]:
    """`left,top,right,bottom` as numbers."""
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise InputError(
            f"Box {shown(text)} is not left,top,right,bottom in whole pixels, such as 0,0,64,128."
        ) from None
    return [left, top, right, bottom]


def to_square(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle square of a picture and its mask, at S = `size`: (S,S,3) uint8, (S,S) bool.

    A pixel of the mask is True if any of the pixels that it is made of is: small regions do not vanish.

    Raises:
      InputError: nothing in it is to be drawn anew.
    """
    side = min(mask.shape)
    top, left = ((length - side) // 2 for length in mask.shape)
    image, mask = (array[top : top + side, left : left + side] for array in (image, mask))
    image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
    firsts = np.arange(size) * side // size
    for axis in (0, 1):
        mask = np.logical_or.reduceat(mask, firsts, axis)
    if not mask.any():
        raise InputError("Nothing is to be drawn anew in the middle square of the picture; choose a region inside it.")
    return image, mask
