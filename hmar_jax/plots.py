"""arrays → PNG and GIF files: grids, reconstructions, loss curves, bar plots, schedules, traces of samples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hmar_jax.arrays import on_host
from hmar_jax.bulk.traces import Frame
from hmar_jax.errors import InputError, shown
from hmar_jax.images import from_signed, grid, to_signed, to_uint8


def reconstructions(tokenizer: Any, images: np.ndarray, columns: int = 8, enlarge: int = 1) -> Image.Image:
    """Pictures (N,S,S,3) uint8 above what a `Model`'s tokenizer makes of them, `columns` pairs a row."""
    decoded = to_uint8(from_signed(on_host(tokenizer.decode(tokenizer.encode(to_signed(images))))))
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
    figure = _figure("Loss curves", 5 * len(curves), 4)

    from matplotlib import colormaps

    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (title, lines) in zip(panels, curves, strict=True):
        steps = [line["step"] for line in lines]
        if lines and "scale_loss" in lines[0]:
            for k, side in enumerate(sides):
                values = [_scale(line, k) for line in lines]
                if any(values):  # the first scale is never masked
                    axes.plot(steps, values, label=f"{side}x{side}", color=colormaps["viridis"](k / len(sides)))
            axes.set_ylabel("cross-entropy by scale, nats a token")
        else:
            for name in ("pixel", "vq", "perceptual", "generator"):
                if lines and name in lines[0]:
                    axes.plot(steps, [line.get(name, np.nan) for line in lines], label=name)
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylabel("loss terms")
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize=7, ncols=2)
    return _rendered(figure)


def _scale(line: dict[str, Any], k: int) -> float:
    """The loss of scale k in a line of metrics, NaN where it has none."""
    losses = line.get("scale_loss")
    return losses[k] if isinstance(losses, list) and k < len(losses) else np.nan


