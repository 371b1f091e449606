"""config + parameters → Model: tokenizer, transformer and sampler behind one object, all of it jitted.

Axis letters: B batch, S pixels a side, L tokens, N tokens of one scale, V codebook.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from hmar_jax import params as trees
from hmar_jax.arrays import flag, host_array, mesh_in_use, on_host, over_devices, whole
from hmar_jax.config import ModelConfig, TransformerConfig
from hmar_jax.errors import InputError, check_choice, shown
from hmar_jax.formats.model_directory import About, open_model, read_params, write_model
from hmar_jax.formats.safetensors_files import Tensor
from hmar_jax.images import to_signed
from hmar_jax.model.tokenizer import TokenizerDoor, check_tokens
from hmar_jax.networks import Layout, held_dtypes, hold, networks
from hmar_jax.sampling import editing, program, progress
from hmar_jax.sampling.sampler import Kept
from hmar_jax.sampling.schedule import DEFAULT, Changes, Schedule, ScheduleLike
from hmar_jax.transformer import fused, teacher_forcing
from hmar_jax.transformer.hmar import HMAR
from hmar_jax.xla import use_compilation_cache


class DrawRecord(NamedTuple):
    """One pass as `Sample.draws` lists it: scale and step from 0, the others (B,N) as in `sampler.Draw`."""

    scale: int
    step: int
    tokens: np.ndarray
    masked: np.ndarray
    confidence: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sample:
    """What `Model.sample` and `Model.edit` give.

    Attributes:
      images: (B,S,S,3) float32 in [0,1]. tokens: (B,L) int32, final.
      draws: with `record=True` every pass's draw, in order; else None.
    """

    images: np.ndarray
    tokens: np.ndarray
    draws: list[DrawRecord] | None = None


class Model:
    """A tokenizer with or without a transformer, ready to use.

    Attributes:
      config: what it is.
      params: nested dicts of arrays, `tokenizer` and perhaps `transformer`: float32, or bfloat16 if stored so or if
        products in bfloat16 read them; on GPUs in the layout for them (`networks.Layout.unpack` undoes that).
      tokenizer: `encode` and `decode`. transformer: the HMAR or VAR module, None in a tokenizer's model directory.
      about: what its model directory says beside the config, for `save`.
      sampling: schedules that it recommends, by name, for `save` too; `default` is used where nothing else is said.
    """

    def __init__(self, config: ModelConfig, params: dict[str, Any], dtype: str = "float32"):
        if not isinstance(config, ModelConfig):
            raise InputError(f"config is {shown(config)}; expected a ModelConfig.")
        check_choice("dtype", dtype, ("float32", "bfloat16"))
        networks_here = {"tokenizer", "transformer"} if config.transformer else {"tokenizer"}
        if not isinstance(params, dict) or params.keys() != networks_here:
            raise InputError(f"params is {shown(params)}; expected a dict of {' and '.join(sorted(networks_here))}.")
        self.config, self.params, self.dtype = config, hold(config, params, dtype), dtype
        self.tokenizer = TokenizerDoor(config, self.params, dtype)
        self._placed: tuple[Mesh, list[Any], Any] | None = None
        self.about = About()
        self.sampling: dict[str, Schedule] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy holds: config, dtype, `about`, `sampling`, and the parameters in host memory."""
        params = jax.tree.map(on_host, Layout.unpack(self.params))
        kept = {"about": self.about, "sampling": self.sampling}
        return {"config": self.config, "params": params, "dtype": self.dtype} | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"], jax.tree.map(jnp.asarray, state["params"]), state["dtype"])  # type: ignore[misc]
        self.about, self.sampling = state["about"], state["sampling"]

    @property
    def transformer(self) -> HMAR | None:
        return networks(self.config, self.params, self.dtype).transformer if self.config.transformer else None

    def next_scale_logits(self, labels: ArrayLike, tokens: ArrayLike) -> jax.Array:
        """Teacher-forced logits: labels (B,) in [0, num_classes] (the last is the null class), tokens (B,L) →
        (B,L,V) float32; no class dropout.
        """  # fmt: skip
        labels, tokens = self._check(labels, tokens)
        return _logits(self.config, self.dtype, self.params, labels, tokens, None)

    def masked_logits(self, labels: ArrayLike, tokens: ArrayLike, masked: ArrayLike) -> jax.Array:
        """Logits of the mask branch: as `next_scale_logits`, with masked (B,L) bool → (B,L,V) float32."""
        labels, tokens = self._check(labels, tokens)
        masked = host_array("masked is", masked, f"bool {tokens.shape}, as the tokens")
        if masked.dtype != bool or masked.shape != tokens.shape:
            raise InputError(f"masked is {masked.dtype} {masked.shape}; expected bool {tokens.shape}, as the tokens.")
        if not self._check_transformer().masked:
            raise InputError("This model has no mask branch; train stage `masked`, or use next_scale_logits.")
        return _logits(self.config, self.dtype, self.params, labels, tokens, masked)

    def sample(
        self,
        labels: ArrayLike,
        schedule: ScheduleLike | None = None,
        *,
        seed: int = 0,
        numbers: ArrayLike | None = None,
        greedy: bool = False,
        record: bool = False,
        on_scale: progress.OnScale | None = None,
        **changes: Unpack[Changes],
    ) -> Sample:
        """Samples pictures; each depends on (seed, its number, its label) alone, whatever the batch and the devices.

        So it is in float32; in bfloat16 products round otherwise in another batch or on another device, so that now and
        then a near-tie between tokens falls otherwise.

        Args:
          labels: (B,) int in [0, num_classes).
          schedule: a `Schedule`, the `Path` of a .json file, or text as `Schedule.parse` takes it: a preset's name, a
            file, or a curve and steps such as `cosine:4@5-9`; names and curves bring the published guidance of the
            model's depth. A name in `sampling` goes before all of these. By default the model's own `default`, or
            `next-scale`, for VAR `var`.
          seed: of the random numbers, in [0, 2³²). numbers: (B,) int, likewise, which of the seed's samples each is; 0
            to B-1 by default. greedy: argmax of the guided logits, no filters. record: give every pass's draw.
          on_scale: called with each scale, from 0, and its tokens (B,N) int32 once they are final, in order and in the
            caller's thread, while the sampling goes on. Another function compiles nothing.
          changes: cfg, temperature, top_k, top_p, noise, refine_cfg, order: override the schedule's, as in
            `Schedule.replace`. They compile nothing, but for the order, or where guidance appears or vanishes.
        """
        labels = self._check_labels(labels, self.config.num_classes - 1)
        schedule = self.schedule(schedule, **changes)
        return self._sample(labels, schedule, seed, numbers, greedy=greedy, record=record, on_scale=on_scale)

    def edit(
        self,
        images: ArrayLike,
        mask: ArrayLike,
        labels: ArrayLike | None = None,
        schedule: ScheduleLike | None = None,
        *,
        variants: int = 1,
        composite: bool = False,
        feather: int | None = None,
        seed: int = 0,
        numbers: ArrayLike | None = None,
        greedy: bool = False,
        record: bool = False,
        **changes: Unpack[Changes],
    ) -> Sample:
        """Draws a part of pictures anew (zero-shot editing): their other tokens are kept, whatever is drawn.

        A token that the mask only touches is drawn whole. The scale of one token, which is the mean colour, is kept
        whatever the mask. Pixels outside the mask change as well, for coarse tokens and the decoder reach over its rim,
        unless `composite`. Each result depends on its picture, mask, label and (seed, its number), as in `sample`.

        Args:
          images: (B,S,S,3) uint8 or float in [0,1], or one of them.
          mask: bool (S,S) or (B,S,S), True where to draw anew, or a box (left, top, right, bottom) in pixels.
          labels: (B,) int in [0, num_classes], the last being the null class, or one for all. None is the null class,
            pure in- or out-painting; guidance is left out where it would guide by nothing.
          schedule: as in `sample`, each scale's counts shared out in proportion to its tokens to draw. By default
            the model's own `default`, or `small` where it has a mask branch, whose passes see the kept tokens.
          variants: results for each picture, 10,000 at most, one after the other: B·variants pictures, each with its
            number.
          composite: outside the mask give the input's pixels, bit for bit, and inside it blend them in, over `feather`
            pixels from its rim; half a token by default.
          seed, greedy, record, changes: as in `sample`.
        """
        transformer, size = self._check_transformer(), self.config.image_size
        composite = flag("composite", composite)
        feather = self.config.tokenizer.downsampling // 2 if feather is None else whole("feather", feather, 0)
        several = functools.partial(np.repeat, repeats=whole("variants", variants, 1, 10_000), axis=0)
        pictures = editing.check_pictures(images, size)
        masks = editing.check_mask(mask, len(pictures), size)
        labels = self._label_each(labels, len(pictures))
        asked = changes.copy()
        if (labels == self.config.num_classes).all():
            changes["cfg"] = changes["refine_cfg"] = 0
        if schedule is None and transformer.masked and DEFAULT not in self.sampling:
            schedule = "small"
        schedule = self.schedule(schedule, **changes)
        schedule.replace(**asked)  # guidance that is left out is checked all the same
        tokens = on_host(self.tokenizer.encode(to_signed(pictures)))
        keep = editing.keep_tokens(masks, self.config.ladder)
        kept = Kept(*(jnp.asarray(several(array)) for array in (tokens, keep)))
        out = self._sample(several(labels), schedule, seed, numbers, greedy=greedy, record=record, kept=kept)
        if not composite:
            return out
        blended = editing.composite(out.images, several(pictures), several(masks), feather)
        return dataclasses.replace(out, images=blended)

    def schedule(self, schedule: ScheduleLike | None = None, **changes: Unpack[Changes]) -> Schedule:
        """The schedule that `sample` follows, given this one and these changes (`Schedule.replace`), checked."""
        return Schedule.resolve(schedule, self.config.ladder, self._check_transformer(), self.sampling, **changes)

    def save(
        self,
        path: str | Path,
        *,
        source: str | None = None,
        licences: Sequence[str] | None = None,
        replace: bool = False,
    ) -> Path:
        """Writes a model directory, whole or not at all, with the weights in the dtypes that they are held in.

        Args:
          path: to write to; must not exist, unless `replace`.
          source: one line on where the weights come from. licences: sentences on those they are bound to. None of
            either keeps what the directory said that the model was loaded from.

        Returns:
          The path.

        Raises:
          InputError: the path exists, weights that are not finite, or the disk refused. MachineError: it is full.
        """
        given: dict[str, Any] = {"source": source, "licences": licences}
        about = dataclasses.replace(self.about, **{name: value for name, value in given.items() if value is not None})

        def parts(leaf: Any) -> list[np.ndarray]:
            return [np.asarray(leaf)]

        flat = {
            name: Tensor(tuple(leaf.shape), np.dtype(leaf.dtype), functools.partial(parts, leaf))
            for name, leaf in trees.flatten(Layout.unpack(self.params)).items()
        }
        return write_model(path, self.config, flat, **vars(about), sampling=self.sampling, replace=replace)

    def placed(self, mesh: Mesh) -> Any:
        """The parameters, whole on each device of a mesh, if nobody has said where they are to be.

        They stay there for the next call: what is not there JAX sends again in every one, and even on one device looks
        at each array for a microsecond to find that it is.
        """
        leaves = jax.tree.leaves(self.params)
        if any(getattr(leaf, "committed", False) for leaf in leaves):
            return self.params
        if self._placed is not None:
            there, were, placed = self._placed
            if there == mesh and len(were) == len(leaves) and all(map(operator.is_, were, leaves)):
                return placed
        placed = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        self._placed = mesh, leaves, placed
        return placed

    def _sample(
        self,
        labels: ArrayLike,
        schedule: Schedule,
        seed: int,
        numbers: ArrayLike | None,
        *,
        greedy: bool,
        record: bool,
        kept: Kept | None = None,
        on_scale: progress.OnScale | None = None,
    ) -> Sample:
        """`sample` with checked labels and schedule, perhaps with tokens that are kept."""
        labels, seed = np.asarray(labels), whole("seed", seed, 0, 2**32 - 1)
        greedy, record = flag("greedy", greedy), flag("record", record)
        if on_scale is not None and not callable(on_scale):
            raise InputError(f"on_scale is {shown(on_scale)}; expected a function of a scale and its tokens.")
        number = labels.shape[0]
        numbers = np.arange(number, dtype=np.uint32) if numbers is None else _check_numbers(numbers, number)
        options = program.Options(self.config, self.dtype, schedule.plan, greedy, record)
        mesh = mesh_in_use()
        labels, numbers, kept = jax.tree.map(lambda array: over_devices(array, mesh), (labels, numbers, kept))
        arguments = (self.placed(mesh), labels, numbers, schedule.controls, np.uint32(seed), kept)
        if on_scale is None:
            with jax.set_mesh(mesh):
                images, tokens, draws = program.sample(options, *arguments, None)
        else:
            images, tokens, draws = _sample_telling(
                mesh, options, arguments, lambda scale, tokens: on_scale(scale, tokens[:number])
            )
        records = None
        if record:
            passes = [at for scale in range(len(schedule.counts)) for at in schedule.plan.passes(scale)]
            records = [
                DrawRecord(at.scale, at.step, *(on_host(array)[:number] for array in draw))
                for at, draw in zip(passes, draws, strict=True)
            ]
        return Sample(on_host(images)[:number], on_host(tokens)[:number], records)

    def _check(self, labels: ArrayLike, tokens: ArrayLike) -> tuple[np.ndarray, jax.Array]:
        """Labels up to the null class, and as many rows of tokens, as int32."""
        labels, tokens = self._check_labels(labels, self.config.num_classes), check_tokens(self.config, tokens)
        if tokens.shape[0] != labels.shape[0]:
            raise InputError(f"There are {labels.shape[0]} labels but tokens of {tokens.shape[0]} pictures.")
        return labels, tokens

    def _check_labels(self, labels: ArrayLike, highest: int) -> np.ndarray:
        """Labels from 0 to `highest` as int32."""
        self._check_transformer()
        given, expected = labels, f"a list of integers from 0 to {highest}"
        labels = host_array("Labels are", given, expected)
        if labels.ndim != 1 or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"Labels are {shown(given)}; expected {expected}.")
        if labels.min() < 0 or labels.max() > highest:
            wrong = labels[(labels < 0) | (labels > highest)][0]
            raise InputError(
                f"Label {wrong} is out of range; this model has classes 0 to {self.config.num_classes - 1}."
            )
        return labels.astype(np.int32)

    def _label_each(self, labels: ArrayLike | None, pictures: int) -> np.ndarray:
        """Labels to edit by as (B,) int32, from as many, one for all, or None, the null class."""
        null = self.config.num_classes
        array = host_array(
            "Labels are", null if labels is None else labels, f"a list of integers from 0 to {null}, or one"
        )
        checked = self._check_labels(np.full(pictures, array) if array.ndim == 0 else array, null)
        if len(checked) != pictures:
            raise InputError(f"There are {len(checked)} labels for {pictures} pictures; give one each, or one.")
        return checked

    def _check_transformer(self) -> TransformerConfig:
        if self.config.transformer is None:
            raise InputError("This model is a tokenizer alone; give a model directory that has a transformer.")
        return self.config.transformer


