"""(seed, index) → a coloured character on a texture, and its class. The embedded default: nothing to download.

A picture is `texture + (ink − texture) · mask`. A person tells the classes apart at a glance: the ink's luma is
`CONTRAST` or more away from the texture's everywhere; capitals fill 82 to 92 % of the height, and small letters on the
same line some 70 % of that, so `c` is not `C`; zero is always dotted, and `I` and `l` always have their serifs.

Axis letters: S pixels a side.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hmar_jax.errors import InputError
from hmar_jax.images import to_uint8, to_unit

CONTRAST = 0.35
_FACES = ("Sans", "Sans-Bold", "Serif", "Serif-Bold", "SansMono", "SansMono-Bold")
_READABLE_IN = {
    "0": "Mono",
    "I": "Serif Mono",
    "l": "Serif Mono",
}  # words of the faces; elsewhere they look like O, l, I
_CAP_HEIGHT = 0.729  # of an em, in every DejaVu face
_FILL = (0.82, 0.92)  # height of a capital, in S
_ROOM = 0.94  # most of S that any glyph may take
_TILT = 8.0  # degrees
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_MISSING = "\U0010ffff"  # no font has it, so it draws the box that stands for missing characters


class Glyphs:
    """An endless source of rendered characters: a pure function of `seed` and the index.

    Args:
      classes: distinct characters, one class each, in the order of their labels.
      size: S, 16 or more.
      seed: any integer from 0 to 2^64-1.

    Raises:
      InputError: no class, one twice, one that DejaVu cannot draw, a size or seed out of range, or no matplotlib.
    """

    def __init__(self, classes: str = string.digits + string.ascii_letters, size: int = 64, seed: int = 0) -> None:
        twice = sorted({character for character in classes if classes.count(character) > 1})
        if not classes or twice:
            fault = f"names {''.join(twice)!r} more than once" if twice else "names no character"
            raise InputError(f"data.classes={classes!r} {fault}; give distinct characters, such as '0123456789'.")
        if size < 16:
            raise InputError(f"Glyphs cannot be read at {size} pixels a side; use 16 or more.")
        if not 0 <= seed < 2**64:
            raise InputError(f"The glyphs' seed is {seed}; use an integer from 0 to 2^64-1.")
        self.class_names: tuple[str, ...] = tuple(classes)
        self.size, self.seed = size, seed
        self._faces = [_faces(character) for character in classes]

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example `index`: "image" (S,S,3) uint8; "label" int32, the index modulo the number of classes."""
        image = to_uint8(self.render(index)[0])
        return {"image": image, "label": np.int32(index % len(self.class_names))}

    def render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The picture, (S,S,3) float32 in [0,1], and how much of each pixel is ink, (S,S) float32 in [0,1]."""
        label = index % len(self.class_names)
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], np.uint64)))
        faces = self._faces[label]
        stencil = _stencil(self.class_names[label], faces[rng.integers(len(faces))], self.size)
        mask = _place(stencil, self.size, rng)
        texture, ink = _paint(_TEXTURES[rng.integers(len(_TEXTURES))](self.size, rng), rng)
        return texture + (ink - texture) * mask[:, :, None], mask


@dataclasses.dataclass(frozen=True)
class _Stencil:
    """A character's ink, cut tight; `cap` is the height of capitals, `top` how far below the top of those it starts."""

    mask: Image.Image
    cap: float
    top: float