def bars(
    panels: Sequence[tuple[str, Sequence[tuple[str, float, bool]], float]], columns: int, unit: str
) -> Image.Image:
    """Panels row by row: a title; bars, each a name, a length and whether it is coloured; a line that marks a bound.

    Bars of more than eight times the shortest are broken off, so that the others can be told apart.

    Raises:
      InputError: matplotlib is not installed.
    """
    rows = -(-len(panels) // columns)
    tallest = max(len(lengths) for _, lengths, _ in panels)
    figure = _figure("Bar plots", 5.5 * columns, rows * (1.2 + 0.3 * tallest))
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
    return _rendered(figure)


def trace(frames: Sequence[Frame]) -> Image.Image:
    """How a sample came about, a column for each pass: the picture so far, its tokens, how sure the model was of them.

    Args:
      frames: of `hmar_jax.bulk.traces.frames`, one or more.
    """
    side = _side(frames, 160)
    bands = -(-len(frames) // _MOST_COLUMNS)
    columns = -(-len(frames) // bands)
    left, head, between, band_height = 90, 46, 8, 3 * side + 88
    lefts = [left]  # of each column; scales stand further apart than steps
    for i, frame in enumerate(frames[1:], 1):
        apart = between + 12 * (frame.step == 0)
        lefts.append(lefts[-1] + side + apart if i % columns else left)
    legend = _legend()
    width = max(max(lefts) + side + 12, left + legend.width)
    canvas = Image.new("RGB", (width, bands * band_height + 36), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (frame, x) in enumerate(zip(frames, lefts, strict=True)):
        y = i // columns * band_height
        first = i % columns == 0
        pen.line((x if first or frame.step == 0 else x - between, y + 4, x + side - 1, y + 4), "black", 2)
        for line, words in enumerate(_words(frame)):
            pen.text((x, y + 10 + 17 * line), words, "dimgrey" if line else "black", _font(13))
        sure = np.where(frame.earlier[..., None], _FADED, _heat(frame.confidence))
        panels = {
            "picture": _picture(frame.image, side),
            "tokens": _tokens(frame, side),
            "confidence": _map(sure, side),
        }
        for row, (name, panel) in enumerate(panels.items()):
            top = y + head + row * (side + between)
            canvas.paste(panel, (x, top))
            if first:
                pen.text((x - 10, top + side // 2), name, "black", _font(13), anchor="rm")
    canvas.paste(legend, (left, canvas.height - legend.height))
    return canvas


def animation(frames: Sequence[Frame]) -> bytes:
    """The same as a GIF that repeats: the picture as it grows, beside it a small map of its tokens.

    A pass takes 0.4 s, the last of a scale 0.8 s, the last of all 3 s.
    """
    side = _side(frames, 256)
    canvases, durations = [], []
    for i, frame in enumerate(frames):
        canvas = Image.new("RGB", (side + 150, side + 16), "white")
        canvas.paste(_picture(frame.image, side), (8, 8))
        canvas.paste(_tokens(frame, 120), (side + 20, 8))
        pen = ImageDraw.Draw(canvas)
        title, what = _words(frame)
        for y, words in ((136, title), (154, what)):
            pen.text((side + 20, y), words, "black", _font(13))
        canvases.append(canvas.quantize(256, kmeans=3, dither=Image.Dither.NONE))
        ends = frame.step + 1 == frame.steps
        durations.append(3000 if i + 1 == len(frames) else 800 if ends else 400)
    stream = io.BytesIO()
    first, *others = canvases
    first.save(stream, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return stream.getvalue()


_MOST_COLUMNS = 14  # as many as official-256 has passes
_NOW, _EARLIER, _OPEN, _FADED = np.array([(240, 120, 20), (60, 110, 180), (222, 222, 222), (236, 240, 247)], np.uint8)
_HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])  # five of viridis


def _side(frames: Sequence[Frame], least: int) -> int:
    """Pixels a side to show pictures at: small ones enlarged by a whole factor to `least` or a little more."""
    if not isinstance(frames, list | tuple) or not frames or not all(isinstance(frame, Frame) for frame in frames):
        raise InputError(f"Frames are {shown(frames)}; expected a list of those that bulk.traces.frames returns.")
    size = frames[0].image.shape[0]
    return -(-least // size) * size if size < least else least


def _picture(image: np.ndarray, side: int) -> Image.Image:
    enlarged = image.shape[0] <= side
    return Image.fromarray(to_uint8(image)).resize(
        (side, side), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    )


def _map(colours: np.ndarray, side: int) -> Image.Image:
    """Colours (p,p,3) as squares with lines between them, where there is room for lines."""
    shown = Image.fromarray(np.asarray(colours, np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    number = len(colours)
    if side >= 6 * number:
        pen = ImageDraw.Draw(shown)
        for at in (round(k * side / number) for k in range(1, number)):
            pen.line((at, 0, at, side), "white")
            pen.line((0, at, side, at), "white")
    return shown


def _tokens(frame: Frame, side: int) -> Image.Image:
    return _map(np.where(frame.now[..., None], _NOW, np.where(frame.earlier[..., None], _EARLIER, _OPEN)), side)


def _heat(probability: np.ndarray) -> np.ndarray:
    """Probabilities (…) as colours (…,3). By their square root, as most are small where the codebook is large."""
    places = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(np.sqrt(probability), places, channel) for channel in _HEAT.T], axis=-1)


def _words(frame: Frame) -> tuple[str, str]:
    """What a frame is: its scale and step, and how many tokens it commits and leaves open."""
    side, now = len(frame.now), int(frame.now.sum())
    left = side * side - now - int(frame.earlier.sum())
    return f"{side}x{side}, step {frame.step + 1} of {frame.steps}", f"commits {now}, {left} open"


def _legend() -> Image.Image:
    """What the colours of `trace` mean, in a line."""
    canvas = Image.new("RGB", (2000, 32), "white")
    pen, x = ImageDraw.Draw(canvas), 0
    states = ((_NOW, "committed by this pass"), (_EARLIER, "committed before"), (_OPEN, "open"))
    for colour, words in states:
        pen.rectangle((x, 0, x + 14, 14), tuple(colour.tolist()))
        pen.text((x + 20, 7), words, "black", _font(13), anchor="lm")
        x += 44 + int(pen.textlength(words, _font(13)))
    pen.text((x, 7), "probability of the token drawn", "black", _font(13), anchor="lm")
    x += 12 + int(pen.textlength("probability of the token drawn", _font(13)))
    width = 240
    ramp = _heat(np.linspace(0, 1, width)[None] ** 2).astype(np.uint8)
    canvas.paste(Image.fromarray(ramp).resize((width, 14)), (x, 0))
    for value in (0, 0.1, 0.25, 0.5, 1):
        pen.text((x + value**0.5 * width, 16), f"{value:g}", "black", _font(11), anchor="ma")
    return canvas.crop((0, 0, x + width + 12, canvas.height))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def commitment(maps: Sequence[tuple[str, np.ndarray]], title: str) -> Image.Image:
    """When each token is committed: for each scale a title and a map (p,p) int of steps, from 0, by colour.

    Raises:
      InputError: matplotlib is not installed.
    """
    steps = 1 + max(int(places.max()) for _, places in maps)
    columns = min(len(maps), 7)
    rows = -(-len(maps) // columns)
    figure = _figure("Pictures of schedules", 1.9 * columns + 1.2, 2.3 * rows + 0.5)

    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, (name, places) in zip(panels.flat, maps, strict=False):
        shown = axes.imshow(places + 1, cmap=colormaps["viridis"].resampled(steps), vmin=0.5, vmax=steps + 0.5)
        for at in range(1, len(places)):
            axes.axhline(at - 0.5, color="white", linewidth=3 / len(places))
            axes.axvline(at - 0.5, color="white", linewidth=3 / len(places))
        axes.set_title(name, fontsize=8)
    whole = MaxNLocator(integer=True)
    figure.colorbar(shown, ax=panels, label="step that commits a token", shrink=0.8, ticks=whole)
    figure.suptitle(title, fontsize=10)
    return _rendered(figure)


def _figure(what: str, width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches, for `what`."""
    try:
        import matplotlib.figure
    except ImportError:
        raise InputError(f"{what} need matplotlib; install it with `pip install matplotlib`.") from None
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def _rendered(figure: Any) -> Image.Image:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return Image.open(stream, formats=["PNG"]).convert("RGB")