def _sample_telling(
    mesh: Mesh, options: program.Options, arguments: tuple[Any, ...], on_scale: progress.OnScale
) -> tuple[jax.Array, jax.Array, Any]:
    """`program.sample` of the options and arguments, calling `on_scale` meanwhile.

    The program runs in a thread of its own, where what a caller has set by JAX's context managers (the precision of
    products, the default device, checks for NaN) does not hold. So it is compiled here, once for all calls as JAX keeps
    what it compiles, and its results are checked here.
    """
    with jax.set_mesh(mesh):
        compiled = program.sample.lower(options, *arguments, np.uint32(0)).compile()
    out = progress.relay(lambda ticket: jax.block_until_ready(compiled(*arguments, ticket)), on_scale)
    if jax.config.jax_debug_nans or jax.config.jax_debug_infs:
        jax.tree.map(jnp.copy, out)  # JAX looks at the results of what runs here
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    config: ModelConfig, dtype: str, params: Any, labels: jax.Array, tokens: jax.Array, masked: jax.Array | None
) -> jax.Array:
    """Teacher-forced, (B,L,V) float32: of the mask branch where there is a mask (B,L), else of the next-scale one."""
    nets = networks(config, params, dtype)
    leak_free = config.transformer is not None and config.transformer.leak_free
    return teacher_forcing.predict(
        nets.transformer, nets.tokenizer.quantizer, labels, tokens, fused.logits, masked, leak_free=leak_free
    )


