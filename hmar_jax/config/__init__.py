"""Every setting as frozen, hashable dataclasses; ml_collections and JSON only at the edge.

A *model config* (`ModelConfig`) says what a model is and travels with its weights in `config.json`. A *train config*
(`TrainConfig`) says how one stage is trained and is what `configs/*.py` return, as an `ml_collections.ConfigDict`.

(Over 400 lines, most of them docstrings: a reader looks for a setting in one place.)
"""

from __future__ import annotations

import dataclasses
import math
import operator
import string
import typing
from typing import Any, Literal

from hmar_jax.config.plain import Checked, check_names, from_config_dict, from_plain, to_config_dict, to_plain
from hmar_jax.errors import InputError, shown
from hmar_jax.files import local_path
from hmar_jax.scales import Pattern, ScaleLadder

Stage = Literal["tokenizer", "next_scale", "masked"]
Kind = Literal["vae", "var", "hmar", "hmar-stage1", "hmar-stage2"]  # of official PyTorch files


# A config may come from a damaged file, and a network is built from it before its weights are looked at. These bounds
# are far above what has been published, and keep that to some seconds and little memory.
_LARGEST = 2**20  # of a width, in channels
_MOST_CODES = 2**24  # in a codebook
_MOST_CLASSES = 2**20
_DEEPEST = 1024  # blocks of a transformer
_MOST_BLOCKS = 128  # residual blocks of a tokenizer, which are built one by one
_MOST_PHIS = 128  # a ladder has fewer scales than that
_MOST_PIXELS = 2**14  # a side: a picture then takes 3 GiB
_MOST_STEPS = 2**31 - 1  # counted in int32
_MOST_EXAMPLES = 2**24  # of a batch, or drawn for a grid: more than a pod holds
_MOST_BATCH_PIXELS = 2**34  # of all pictures of a batch, which take 48 GiB of the hosts


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

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dict.fromkeys(("width", "heads", "mlp_ratio"), _LARGEST)
        self._check_whole(1, depth=_DEEPEST, num_classes=_MOST_CLASSES, **sizes)
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

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked, group="data."):
    """Where training examples come from.

    Attributes:
      source: `glyphs` (rendered here, endless), `folder` (of pictures; class = subfolder), `tfds`, or `tokens` (a cache
        written by `hmar-jax export tokens`; what the two transformer stages read).
      path: the folder, the TFDS data directory or the token cache; unused by glyphs.
      name: TFDS name, e.g. `imagenet2012`. split: TFDS split, e.g. `train[:95%]`.
      classes: glyphs only, the characters to draw, one class each.
      resize: shorter side, in multiples of the model's image size, before the crop (HMAR: 1.125, Lanczos).
      crop: `random` or `center`. flip: mirror half of the pictures.
      workers: grain worker processes; 0 reads in threads of this process.
      held_out: share of the pictures that is kept out of training, for `evals` and the tokenizer's sample pictures.
        Which ones depends on their names alone (`data/held_out.py`), so that they stay held out when others join them.
      skip_broken: folder and TFDS only, leave out pictures that cannot be used. Each process then reads all of them
        once before it starts, to find those; they are logged, and `export tokens` lists them in the cache's broken.txt.
    """

    source: Literal["glyphs", "folder", "tfds", "tokens"] = "glyphs"
    path: str = ""
    name: str = ""
    split: str = "train"
    classes: str = string.digits + string.ascii_letters
    resize: float = 1.125
    crop: Literal["random", "center"] = "random"
    flip: bool = False
    workers: int = 0
    held_out: float = 0.0
    skip_broken: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.resize <= 16:
            raise InputError(
                f"data.resize is {self.resize:g}; expected 1 to 16: it is not in pixels, but the ratio of a picture's "
                "shorter side, before the crop, to the model's image size."
            )
        self._check_whole(0, workers=1024)  # processes of one machine
        if self.skip_broken and self.source not in ("folder", "tfds"):
            raise InputError(
                f"data.skip_broken is for 'folder' and 'tfds', and data.source is {self.source!r}; leave it."
            )
        if not 0 <= self.held_out < 1:
            raise InputError(f"data.held_out is {self.held_out}; expected a share from 0 to below 1.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked, group="optimizer."):
    """AdamW with the published schedules of HMAR's and VAR's training.

    Attributes:
      base_lr: learning rate for a global batch of 256; the peak is base_lr · batch / 256.
      warmup, flat: shares of training that warm up from `warmup_from`·peak, and that then stay at the peak.
      final_lr: ratio of the peak that the linear decay ends at.
      weight_decay, final_weight_decay: the ends of its cosine.
      clip: norm the gradient is clipped to, that of the tokenizer's discriminator by itself. 0 turns it off.
      ema: decay of the averaged parameters, less in the first steps; 0 keeps none. A discriminator has no averages.
    """

    base_lr: float = 1e-4
    warmup: float = 0.02
    warmup_from: float = 0.005
    flat: float = 0.05
    final_lr: float = 0.1
    weight_decay: float = 0.05
    final_weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.95
    clip: float = 2.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_factors("base_lr", "warmup", "warmup_from", "flat", "final_lr", "clip")
        self._check_factors("weight_decay", "final_weight_decay")
        if self.warmup > 1 or self.flat > 1:
            raise InputError(f"optimizer.warmup={self.warmup}, optimizer.flat={self.flat}; expected shares, at most 1.")
        for name in ("b1", "b2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name} is {getattr(self, name)}; expected a share from 0 to below 1.")


@dataclasses.dataclass(frozen=True)
class TokenizerLossConfig(Checked, group="tokenizer_loss."):
    """Weights of the tokenizer's terms and what keeps its codebook alive.

    Attributes:
      l1, l2: pixel terms, in [-1,1] units. vq, commitment: codebook term and commitment's share of it.
      perceptual: weight of LPIPS, on only with `perceptual_weights`, a .safetensors file of VGG16 and LPIPS weights.
      adversarial: weight of the generator's term, before the adaptive factor; 0 builds no discriminator.
      adversarial_start: step at which the discriminator starts to train, with a warm-up of its own; before it nothing
        is computed of it. adversarial_ramp: steps over which the generator's term then rises to its weight.
      discriminator_channels, discriminator_layers: PatchGAN size.
      kmeans_batches: batches whose latents, pooled to every scale, start the codebook; 0 keeps the random one.
      dead_below: a code drawn less than this share of its fair share (1/V) is re-initialised; 0 never.
      usage_decay: decay per step of the drawn shares that decide it. revive_every: steps between re-initialisations.
      scale_dropout: share of samples whose finest scales (a random number of them) are left out of the reconstruction.
    """

    l1: float = 0.0
    l2: float = 1.0
    vq: float = 1.0
    commitment: float = 0.25
    perceptual: float = 1.0
    perceptual_weights: str = ""
    adversarial: float = 0.1
    adversarial_start: int = 20_000
    adversarial_ramp: int = 1000
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    kmeans_batches: int = 4
    dead_below: float = 0.03
    usage_decay: float = 0.99
    revive_every: int = 100
    scale_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_factors("l1", "l2", "vq", "commitment", "perceptual", "adversarial", "dead_below")
        self._check_whole(0, adversarial_start=_MOST_STEPS, adversarial_ramp=_MOST_STEPS)
        self._check_whole(1, revive_every=_MOST_STEPS, discriminator_channels=2**14, discriminator_layers=16)
        self._check_whole(0, kmeans_batches=1024)  # which devices hold all at once
        if not 0 <= self.scale_dropout <= 1 or not 0 <= self.usage_decay < 1:
            raise InputError(
                f"tokenizer_loss has scale_dropout={self.scale_dropout} and usage_decay={self.usage_decay}; expected a "
                "share, and a share below 1."
            )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Checked, group="objective."):
    """The two transformer objectives (HMAR §4.2, §4.3).

    Attributes:
      scale_weights: of stage 1: `log_normal` (published), `uniform` over tokens (VAR) or `equal` over scales.
      per_sample_masks: stage 2 draws ratio and positions for each sample instead of once for the batch: for the global
        batch, whatever `accumulate` and the devices, so that a run does not depend on them. The published code draws
        once in each of its processes; for masks as diverse as those of many processes, set this.
      leak_free: stage 2 trains on masked inputs that show nothing of masked tokens; recorded in the model's config.
    """

    scale_weights: Literal["log_normal", "uniform", "equal"] = "log_normal"
    per_sample_masks: bool = False
    leak_free: bool = False


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked, group="mesh."):
    """Devices along each mesh axis; -1 takes all that are left.

    Attributes:
      data: split the batch. fsdp: split the batch, and the parameters and optimizer state.
      tensor: split heads, hidden units and the head's codebook.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dict.fromkeys(("data", "fsdp", "tensor"), _MOST_EXAMPLES)
        self._check_whole(-_MOST_EXAMPLES, **sizes)  # `sharding.make_mesh` says which of them fit the devices


@dataclasses.dataclass(frozen=True)
class EvalConfig(Checked, group="evals."):
    """A measurement on held-out examples while a stage trains, written to `metrics.jsonl` as `eval/KIND/NAME`.

    Attributes:
      kind: `loss`, the stage's loss and its terms without dropout and discriminator, on the averaged parameters where
        there are any. Every time on the same examples, with the same crops and masks.
      every: steps between two of them; the last step has one too. count: examples, fewer where fewer are held out.
    """

    kind: Literal["loss"] = "loss"
    every: int = 1000
    count: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, every=_MOST_STEPS, count=_MOST_STEPS)


_STAGE1_D16 = TransformerConfig.preset("d16", masked=False)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked):
    """One training stage.

    Attributes:
      stage: `tokenizer`, `next_scale` or `masked`.
      steps: optimizer steps. batch_size: global. accumulate: equal parts a batch is worked off in.
      init_from: model directory or hub id that the stage starts from: for `next_scale` a tokenizer, perhaps with a
        transformer of the same network (of any classes) to go on from; a tokenizer with a next-scale transformer for
        `masked`; for `tokenizer`, optionally a tokenizer to go on from.
      sides: of the ladder; `tokenizer` stage only, later stages have their model's.
      tokenizer: `tokenizer` stage only. transformer: `next_scale` stage only.
      dtype: of compute; parameters are float32.
      remat: what the transformer's backward pass recomputes: what lies between matrix products (`dots`), or `all`.
      scan_layers: run the transformer's blocks as one loop: it compiles sooner, but copies weights and what is kept.
      log_every, sample_every, checkpoint_every: steps; 0 turns samples off. keep: checkpoints kept.
      sample_labels: classes of the sample grid. sample_schedule: its schedule.
      evals: what is measured on held-out examples, and how often.
    """

    stage: Stage = "next_scale"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    init_from: str = ""
    sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    tokenizer: TokenizerConfig = TokenizerConfig()
    transformer: TransformerConfig = _STAGE1_D16
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    tokenizer_loss: TokenizerLossConfig = TokenizerLossConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    mesh: MeshConfig = MeshConfig()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["dots", "all"] = "dots"
    scan_layers: bool = False
    log_every: int = 50
    sample_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 3
    sample_labels: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    sample_schedule: str = "next-scale"
    evals: tuple[EvalConfig, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("steps", "log_every", "checkpoint_every", "keep")
        self._check_whole(1, **dict.fromkeys(counts, _MOST_STEPS), batch_size=_MOST_EXAMPLES, accumulate=_MOST_EXAMPLES)
        ladder = ScaleLadder(self.sides)
        pixels = ModelConfig(ladder, self.tokenizer).image_size if self.stage == "tokenizer" else 0
        if self.batch_size * pixels**2 > _MOST_BATCH_PIXELS:
            raise InputError(
                f"batch_size={self.batch_size} pictures of {pixels} pixels a side have more than {_MOST_BATCH_PIXELS} "
                "pixels; lower batch_size or the last of sides."
            )
        if len(self.sample_labels) > _MOST_EXAMPLES:
            raise InputError(f"sample_labels has {len(self.sample_labels)} labels; expected {_MOST_EXAMPLES} at most.")
        if any(abs(label) > _MOST_CLASSES for label in self.sample_labels):  # the stage knows how many there are
            raise InputError(
                f"sample_labels is {shown(self.sample_labels)}; expected labels of {_MOST_CLASSES} at most."
            )
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {shown(self.seed)}; expected 0 to {2**31 - 1}.")
        if len({e.kind for e in self.evals}) < len(self.evals):
            raise InputError("evals has a kind more than once, which would write the same metrics; keep one of each.")
        if not 0 <= self.sample_every <= _MOST_STEPS:
            raise InputError(f"sample_every is {shown(self.sample_every)}; expected steps, or 0 for no samples.")
        if self.transformer.masked or self.transformer.leak_free:
            raise InputError(
                "transformer.masked and transformer.leak_free are the stage's to set; choose stage='masked' and "
                "objective.leak_free."
            )
        if self.batch_size % self.accumulate:
            raise InputError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}.")
        if self.stage != "tokenizer" and not self.init_from:
            raise InputError(f"Stage {self.stage!r} needs init_from, the model directory of the stage before it.")
        if self.stage != "tokenizer" and self.data.source != "tokens":
            raise InputError(
                f"Stage {self.stage!r} trains from a token cache: write one with `hmar-jax export tokens` and set "
                f"data.source='tokens' and data.path (data.source is {self.data.source!r})."
            )
        if self.stage == "tokenizer" and self.data.source == "tokens":
            raise InputError(
                "Stage 'tokenizer' trains from pictures, and data.source is 'tokens'; set it to 'folder', 'tfds' or "
                "'glyphs'."
            )


def check_paths(config: TrainConfig) -> None:
    """Raises InputError where a path of a config is a URL, or of a user who is not here.

    A config keeps its paths as they were written, `~` and all, so that a run can be moved to another home; each is
    expanded (`files.local_path`) where it is opened.
    """
    for name in ("init_from", "data.path", "tokenizer_loss.perceptual_weights"):
        if path := operator.attrgetter(name)(config):
            local_path(path, name)


__all__ = [
    "DataConfig", "EvalConfig", "Kind", "MeshConfig", "ModelConfig", "ObjectiveConfig", "OptimizerConfig", "Stage",
    "TokenizerConfig", "TokenizerLossConfig", "TrainConfig", "TransformerConfig", "check_paths", "from_config_dict",
    "from_plain", "to_config_dict", "to_plain",
]  # fmt: skip
