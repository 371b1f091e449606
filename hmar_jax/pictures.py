"""arrays → PNG files: grids, reconstruction pairs, a sample growing scale by scale, loss curves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hmar_jax.errors import InputError
from hmar_jax.pretrained import remedy

_GAP = 2  # pixels between the pictures of a grid, before enlargement


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float pictures in [0,1] (clipped) → uint8."""
    return np.asarray(np.clip(np.asarray(images, np.float32), 0, 1) * 255 + 0.5, np.uint8)


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


def pairs(originals: np.ndarray, reconstructions: np.ndarray, columns: int = 8, enlarge: int = 1) -> Image.Image:
    """Originals above their reconstructions, `columns` pairs a row; both (N,S,S,3) float in [0,1]."""
    rows = []
    for start in range(0, len(originals), columns):
        rows += [originals[start : start + columns], reconstructions[start : start + columns]]
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
    with tempfile.TemporaryFile() as stream:
        figure.savefig(stream, format="png", dpi=110)
        stream.seek(0)
        return Image.open(stream).convert("RGB")


def save_png(picture: Image.Image, path: Path) -> Path:
    """Writes a picture whole or not at all. Raises InputError where the disk refuses."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, format="PNG")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"Could not write {path} ({error}); {remedy(error)}") from None
    return path
