"""What a model is: tokenizer, transformer, and both with a geometry, which a model directory has as `config.json`."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, Literal

from hmar_jax.config.plain import Checked, check_names
from hmar_jax.errors import InputError, shown
from hmar_jax.scales import Pattern, ScaleLadder

Kind = Literal["vae", "var", "hmar", "hmar-stage1", "hmar-stage2"]  # of official PyTorch files

# A config may come from a damaged file, and a network is built from it before its weights are looked at. These bounds
# are far above what has been published, and keep that to some seconds and little memory.
_LARGEST = 2**20  # of a width, in channels
_MOST_CODES = 2**24  # in a codebook
MOST_CLASSES = 2**20
_DEEPEST = 1024  # blocks of a transformer
_MOST_BLOCKS = 128  # residual blocks of a tokenizer, which are built one by one
_MOST_PHIS = 128  # a ladder has fewer scales than that
_MOST_PIXELS = 2**14  # a side: a picture then takes 3 GiB


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Checked, group="tokenizer."):
    """The multi-scale residual VQ-VAE (VAR §3.2, a VQGAN CNN); defaults are the released ch160 v4096 z32 one.

    Attributes:
      channels: width of the finest level; a multiple of `norm_groups`.
      multipliers: width of each level, finest first, in multiples of `channels`.
      encoder_blocks, decoder_blocks: residual blocks in each level.
      norm_groups: groups of every GroupNorm.
      latent_channels: Z, channels of the latent map and of a codebook entry.
      codebook_size: V.
      downsampling: pixels a side of the finest token; the first log2 of it levels halve the resolution.
      phis: 3x3 convolutions shared among the scales.
      phi_of_scale: which of them each scale uses, coarse to fine; empty for VAR's rule (`quantizer.phi_of_scale`).
    """

    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    norm_groups: int = 32
    latent_channels: int = 32
    codebook_size: int = 4096
    downsampling: int = 16
    phis: int = 4
    phi_of_scale: tuple[int, ...] = ()

    def _check(self) -> None:
        sizes = dict.fromkeys(("channels", "norm_groups", "latent_channels"), _LARGEST)
        blocks = dict.fromkeys(("encoder_blocks", "decoder_blocks"), _MOST_BLOCKS)
        self._check_whole(1, **sizes, **blocks, codebook_size=_MOST_CODES, phis=_MOST_PHIS)
        if not self.multipliers or min(self.multipliers) < 1 or max(self.multipliers) * self.channels > _LARGEST:
            raise InputError(
                f"tokenizer.multipliers is {shown(self.multipliers)}; expected whole numbers of 1 or more, which times "
                f"tokenizer.channels={self.channels} are {_LARGEST} at most."
            )
        if (blocks_in_all := len(self.multipliers) * (self.encoder_blocks + self.decoder_blocks)) > _MOST_BLOCKS:
            raise InputError(
                f"The tokenizer has {blocks_in_all} residual blocks; choose tokenizer.encoder_blocks, "
                f"tokenizer.decoder_blocks and as many tokenizer.multipliers that there are {_MOST_BLOCKS} at most."
            )
        if self.channels % self.norm_groups:
            raise InputError(
                f"tokenizer.channels is {self.channels}, not a multiple of tokenizer.norm_groups={self.norm_groups}."
            )
        if self.downsampling not in [2**i for i in range(len(self.multipliers))]:
            raise InputError(
                f"tokenizer.downsampling is {shown(self.downsampling)}; {len(self.multipliers)} levels allow a power "
                f"of two from 1 to {2 ** (len(self.multipliers) - 1)}."
            )
        if not all(0 <= phi < self.phis for phi in self.phi_of_scale):
            raise InputError(
                f"tokenizer.phi_of_scale is {shown(self.phi_of_scale)}; expected numbers from 0 to {self.phis - 1}, "
                f"because tokenizer.phis is {self.phis}."
            )

    @property
    def halvings(self) -> int:
        """Levels after which the resolution halves: log2 of `downsampling`."""
        return self.downsampling.bit_length() - 1


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Checked, group="transformer."):
    """The scale-Markov masked transformer (HMAR §4), or VAR with `pattern="block_causal"` and no mask branch.

    Attributes:
      depth: blocks on the way from inputs to logits: a shared trunk, then `branch_depth` blocks of a branch.
      width: C. heads: H; the head size C/H is free.
      num_classes: classes a label may name; label `num_classes` itself is the null class.
      branch_depth: blocks of the next-scale branch, and of the mask branch where there is one.
      masked: whether the model has a mask branch (false in stage 1 and in VAR).
      pattern: `block_diagonal` (HMAR) or `block_causal` (VAR).
      shared_adaln: one AdaLN projection for all blocks plus a learned (6,C) offset in each (VAR d36-s).
      leak_free: masked tokens are kept out of u_k, so that a masked input shows nothing of them. The published
        models do let them in. Recorded here so that the sampler follows what training did.
      class_dropout: share of labels replaced by the null class in training.
      drop_path: rate of the last block; it rises linearly from 0 at the first.
      gate_init: factor on the initial AdaLN weights that make the residual gates; smaller the deeper.
    """

    depth: int
    width: int
    heads: int
    num_classes: int = 1000
    mlp_ratio: int = 4
    branch_depth: int = 8
    masked: bool = False
    pattern: Pattern = "block_diagonal"
    shared_adaln: bool = False
    leak_free: bool = False
    class_dropout: float = 0.1
    drop_path: float = 0.0
    gate_init: float = 1e-3

    def _check(self) -> None:
        sizes = dict.fromkeys(("width", "heads", "mlp_ratio"), _LARGEST)
        self._check_whole(1, depth=_DEEPEST, num_classes=MOST_CLASSES, **sizes)
        if not 0 <= self.class_dropout <= 1 or not 0 <= self.drop_path < 1:
            raise InputError(
                f"transformer.class_dropout is {self.class_dropout}, transformer.drop_path {self.drop_path}; expected "
                "a share, and a share below 1."
            )
        if self.width % self.heads:
            raise InputError(f"transformer.width is {self.width}, not a multiple of transformer.heads={self.heads}.")
        if not math.isfinite(self.gate_init):
            raise InputError(f"transformer.gate_init is {self.gate_init}; expected a finite number.")
        if not 0 <= self.branch_depth <= self.depth:
            raise InputError(
                f"transformer.branch_depth is {shown(self.branch_depth)}; it is a part of transformer.depth="
                f"{self.depth}, so choose one from 0 to that."
            )
        if self.masked and self.is_var:
            raise InputError("A block_causal transformer has no mask branch; set transformer.masked=False.")
        if self.pattern not in typing.get_args(Pattern):
            raise InputError(f"transformer.pattern is {self.pattern!r}; use one of {typing.get_args(Pattern)}.")

    @property
    def is_var(self) -> bool:
        """Whether it is VAR: a token sees all coarser scales, no branch predicts masked tokens, and sampling keeps keys
        and values. Else it is HMAR, of stage 1 where it has no mask branch.
        """
        return self.pattern == "block_causal"

    @property
    def trunk_depth(self) -> int:
        return self.depth - self.branch_depth

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TransformerConfig:
        """`d16`, `d20`, `d24`, `d30` (HMAR, with mask branch), `d36-s` and `var-d16` … (VAR): C = 64·depth, H = depth.

        Args:
          name: of the preset. overrides: fields to change, e.g. `masked=False` for stage 1.
        """
        depth, var, shared = _TRANSFORMERS.get(name if isinstance(name, str) else "", (0, False, False))
        if not depth:
            raise InputError(f"No transformer is named {shown(name)}; choose one of {', '.join(_TRANSFORMERS)}.")
        fields: dict[str, Any] = {
            "depth": depth, "width": 64 * depth, "heads": depth, "shared_adaln": shared, "masked": not var,
            "branch_depth": 0 if var else 8, "pattern": "block_causal" if var else "block_diagonal",
        }  # fmt: skip
        return cls(**(fields | cls.published_training(depth) | overrides))

    @staticmethod
    def published_training(depth: int) -> dict[str, Any]:
        """The fields that matter in training alone, as published for a depth."""
        return {"drop_path": 0.1 * depth / 24, "gate_init": 1e-3 if depth < 24 else 1e-4 if depth < 30 else 1e-5}


_TRANSFORMERS = {f"d{depth}": (depth, False, False) for depth in (16, 20, 24, 30)} | {
    f"var-d{depth}": (depth, True, False) for depth in (16, 20, 24, 30)
}
_TRANSFORMERS["d36-s"] = (36, True, True)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
    """What a model directory holds: geometry, tokenizer and, unless it is a tokenizer alone, a transformer.

    Attributes:
      class_names: of the classes, in the order of their labels: distinct, not blank, without control characters. With a
        transformer, as many as it has classes, or none.
      phi_layout: how an official file names the phi convolutions: `qresi_ls` for several that scales share, `each` for
        one a scale; empty for a lone one that all share (`qresi`), or else `qresi_ls`.
    """

    ladder: ScaleLadder
    tokenizer: TokenizerConfig
    transformer: TransformerConfig | None = None
    class_names: tuple[str, ...] = ()
    phi_layout: Literal["", "qresi_ls", "each"] = ""

    def _check(self) -> None:
        scales, phis = self.ladder.num_scales, self.tokenizer.phi_of_scale
        if len(phis) not in (0, scales):
            raise InputError(
                f"tokenizer.phi_of_scale is {shown(phis)}; expected one number for each of {scales} scales."
            )
        if self.image_size > _MOST_PIXELS:
            raise InputError(
                f"Pictures have {shown(self.image_size)} pixels a side, the last of the sides times "
                f"tokenizer.downsampling; expected {_MOST_PIXELS} at most."
            )
        check_names(self.class_names)
        if self.transformer is not None and len(self.class_names) not in (0, self.transformer.num_classes):
            raise InputError(
                f"There are {len(self.class_names)} class names for {self.transformer.num_classes} classes of the "
                "transformer; expected one for each, or none."
            )
        if self.phi_layout == "each" and self.tokenizer.phis != scales:
            raise InputError(
                f"The tokenizer has one phi convolution for each of {self.tokenizer.phis} scales, but there are "
                f"{scales} sides; give the sides that it was trained with."
            )

    @property
    def num_classes(self) -> int:
        return self.transformer.num_classes if self.transformer else len(self.class_names)

    @property
    def image_size(self) -> int:
        """S, pixels a side."""
        return self.ladder.sides[-1] * self.tokenizer.downsampling
