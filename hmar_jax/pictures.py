"""arrays → PNG files: grids, reconstructions, loss curves, bar plots."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hmar_jax.errors import InputError
from hmar_jax.files import write_whole

_GAP = 2  # pixels between the pictures of a grid, before enlargement


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float pictures in [0,1] (clipped) → uint8."""
    return np.asarray(np.clip(np.asarray(images, np.float32), 0, 1) * 255 + 0.5, np.uint8)


def to_unit(images: Any) -> Any:
    """Pictures as they are stored to what networks see: uint8 (NumPy or JAX) → float32 in [-1,1]."""
    return images.astype(np.float32) / 127.5 - 1


def grid(images: np.ndarray, columns: int, enlarge: int = 1) -> Image.Image:
    """Pictures row by row on white.

    Args:
      images: (N,S,S,3) float in [0,1] or uint8. columns: pictures a row. enlarge: whole factor, nearest neighbour.
    """
    images = images if images.dtype == np.uint8 else to_uint8(images)
    number, side = images.shape[:2]
    rows, pitch = -(-number // columns), side + _GAP
    canvas = np.full((rows * pitch + _GAP, columns * pitch + _GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = _GAP + i // columns * pitch, _GAP + i % columns * pitch
        canvas[y : y + side, x : x + side] = image
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def reconstructions(tokenizer: Any, images: np.ndarray, columns: int = 8, enlarge: int = 1) -> Image.Image:
    """Pictures (N,S,S,3) uint8 above what a `Model`'s tokenizer makes of them, `columns` pairs a row."""
    decoded = to_uint8(np.asarray(tokenizer.decode(tokenizer.encode(to_unit(images)))) / 2 + 0.5)
    rows = []
    for start in range(0, len(images), columns):
        for half in (images, decoded):
            row = half[start : start + columns]
            rows.append(np.pad(row, ((0, columns - len(row)), (0, 0), (0, 0), (0, 0)), constant_values=255))
    return grid(np.concatenate(rows), columns, enlarge)


def loss_curves(curves: Sequence[tuple[str, list[dict[str, Any]]]], sides: Sequence[int]) -> Image.Image:
    """One panel a stage from its metrics lines: the loss of each scale where there are any, else the terms of the loss.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("Loss curves need matplotlib; install it with `pip install 'hmar-jax[demo]'`.") from None
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (title, lines) in zip(panels, curves, strict=True):
        steps = [line["step"] for line in lines]
        if lines and "scale_loss" in lines[0]:
            for k, side in enumerate(sides):
                values = [line["scale_loss"][k] for line in lines]
                if any(values):  # the first scale is never masked
                    axes.plot(steps, values, label=f"{side}x{side}", color=colormaps["viridis"](k / len(sides)))
            axes.set_ylabel("cross-entropy by scale, nats a token")
        else:
            for name in ("pixel", "vq", "perceptual", "generator"):
                if lines and name in lines[0]:
                    axes.plot(steps, [line[name] for line in lines], label=name)
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylabel("loss terms")
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize=7, ncols=2)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return Image.open(stream).convert("RGB")


def bars(
    panels: Sequence[tuple[str, Sequence[tuple[str, float, bool]], float]], columns: int, unit: str
) -> Image.Image:
    """Panels row by row: a title; bars, each a name, a length and whether it is coloured; a line that marks a bound.

    Bars of more than eight times the shortest are broken off, so that the others can be told apart.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("Bar plots need matplotlib; install it with `pip install 'hmar-jax[demo]'`.") from None
    rows = -(-len(panels) // columns)
    tallest = max(len(lengths) for _, lengths, _ in panels)
    figure = Figure(figsize=(5.5 * columns, rows * (1.2 + 0.3 * tallest)), layout="constrained")
    for axes, (title, lengths, bound) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        names, true, coloured = zip(*lengths, strict=True)
        longest = min(max(true), 8 * min(true))
        shown = axes.barh(
            names, np.minimum(true, longest), color=["tab:blue" if ours else "lightgrey" for ours in coloured]
        )
        labels = [f"{length:.3g}" + (" …" if length > longest else "") for length in true]
        axes.bar_label(shown, labels, padding=3, fontsize=8)
        axes.axvline(bound, color="black", linestyle="--", linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.set(xlabel=f"{unit}; dashed: bound, {bound:.3g}", xlim=(0, 1.15 * max(longest, bound)))
        axes.invert_yaxis()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return Image.open(stream).convert("RGB")


def save_png(picture: Image.Image, path: Path) -> Path:
    """Writes a picture whole or not at all. Raises InputError where the disk refuses."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return write_whole(path, stream.getvalue())
