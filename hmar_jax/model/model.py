"""config + parameters → Model: tokenizer, transformer and sampler behind one object, all of it jitted.

Axis letters: B batch, S pixels a side, L tokens, N tokens of one scale, V codebook.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from hmar_jax import params as trees
from hmar_jax.arrays import flag, host_array, mesh_in_use, on_host, whole
from hmar_jax.config import ModelConfig, TransformerConfig
from hmar_jax.errors import InputError, shown
from hmar_jax.formats.model_directory import About, write_model
from hmar_jax.formats.safetensors_files import Tensor
from hmar_jax.images import from_signed, to_signed
from hmar_jax.model import drawing
from hmar_jax.model.arguments import Labels, check_mesh, compute_dtype, read_labels, read_numbers
from hmar_jax.model.drawing import Event
from hmar_jax.model.sample import Sample
from hmar_jax.model.tokenizer import ModelTokenizer, check_tokens
from hmar_jax.networks import Layout, hold, networks
from hmar_jax.parallel.sharding import replicated
from hmar_jax.sampling import editing
from hmar_jax.sampling.program import Request
from hmar_jax.sampling.sampler import Kept
from hmar_jax.sampling.schedule import DEFAULT, Changes, Schedule, ScheduleLike
from hmar_jax.transformer import fused, teacher_forcing
from hmar_jax.transformer.hmar import HMAR


class Model:
    """A tokenizer with or without a transformer, ready to use.

    A model can be pickled and copied at any time; the copy has its parameters on the default device, and no mesh.

    Args:
      config: what it is. params: nested dicts of arrays, `tokenizer` and perhaps `transformer`.
      dtype: compute dtype, float32 or bfloat16, as NumPy or JAX take one.
      mesh: devices to hold the parameters, whole on each, and to split batches of samples over. None leaves them where
        they are, and splits batches over the mesh in use (`jax.set_mesh`), or else over all local devices. Where both
        are given, this one holds.

    Attributes:
      config, mesh: as given. dtype: `float32` or `bfloat16`.
      params: as given, in float32, or bfloat16 if stored so or if products in bfloat16 read them; on GPUs in the
        layout for them (`networks.Layout.unpack` undoes that).
      tokenizer: `encode` and `decode`. transformer: the HMAR or VAR module, None in a tokenizer's model directory.
      about: what its model directory says beside the config, for `save`.
      sampling: schedules that it recommends, by name, for `save` too; `default` is used where nothing else is said.
    """

    def __init__(
        self, config: ModelConfig, params: dict[str, Any], dtype: DTypeLike = "float32", mesh: Mesh | None = None
    ):
        if not isinstance(config, ModelConfig):
            raise InputError(f"config is {shown(config)}; expected a ModelConfig.")
        networks_here = {"tokenizer", "transformer"} if config.transformer else {"tokenizer"}
        if not isinstance(params, dict) or params.keys() != networks_here:
            raise InputError(f"params is {shown(params)}; expected a dict of {' and '.join(sorted(networks_here))}.")
        self.config, self.dtype, self.mesh, self.about = config, compute_dtype(dtype), check_mesh(mesh), About()
        held = hold(config, params, self.dtype)
        self.params = held if mesh is None else jax.device_put(held, replicated(mesh))
        self.tokenizer = ModelTokenizer(config, self.params, self.dtype)
        self._placed: tuple[Mesh, list[Any], Any] | None = None
        self.sampling: dict[str, Schedule] = {}

    def __repr__(self) -> str:
        kind = "tokenizer"
        if (transformer := self.config.transformer) is not None:
            family = "VAR" if transformer.is_var else "HMAR" if transformer.masked else "HMAR without masked steps,"
            kind = f"{family} d{transformer.depth}"
        count: float = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        for unit in ("", "K", "M", "B"):
            if count < 1000 or unit == "B":
                break
            count /= 1000
        number = f"{count:.0f}" if count >= 100 else f"{count:.3g}"
        return f"Model({kind}, {self.config.image_size} px, {number}{unit} parameters, {self.dtype})"

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

    def next_scale_logits(self, labels: Labels, tokens: ArrayLike) -> jax.Array:
        """Teacher-forced logits: labels (B,) as in `sample`, or num_classes, the null class; tokens (B,L) → (B,L,V)
        float32; no class dropout.
        """  # fmt: skip
        labels, tokens = self._check(labels, tokens)
        return _logits(self.config, self.dtype, self.params, labels, tokens, None)

    def masked_logits(self, labels: Labels, tokens: ArrayLike, masked: ArrayLike) -> jax.Array:
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
        labels: Labels,
        schedule: ScheduleLike | None = None,
        *,
        seed: int = 0,
        numbers: ArrayLike | None = None,
        greedy: bool = False,
        record: bool = False,
        per_label: int = 1,
        batch_size: int | None = None,
        decode: bool = True,
        **changes: Unpack[Changes],
    ) -> Sample:
        """Samples pictures; each depends on (seed, its number, its label) alone, whatever the batch and the devices.

        So it is in float32; in bfloat16 products round otherwise in another batch or on another device, so that now and
        then a near-tie between tokens falls otherwise.

        Args:
          labels: classes, one or a list or array of them. A str is one class's name, or failing that its number in
            digits; an int is a class's number, in [0, num_classes). Where classes have numbers for names, a str is
            always a name: "3" is the class called 3, and 3 the fourth class.
          schedule: a `Schedule`, the `Path` of a .json file, or text as `Schedule.parse` takes it: a preset's name, a
            file, or a curve and steps such as `cosine:4@5-9`; names and curves bring the published guidance of the
            model's depth. A name in `sampling` goes before all of these. By default the model's own `default`, or
            `next-scale`, for VAR `var`.
          seed: of the random numbers, in [0, 2³²).
          numbers: (B,) int, likewise, which of the seed's samples each is; 0 to B-1 by default.
          greedy: argmax of the guided logits, no filters. record: give every pass's draw.
          per_label: pictures of each label, 10,000 at most, one label after the other: B = labels · per_label.
          batch_size: how many are drawn at a time, with one program for all batches; by default all at once.
          decode: False gives the tokens without images.
          changes: cfg, temperature, top_k, top_p, noise, refine_cfg, order: override the schedule's, as in
            `Schedule.replace`. They compile nothing, but for the order, or where guidance appears or vanishes.

        Returns:
          B pictures, their arrays in host memory.
        """
        options: dict[str, Any] = {"seed": seed, "numbers": numbers, "greedy": greedy, "record": record}
        labels = self._repeated(labels, per_label)
        request = self._request(labels, self.schedule(schedule, **changes), decode=decode, **options)
        return self._draw(request, batch_size)

    def stream(
        self,
        labels: Labels,
        schedule: ScheduleLike | None = None,
        *,
        seed: int = 0,
        numbers: ArrayLike | None = None,
        greedy: bool = False,
        per_label: int = 1,
        decode: bool = True,
        **changes: Unpack[Changes],
    ) -> Generator[Event]:
        """Samples pictures and yields an `Event` for each scale once it is finished, while the sampling goes on.

            for event in model.stream("fox"):
                show(event.images)

        The tokens are those that `sample` draws with the same arguments. `images` are decoded from the tokens so far
        when an event is read, in the reader's thread; the last ones are those of `sample` but for rounding. Arguments
        are checked and the program is compiled by the call itself. A loop that is left early waits for the program's
        end. With several processes, that of the first device alone reads events.

        Args:
          As in `sample`.
        """
        options: dict[str, Any] = {"seed": seed, "numbers": numbers, "greedy": greedy, "decode": False}
        decode = flag("decode", decode)
        request = self._request(self._repeated(labels, per_label), self.schedule(schedule, **changes), **options)
        tokenizer = self.tokenizer.here()

        def grown(tokens: np.ndarray, scale: int) -> np.ndarray:
            return from_signed(on_host(tokenizer.decode_until(tokens[None], [scale])[0]))

        return drawing.stream(request, self._mesh(), grown if decode else None)

    def edit(
        self,
        images: ArrayLike,
        mask: ArrayLike,
        labels: Labels | None = None,
        schedule: ScheduleLike | None = None,
        *,
        variants: int = 1,
        composite: bool = False,
        feather: int | None = None,
        seed: int = 0,
        numbers: ArrayLike | None = None,
        greedy: bool = False,
        record: bool = False,
        batch_size: int | None = None,
        decode: bool = True,
        **changes: Unpack[Changes],
    ) -> Sample:
        """Draws a part of pictures anew (zero-shot editing): their other tokens are kept, whatever is drawn.

        A token that the mask only touches is drawn whole. The scale of one token, which is the mean colour, is kept
        whatever the mask. Pixels outside the mask change as well, for coarse tokens and the decoder reach over its rim,
        unless `composite`. Each result depends on its picture, mask, label and (seed, its number), as in `sample`.

        Args:
          images: (B,S,S,3) uint8 or float in [0,1], or one of them.
          mask: bool (S,S) or (B,S,S), True where to draw anew, or a box (left, top, right, bottom) in pixels.
          labels: one for all or (B,), as in `sample`, or num_classes, the null class. None is the null class too, pure
            in- or out-painting; guidance is left out where it would guide by nothing.
          schedule: as in `sample`, each scale's counts shared out in proportion to its tokens to draw. By default
            the model's own `default`, or `small` where it has a mask branch, whose passes see the kept tokens.
          variants: results for each picture, 10,000 at most, one after the other: B·variants pictures, each with its
            number.
          composite: outside the mask give the input's pixels, bit for bit, and inside it blend them in, over `feather`
            pixels from its rim; half a token by default.
          seed, greedy, record, batch_size, decode, changes: as in `sample`.
        """
        self._check_transformer()
        size, ladder = self.config.image_size, self.config.ladder
        if (composite := flag("composite", composite)) and not flag("decode", decode):
            raise InputError("composite blends pictures, which decode=False leaves out; leave one of the two out.")
        feather = self.config.tokenizer.downsampling // 2 if feather is None else whole("feather", feather, 0)
        several: Any = functools.partial(np.repeat, repeats=whole("variants", variants, 1, 10_000), axis=0)
        pictures = editing.check_pictures(images, size)
        masks = editing.check_mask(mask, len(pictures), size)
        labels = self._label_each(labels, len(pictures))
        schedule = self._edit_schedule(schedule, labels, changes)
        tokens = on_host(self.tokenizer.encode(to_signed(pictures)))
        kept = Kept(several(tokens), several(editing.keep_tokens(masks, ladder)))
        options: dict[str, Any] = {"seed": seed, "numbers": numbers, "greedy": greedy, "record": record, "kept": kept}
        request = self._request(several(labels), schedule, decode=decode, **options)
        out = self._draw(request, batch_size)
        if not composite or out.images is None:
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
        replace = flag("replace", replace)
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
        placed = jax.device_put(self.params, replicated(mesh))
        self._placed = mesh, leaves, placed
        return placed

    def _mesh(self) -> Mesh:
        """The devices that samples are split over."""
        return mesh_in_use() if self.mesh is None else self.mesh

    def _request(
        self, labels: np.ndarray, schedule: Schedule, *, seed: int, numbers: ArrayLike | None, **options: Any
    ) -> Request:
        """A request of NumPy arrays, given checked labels (B,) and schedule; other arguments are checked."""
        seed = whole("seed", seed, 0, 2**32 - 1)
        options |= {name: flag(name, value) for name, value in options.items() if name != "kept"}
        if numbers is not None:
            numbers = read_numbers(numbers, len(labels))
        params = self.placed(self._mesh())
        return Request.of(self.config, self.dtype, schedule, params, labels, numbers=numbers, seed=seed, **options)

    def _draw(self, request: Request, batch_size: int | None) -> Sample:
        if batch_size is not None:
            batch_size = whole("batch_size", batch_size, 1)
        return drawing.draw(request, self._mesh(), batch_size)

    def _repeated(self, labels: Labels, per_label: int) -> np.ndarray:
        """Labels to sample by as (B,) int32, each `per_label` times."""
        self._check_transformer()
        once = np.atleast_1d(read_labels(self.config, labels))
        return np.repeat(once, whole("per_label", per_label, 1, 10_000))

    def _edit_schedule(self, schedule: ScheduleLike | None, labels: np.ndarray, changes: Changes) -> Schedule:
        """The schedule of an edit, without guidance where all labels are the null class."""
        if schedule is None and self._check_transformer().masked and DEFAULT not in self.sampling:
            schedule = "small"
        if (labels != self.config.num_classes).any():
            return self.schedule(schedule, **changes)
        unguided = self.schedule(schedule, **changes | Changes(cfg=0, refine_cfg=0))
        unguided.replace(**changes)  # guidance that is left out is checked all the same
        return unguided

    def _label_each(self, labels: Labels | None, pictures: int) -> np.ndarray:
        """Labels to edit by as (B,) int32, from as many, one for all, or None, the null class."""
        null = self.config.num_classes
        read = read_labels(self.config, null if labels is None else labels, null=True)
        if read.ndim and len(read) != pictures:
            raise InputError(f"There are {len(read)} labels for {pictures} pictures; give one each, or one.")
        return np.broadcast_to(read, (pictures,))

    def _check(self, labels: Labels, tokens: ArrayLike) -> tuple[np.ndarray, jax.Array]:
        """Labels up to the null class, and as many rows of tokens, as int32."""
        self._check_transformer()
        labels = np.atleast_1d(read_labels(self.config, labels, null=True))
        tokens = check_tokens(self.config, tokens)
        if tokens.shape[0] != labels.shape[0]:
            raise InputError(f"There are {labels.shape[0]} labels but tokens of {tokens.shape[0]} pictures.")
        return labels, tokens

    def _check_transformer(self) -> TransformerConfig:
        if self.config.transformer is None:
            raise InputError("This model is a tokenizer alone; give a model directory that has a transformer.")
        return self.config.transformer


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
