"""How one stage is trained: data, optimizer, losses, mesh, and all of it as a `TrainConfig`."""

from __future__ import annotations

import dataclasses
import operator
import string
from typing import Literal

from hmar_jax.config.models import MOST_CLASSES, ModelConfig, TokenizerConfig, TransformerConfig
from hmar_jax.config.plain import Checked
from hmar_jax.errors import InputError, shown
from hmar_jax.files import local_path
from hmar_jax.scales import ScaleLadder

Stage = Literal["tokenizer", "next_scale", "masked"]

# Bounds of the same purpose as those of `models.py`.
_MOST_STEPS = 2**31 - 1  # counted in int32
_MOST_EXAMPLES = 2**24  # of a batch, or drawn for a grid: more than a pod holds
_MOST_BATCH_PIXELS = 2**34  # of all pictures of a batch, which take 48 GiB of the hosts


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

    def _check(self) -> None:
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

    def _check(self) -> None:
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

    def _check(self) -> None:
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

    def _check(self) -> None:
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

    def _check(self) -> None:
        self._check_whole(1, every=_MOST_STEPS, count=_MOST_STEPS)


_PUBLISHED_TOKENIZER = TokenizerConfig()
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
    tokenizer: TokenizerConfig = _PUBLISHED_TOKENIZER
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

    def _check(self) -> None:
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
        if any(abs(label) > MOST_CLASSES for label in self.sample_labels):  # the stage knows how many there are
            raise InputError(
                f"sample_labels is {shown(self.sample_labels)}; expected labels of {MOST_CLASSES} at most."
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
