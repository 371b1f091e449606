"""counts and scalars per scale and step → a static plan and traced controls: how a picture is sampled, as data.

A schedule says, for every scale, how many tokens each step commits: `[[1], [1, 3], [1, 3, 5]]` draws the 2x2 map in two
steps. The first step of a scale is its next-scale pass, the others are masked passes (HMAR §4.3). Beside each count
stand the scalars of that pass: guidance, temperature, top-k, top-p, confidence noise. One order policy for all scales
says which tokens a step commits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import numpy as np

from hmar_jax.config import TransformerConfig
from hmar_jax.errors import InputError, saying, shown
from hmar_jax.files import json_files, local_path, read_bytes
from hmar_jax.sampling import generators, presets
from hmar_jax.sampling.presets import ORDERS, Order
from hmar_jax.sampling.scalars import SCALARS, Nested, check_range, checked_counts, nested_like, ramped
from hmar_jax.scales import ScaleLadder

type ScheduleLike = str | os.PathLike[str] | Schedule  # as `Schedule.resolve` takes it

DEFAULT = "default"  # the name of what a model recommends where nothing else is said
_SCHEDULES = "a Schedule, the name of one, a curve and steps such as cosine:4@5-9, or a .json file"


class Changes(TypedDict, total=False):
    """What `Schedule.replace` takes, as `Schedule.from_counts` does; None leaves a thing as it is."""

    cfg: Any
    temperature: Any
    top_k: Any
    top_p: Any
    noise: Any
    refine_cfg: float | None
    order: Order | None


class Pass(NamedTuple):
    """One run of the transformer.

    Attributes:
      scale, step: from 0; step 0 is the next-scale pass. number: among all passes, from 0.
      remaining: tokens of the scale that are still open after it.
      guided: whether the null half is computed.
    """

    scale: int
    step: int
    number: int
    remaining: int
    guided: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a schedule: what a compilation depends on."""

    counts: tuple[tuple[int, ...], ...]
    guided: tuple[tuple[bool, ...], ...]
    order: Order = "confidence"

    def passes(self, scale: int) -> Iterator[Pass]:
        """The passes of one scale, in order."""
        first = sum(len(steps) for steps in self.counts[:scale])
        for step, guided in enumerate(self.guided[scale]):
            remaining = sum(self.counts[scale][step + 1 :])
            yield Pass(scale, step, first + step, remaining, guided)