@functools.lru_cache(maxsize=2048)
def _stencil(character: str, face: str, size: int) -> _Stencil:
    # Drawn and turned larger than it will be, so that small pictures come out smooth.
    font = _font(face, round(size * max(1, min(3, 256 // size)) / _CAP_HEIGHT))
    left, top, right, bottom = (round(edge) for edge in font.getbbox(character, anchor="ls"))
    mask = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), character, fill=255, font=font, anchor="ls")
    box = mask.getbbox() or (0, 0, 1, 1)
    cap = _CAP_HEIGHT * font.size
    return _Stencil(mask.crop(box), cap, cap + top - 1 + box[1])


@functools.lru_cache(maxsize=32)
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    spec = importlib.util.find_spec("matplotlib")  # found, not imported: only its fonts are wanted
    path = Path(spec.origin if spec and spec.origin else "").parent / f"mpl-data/fonts/ttf/DejaVu{face}.ttf"
    if not path.is_file():
        raise InputError(f"Glyphs need the font {path.name} that matplotlib ships; run `pip install matplotlib`.")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _faces(character: str) -> list[str]:
    """The faces that draw `character` readably."""

    def drawn(face: str) -> bytes:
        return bytes(_font(face, 32).getmask(character))

    wanted = _READABLE_IN.get(character, "Sans Serif").split()
    faces = [face for face in _FACES if any(word in face for word in wanted)]
    faces = [face for face in faces if any(drawn(face)) and drawn(face) != bytes(_font(face, 32).getmask(_MISSING))]
    if not faces:
        raise InputError(f"data.classes has {character!r}, which DejaVu cannot draw; leave it out.")
    return faces


def _place(stencil: _Stencil, size: int, rng: np.random.Generator) -> np.ndarray:
    """The stencil turned, scaled and shifted a little, all of it inside: (S,S) float32 in [0,1]."""
    turned = stencil.mask.rotate(rng.uniform(-_TILT, _TILT), Image.Resampling.BILINEAR, expand=True)
    turned = turned.crop(turned.getbbox())
    fill = rng.uniform(*_FILL)
    scale = fill * size / stencil.cap
    # Dots and dashes grow until they show; what is too tall shrinks; what is too wide is set narrower.
    scale = max(scale, 0.4 * size / max(turned.size))
    scale = min(scale, _ROOM * size / turned.height)
    height = round(scale * turned.height) or 1
    width = round(min(scale * turned.width, _ROOM * size)) or 1
    # Letters stand on one line, wherever that leaves all of them in the picture.
    top = (1 - fill) / 2 * size + scale * stencil.top
    x, y = np.array([(size - width) / 2, top]) + rng.uniform(-0.05, 0.05, 2) * size
    edge = int((1 - _ROOM) / 2 * size)
    corner = tuple(min(max(round(at), edge), size - edge - n) for at, n in ((x, width), (y, height)))
    picture = Image.new("L", (size, size))
    picture.paste(turned.resize((width, height), Image.Resampling.BOX), corner)
    return to_unit(np.asarray(picture))


def _paint(texture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A texture (S,S) in [0,1] between two near colours, (S,S,3), and a colour (3,) that stands out from it."""
    first = rng.uniform(0.04, 0.45)
    second = min(max(first + rng.uniform(-0.2, 0.2), 0.04), 0.45)
    lumas = np.array([first, second, rng.uniform(max(first, second) + CONTRAST + 0.05, 0.98)], np.float32)
    if rng.random() < 0.5:
        lumas = 1 - lumas
    # Zero-luma directions, as long as the cube of colours allows: hues change, the lumas above stay.
    hues = rng.uniform(-1, 1, (3, 3)).astype(np.float32)
    hues[1] = hues[0] + 0.4 * hues[1]
    hues -= (hues @ _LUMA)[:, None]
    lumas = lumas[:, None]
    reach = (np.where(hues > 0, 1 - lumas, lumas) / (np.abs(hues) + 1e-6)).min(1, keepdims=True)
    colours = lumas + hues * reach * rng.uniform(0.3, 1, (3, 1)).astype(np.float32)
    return colours[0] + (colours[1] - colours[0]) * texture[:, :, None], colours[2]


@functools.lru_cache(maxsize=8)
def _axis(size: int) -> np.ndarray:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    axis.flags.writeable = False
    return axis


def _slant(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (S,S) along and across a random direction, in [-√2,√2]."""
    angle, axis = rng.uniform(0, 2 * np.pi), _axis(size)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * axis + sin * axis[:, None], cos * axis[:, None] - sin * axis


def _gradient(size: int, rng: np.random.Generator) -> np.ndarray:
    return 0.5 + _slant(size, rng)[0] / np.float32(2 * np.sqrt(2))


def _stripes(size: int, rng: np.random.Generator) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(_slant(size, rng)[0] * np.float32(rng.uniform(6, 18)))


def _checks(size: int, rng: np.random.Generator) -> np.ndarray:
    along, across = _slant(size, rng)
    frequency = np.float32(rng.uniform(5, 10))
    return np.clip(0.5 + 2 * np.sin(along * frequency) * np.sin(across * frequency), 0, 1)


def _rings(size: int, rng: np.random.Generator) -> np.ndarray:
    x, y = (_axis(size) - np.float32(shift) for shift in rng.uniform(-1, 1, 2))
    return 0.5 + 0.5 * np.sin(np.hypot(x, y[:, None]) * np.float32(rng.uniform(6, 14)))


def _noise(size: int, rng: np.random.Generator) -> np.ndarray:
    grid = Image.fromarray(rng.random((5, 5), np.float32))
    return np.clip(np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)


_TEXTURES: tuple[Callable[[int, np.random.Generator], np.ndarray], ...] = (_gradient, _stripes, _checks, _rings, _noise)
