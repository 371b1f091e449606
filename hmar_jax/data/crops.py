"""an example of a source → the square that the model sees, or several.

Axis letters: H, W height and width of a picture as it is stored, S pixels a side for the model, L tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
from PIL import Image

from hmar_jax.config import DataConfig


class Source(Protocol):
    """Examples by index: {"image": uint8 (H,W,3) or "tokens": uint16 (crops,L), "label": int32}."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Visit:
    """One visit of a training example: a random crop of its picture, or one of the crops in its tokens."""

    config: DataConfig
    image_size: int

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if "tokens" in example:
            crop = example["tokens"][rng.integers(len(example["tokens"]))]
            return {"tokens": crop.astype(np.int32), "label": example["label"]}
        mirror = self.config.flip and rng.random() < 0.5
        return {"image": _view(example["image"], self.config, self.image_size, mirror, rng), "label": example["label"]}


@dataclasses.dataclass(frozen=True)
class Views:
    """An index → all crops of that picture, (crops,S,S,3)."""

    source: Source
    total: int
    crops: int
    config: DataConfig
    image_size: int

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        first = self.source[index]
        if self.config.source == "glyphs":
            classes = len(self.source.class_names)
            stride = -(-self.total // classes) * classes  # a multiple of the classes, so that the label stays
            images = [first["image"], *(self.source[index + i * stride]["image"] for i in range(1, self.crops))]
        else:
            images = [first["image"]] * self.crops
        coin = rng.integers(2)
        views = [
            _view(image, self.config, self.image_size, bool(self.config.flip and (coin + i) % 2), rng)
            for i, image in enumerate(images)
        ]
        return {"image": np.stack(views), "label": first["label"]}


def _view(image: np.ndarray, config: DataConfig, size: int, mirror: bool, rng: np.random.Generator) -> np.ndarray:
    """A square of the picture (H,W,3) at S = `size`, perhaps mirrored; a glyph, drawn at S, is never cut."""
    if config.source != "glyphs":
        # The shorter side becomes resize · S and a square of S is cut from that; one step, to resize only the square.
        height, width = image.shape[:2]
        side = min(height, width) * size / round(config.resize * size)
        across, down = rng.random(2) if config.crop == "random" else (0.5, 0.5)
        x, y = across * (width - side), down * (height - side)
        box = (x, y, min(x + side, width), min(y + side, height))
        image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS, box))
    return np.ascontiguousarray(image[:, ::-1]) if mirror else image