def _check_numbers(numbers: ArrayLike, batch: int) -> np.ndarray:
    """Numbers of samples as uint32."""
    expected = f"{batch} integers from 0 to {2**32 - 1}, one a label"
    array = host_array("numbers are", numbers, expected)
    if array.shape != (batch,) or not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() >= 2**32:
        raise InputError(f"numbers are {shown(numbers)}; expected {expected}.")
    return array.astype(np.uint32)


def from_pretrained(path: str | Path, dtype: str = "float32", revision: str | None = None) -> Model:
    """Loads a model directory, and has JAX keep what it compiles (`xla.use_compilation_cache`).

    Args:
      path: of the directory, or a Hugging Face hub id such as `someone/hmar-d16`, which is downloaded once and cached.
      dtype: compute dtype, `float32` or `bfloat16`; with the latter, what products read is held in it too.
      revision: branch, tag or commit of the hub repository.

    Raises:
      InputError: no model there, damaged weights, or entries that don't fit the config, by name.
    """
    check_choice("dtype", dtype, ("float32", "bfloat16"))
    opened = open_model(path, revision)
    use_compilation_cache()
    held = held_dtypes(opened.config, dtype)
    model = Model(opened.config, read_params(opened, put=lambda name, x: jnp.asarray(x, held.get(name))), dtype)
    model.about, model.sampling = opened.about, opened.sampling
    return model