class Controls(NamedTuple):
    """The traced part of a schedule: one number a pass, (P,) each; all float32 but top_k int32."""

    cfg: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    noise: jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many tokens each step commits, which they are, and the scalars of each pass, nested like the counts.

    Attributes:
      counts: tokens committed; those of a scale sum to p². 16,384 passes at most.
      cfg: guidance t in (1+t)·cond - t·null. Where it is 0 the null half is not computed.
      temperature: logits are divided by it, > 0.
      top_k: logits kept, ties with the last included; 0 keeps all.
      top_p: the ascending tail of mass at most 1 - top_p is dropped; 1 keeps all.
      noise: Gumbel noise on the log-confidence that orders commitment, ≥ 0; 0 is the published order.
      order: `confidence`, the most confident tokens first; `random`, uniformly and fixed by a sample's own key; or
        `halton`, spread evenly over the map and the same for all samples. The last two have no use for noise.
    """

    counts: tuple[tuple[int, ...], ...]
    cfg: Nested
    temperature: Nested
    top_k: Nested
    top_p: Nested
    noise: Nested
    order: Order = "confidence"

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", checked_counts(self.counts))
        for name in SCALARS:
            object.__setattr__(self, name, nested_like(name, getattr(self, name), self.counts))
            check_range(name, getattr(self, name))
        if not isinstance(self.order, str) or self.order not in ORDERS:
            raise InputError(f"order is {shown(self.order)}; expected {', '.join(ORDERS[:-1])} or {ORDERS[-1]}.")

    @classmethod
    def from_counts(
        cls,
        counts: Sequence[Sequence[int]],
        *,
        cfg: Any = 1.7,
        temperature: Any = 1.0,
        top_k: Any = 1000,
        top_p: Any = 0.99,
        noise: Any = 0.0,
        refine_cfg: float | None = None,
        order: Order = "confidence",
    ) -> Schedule:
        """A schedule from counts, by default with the guidance published for d16.

        Guidance of the passes of scale k, from 0, of K scales; the ramps are those published:

            cfg      refine_cfg   next-scale pass   masked passes
            t        None         t·k/(K-1)         0
            t        u            t·k/(K-1)         u·k/(K-1)
            nested   None         as nested         as nested
            nested   u            as nested         u·k/(K-1)

        Args:
          counts: per scale, the tokens that each of its steps commits.
          cfg: a number t, or numbers nested like `counts`. refine_cfg: None, or a number u: guided refinement.
          temperature, top_k, top_p, noise: a number for all passes, or nested like `counts`.
          order: as in the class.

        Raises:
          InputError: counts that are not positive or don't sum to a square, or scalars of another shape or range.
        """
        nested = checked_counts(counts)
        if isinstance(cfg, Real):
            cfg = ramped(cfg, tuple((0.0,) * len(steps) for steps in nested), refine=False)
        given = {"cfg": cfg, "temperature": temperature, "top_k": top_k, "top_p": top_p, "noise": noise}
        scalars = {name: nested_like(name, value, nested) for name, value in given.items()}
        if refine_cfg is not None:
            scalars["cfg"] = ramped(refine_cfg, scalars["cfg"], refine=True)
        return cls(nested, **scalars, order=order)

    @classmethod
    def preset(cls, name: str, ladder: ScaleLadder, depth: int = 16) -> Schedule:
        """A named schedule for a ladder, with the published guidance of the given transformer depth, or of the nearest
        depth that has one.

        `official-256`, `official-512`, `official-1024` are published, each for its ladder. `small` has their masked
        steps on whichever of the sides 2, 3 and 4 a ladder has; `next-scale` and `var` have no masked step, the latter
        the guidance published for VAR: these three are for any ladder.
        """
        _check_ladder(ladder)
        schedule = cls.from_counts(presets.counts(name, ladder), **presets.guidance(depth, name))
        schedule.check_ladder(ladder, name)
        return schedule

    @classmethod
    def generate(
        cls,
        ladder: ScaleLadder,
        curve: str = "single",
        steps: int | None = None,
        scales: tuple[int, int] | None = None,
        *,
        exponent: float | None = None,
        **scalars: Any,
    ) -> Schedule:
        """A schedule from a few numbers: the same steps on some scales of a ladder, shared out by a curve.

        Args:
          ladder: its first scale has one step always, and no scale more steps than tokens.
          curve: `single`, one step a scale; or the share of tokens still masked once a share r of the steps is done:
            `equal` 1 - r, `cosine` cos(πr/2), `arccos` 2/π·arccos(r) (MaskGIT's), `power` 1 - r^exponent. What is
            masked after a step is the whole number nearest to it that leaves every step a token.
          steps: of each scale, its next-scale pass included. scales: the first and the last that have them, from 1, the
            others having one step; all by default.
          exponent: of `power` alone. scalars: cfg, refine_cfg, order and others, as in `from_counts`.
        """
        _check_ladder(ladder)
        return cls.from_counts(generators.generate(ladder, curve, steps, scales, exponent), **scalars)

    @classmethod
    def parse(
        cls,
        text: str | os.PathLike[str],
        ladder: ScaleLadder,
        depth: int = 16,
        recommended: Mapping[str, Schedule] | None = None,
    ) -> Schedule:
        """A schedule for a ladder in one line: a name, a `.json` file, or a curve such as `cosine:4@5-9`.

        A `Path` is a file, whatever its name. Curves are `curve:steps@first-last`, as in `generate`: `single`,
        `equal:2`, `power2:4@3-10`, `arccos:8@10`. They have, like the presets, the published guidance of the given
        transformer depth.

        Args:
          recommended: schedules of a model, by name, which win over presets and curves of the same name.
        """
        _check_ladder(ladder)
        recommended = recommended or {}
        if isinstance(text, str) and text in recommended:
            if not isinstance(schedule := recommended[text], Schedule):
                raise InputError(f"The model's schedule {shown(text)} is {shown(schedule)}; expected a Schedule.")
            return schedule
        if not isinstance(text, str | os.PathLike):
            raise InputError(f"The schedule is {shown(text)}; expected {_SCHEDULES}.")
        if not isinstance(text, str) or text.lower().endswith(".json"):
            path = local_path(text, "The schedule")
            file = f"Schedule file {text}"
            try:
                content = read_bytes(path, "Schedule file", json_files.MOST_BYTES)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise InputError(f"{file} cannot be read ({error}); write one with Schedule.to_json.") from None
            with saying(file):
                schedule = cls.from_json(content)
            schedule.check_ladder(ladder, file)
            return schedule
        generated = generators.parse(text)
        if generated is None:
            if text not in presets.NAMES:
                raise presets.unknown(text, recommended)
            return cls.preset(text, ladder, depth)
        return cls.generate(ladder, **generated, **presets.guidance(depth))

    @classmethod
    def resolve(
        cls,
        schedule: ScheduleLike | None,
        ladder: ScaleLadder,
        model: TransformerConfig,
        recommended: Mapping[str, Schedule] | None = None,
        **changes: Unpack[Changes],
    ) -> Schedule:
        """The schedule that a transformer samples by, given this one and these changes (`replace`), checked.

        Args:
          schedule: itself, or text or a path as `parse` takes it. None is the model's `default`; where it has none, the
            preset of one step a scale: `var` for VAR, which has guidance of its own, else `next-scale`.
          recommended: the model's own schedules by name, as for `parse`.

        Raises:
          InputError: it is for another ladder, or has masked steps where the transformer has no mask branch.
        """
        if not isinstance(model, TransformerConfig):
            raise InputError(f"The model is {shown(model)}; expected a TransformerConfig.")
        recommended = recommended or {}
        if schedule is None and DEFAULT in recommended:
            schedule = DEFAULT
        elif schedule is None:
            schedule = "var" if model.is_var else "next-scale"
        if not isinstance(schedule, Schedule):
            named = isinstance(schedule, str) and not schedule.lower().endswith(".json")
            if named and schedule != "var" and schedule not in recommended:
                presets.note_unpublished(model.depth, changes)
            schedule = cls.parse(schedule, ladder, model.depth, recommended)
        schedule = schedule.replace(**changes)
        schedule.check_model(ladder, model)
        return schedule

    def replace(self, **changes: Unpack[Changes]) -> Schedule:
        """The schedule with other scalars or another order, given as in `from_counts`; None leaves one as it is.

        Guidance, ramped as there:

            change           next-scale passes   masked passes
            cfg=t            t·k/(K-1)           as they are
            refine_cfg=u     as they are         u·k/(K-1)
            cfg=nested       as nested           as nested
            both             cfg's               refine_cfg's

        Raises:
          InputError: as `from_counts`. TypeError: another argument.
        """
        if unknown := changes.keys() - Changes.__annotations__.keys():
            raise TypeError(
                f"{min(unknown)!r} is no argument here; a schedule's are {', '.join(Changes.__annotations__)}."
            )
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        if isinstance(given.get("cfg"), Real):
            given["cfg"] = ramped(given["cfg"], self.cfg, refine=False)
        own = {name: getattr(self, name) for name in (*SCALARS, "order")}
        return self.from_counts(self.counts, **(own | given))

    def check_ladder(self, ladder: ScaleLadder, name: str = "This schedule") -> None:
        """Raises InputError unless the schedule is for the sides of `ladder`."""
        _check_ladder(ladder)
        if self.sides != ladder.sides:
            raise InputError(
                f"{name} is for the sides {_joined(self.sides)}, but the model was built for {_joined(ladder.sides)}; "
                "choose a schedule for those, such as 'next-scale'."
            )

    def check_model(self, ladder: ScaleLadder, model: TransformerConfig) -> None:
        """Raises InputError where it is for another ladder, or has masked steps and the transformer no mask branch."""
        self.check_ladder(ladder)
        if self.has_masked_steps and not model.masked:
            raise InputError(
                "A schedule with masked steps needs a mask branch, which this model has not; train stage `masked`, or "
                "use 'next-scale'."
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the ladder that the counts are for."""
        return tuple(math.isqrt(sum(steps)) for steps in self.counts)

    @property
    def has_masked_steps(self) -> bool:
        return any(len(steps) > 1 for steps in self.counts)

    @property
    def plan(self) -> Plan:
        guided = tuple(tuple(bool(np.float32(value)) for value in steps) for steps in self.cfg)
        return Plan(self.counts, guided, self.order if self.has_masked_steps else "confidence")

    @property
    def controls(self) -> Controls:
        values: dict[str, Any] = self._flat()  # in host memory, so that they may go to any mesh
        return Controls(**values)

    @property
    def digest(self) -> str:
        """The schedule's name: twelve hexadecimal digits, the same for two schedules exactly if they sample alike.

        What has no effect does not count: noise of a pass that leaves no choice of tokens to its confidence, an order
        without masked steps, digits beyond float32. (A top_k of the codebook's size or more is not known to be off.)
        """
        plan, values = self.plan, self._flat()
        passes = [step for scale in range(len(self.counts)) for step in plan.passes(scale)]
        heeded = [plan.order == "confidence" and step.remaining > 0 for step in passes]
        values["noise"] = np.where(heeded, values["noise"], 0)
        plain = {name: (array + 0).tolist() for name, array in values.items()}  # -0 + 0 is 0
        content = json.dumps({"counts": self.counts, "order": plan.order} | plain, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """JSON with the counts, all five scalars, nested alike, and the order."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Schedule:
        """What `to_json` wrote, or written by hand: `counts`, and anything else that `from_counts` takes."""
        if not isinstance(text, str | bytes):
            raise InputError(f"The schedule is {shown(text)}; expected JSON as Schedule.to_json writes it.")
        return cls.from_fields(json_files.parse(text, "The schedule", "write it with Schedule.to_json"))

    @classmethod
    def from_fields(cls, fields: Any) -> Schedule:
        """The same of JSON that is a part of a larger text and has been read."""
        others = (*SCALARS, "refine_cfg", "order")
        if not isinstance(fields, dict) or "counts" not in fields or set(fields) - {"counts", *others}:
            raise InputError(f"A schedule's JSON has 'counts' and perhaps {', '.join(others)}; got {shown(fields)}.")
        return cls.from_counts(**fields)

    def _flat(self) -> dict[str, np.ndarray]:
        """Each scalar as the sampler takes it: one number a pass, (P,) float32, top_k int32."""
        return {
            name: np.asarray(
                [value for steps in getattr(self, name) for value in steps], np.int32 if name == "top_k" else np.float32
            )
            for name in SCALARS
        }


def _joined(sides: Sequence[int]) -> str:
    """Sides as a sentence has them."""
    return shown(tuple(sides))[1:-1].replace(" ", "").rstrip(",")


def _check_ladder(ladder: Any) -> None:
    if not isinstance(ladder, ScaleLadder):
        raise InputError(f"The ladder is {shown(ladder)}; expected a ScaleLadder, such as ScaleLadder((1, 2, 3)).")
