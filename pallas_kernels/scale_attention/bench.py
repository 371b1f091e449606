"""setting → every implementation of scale attention and its peers, checked and timed on the same inputs.

Axis letters: B batch, N tokens, H heads, D head size.

Three passes are timed: `forward`; `backward` by itself, through `vjp` with the residuals in memory, as a training step
runs it (the difference of two times would have the noise of both, and let XLA fuse across them); and `both` as one
program. One method for all: queue enough calls to hide what launching costs, wait once, divide. Calls of PyTorch are
eager, as its users' are: many small ones are bound by their launch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scale_attention.api import Ladder, choose, packed_scale_attention, scale_attention
from pallas_kernels.scale_attention.bench_peers import PEERS, JaxProgram, PackedJaxProgram, Peer, TorchProgram
from pallas_kernels.scale_attention.ranges import Run, runs
from pallas_kernels.scale_attention.reference import reference_attention

PASSES = ("forward", "backward", "both")
# ‖a−b‖/‖b‖ above which an answer is wrong, not rounded: of the output, of the gradients of q, k and v, and of that of
# q_scale. The last is one sum a head over all tokens, whose terms cancel: their rounding stays while most of what it is
# relative to goes, so that right implementations show anything up to 1.3e-2 in bfloat16, 2e-5 in float32.
TOLERANCE = {
    "bfloat16": {"output": 5e-3, "gradients": 1e-2, "q_scale": 3e-2},
    "float16": {"output": 1e-3, "gradients": 2e-3, "q_scale": 6e-3},
    "float32": {"output": 1e-5, "gradients": 1e-5, "q_scale": 1e-4},
}
# Bytes of logits up to which the dense reference is timed; its workings take several times that.
DENSE_LIMIT = 4 * 2**30

# What is computed, and how fast it could be


class Pyramid(Ladder, Protocol):
    """What a table must say of the geometry besides; `hmar_jax.ScaleLadder` is one."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the scales, coarse to fine."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One attention to measure; `norm` is QK-norm, with the learned scale of each head."""

    ladder: Pyramid
    batch: int
    heads: int
    head_size: int
    dtype: str
    pattern: Literal["block_diagonal", "block_causal"]
    norm: bool

    @property
    def key_ranges(self) -> np.ndarray:
        return self.ladder.key_ranges(self.pattern)

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(runs(self.key_ranges))

    @property
    def pairs(self) -> int:
        """Query and key that see each other, of one head of one sequence."""
        return sum((run.last - run.first) * (run.end - run.start) for run in self.runs)

    def flops(self, name: str) -> float:
        """Useful ones of a pass: two products of visible pairs forward; backward five, one of them a recomputation."""
        forward = 4.0 * self.batch * self.heads * self.head_size * self.pairs
        return forward * {"forward": 1, "backward": 2.5, "both": 3.5}[name]

    def least_bytes(self, name: str) -> int:
        """What a pass must move: q, k, v, out forward; these, their gradients and that of out backward."""
        tensor = self.batch * self.heads * self.ladder.length * self.head_size * jnp.dtype(self.dtype).itemsize
        return tensor * {"forward": 4, "backward": 8, "both": 12}[name]

    def visible(self, length: int, numpy: Any = np) -> Any:
        """Dense boolean mask (length,length) by NumPy or `jax.numpy`; padding, behind all tokens, sees itself alone."""
        own = self.ladder.length
        padding = np.tile([[own, length]], (length - own, 1))
        ranges, keys = np.concatenate([self.key_ranges, padding]), numpy.arange(length)
        return (keys >= ranges[:, :1]) & (keys < ranges[:, 1:])

    def __str__(self) -> str:
        sides = ",".join(map(str, self.ladder.sides))
        shape = f"N={self.ladder.length} B={self.batch} H={self.heads} D={self.head_size} {self.dtype}"
        return f"{shape} {self.pattern}, {'with' if self.norm else 'without'} QK-norm, sides {sides}"


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device reaches, measured in the same run: bytes a second of a copy, FLOPs a second of a product."""

    copy: float
    matmul: float

    def bound(self, setting: Setting, name: str) -> float:
        """Seconds that a pass takes at least; one after the other for `both`."""
        if name == "both":
            return self.bound(setting, "forward") + self.bound(setting, "backward")
        return max(setting.least_bytes(name) / self.copy, setting.flops(name) / self.matmul)


def measure_rates(dtype: str, repeats: int) -> Rates:
    """The device's rates, of products in `dtype`, with arrays too large for any cache."""
    small = jax.default_backend() == "cpu"
    array = jnp.ones((2**25 if small else 2**29) // 4, jnp.float32)
    negate, product = jax.jit(jnp.negative), jax.jit(jnp.matmul)  # a mere copy might be optimised away
    copying = time_calls(lambda: negate(array), jax.block_until_ready, repeats)

    def multiply(side: int) -> float:
        square = jax.random.normal(jax.random.key(0), (side, side), dtype)
        return 2 * side**3 / time_calls(lambda: product(square, square), jax.block_until_ready, repeats).median

    with _products_in(dtype):  # the larger product is not always the faster one: it heats more
        return Rates(2 * array.nbytes / copying.median, max(map(multiply, (512, 1024) if small else (4096, 8192))))


def _products_in(dtype: str) -> Any:
    """Exact products where float32 is measured, as everywhere in PyTorch: accelerators round its operands otherwise."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


# Timing


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds a call: the median of the repeats, and the quartiles."""

    median: float
    low: float
    high: float


def time_calls(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> Time:
    """Times `call`, which queues work and returns what `wait` waits for; a device does its queue in order."""
    wait(call())  # compiles, and tunes
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    queues = jax.default_backend() != "cpu"  # a CPU works on several calls at a time: wait for each
    calls = min(max(round(0.02 / once), 1), 200)
    seconds = []
    for repeat in range(-1, repeats):  # the first brings the clocks up and does not count
        start = time.perf_counter()
        for i in range(calls):
            result = call()
            if not queues or i == calls - 1:
                wait(result)
        if repeat >= 0:
            seconds.append((time.perf_counter() - start) / calls)
    low, _, high = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else 3 * seconds
    return Time(statistics.median(seconds), low, high)


# Inputs and the truth about them


class Case(NamedTuple):
    """A setting's inputs, (B,N,H,D), with QK-norm also (H,) scales; and the float32 output and gradients to expect."""

    setting: Setting
    operands: tuple[jax.Array, ...]
    cotangent: jax.Array
    truth: list[jax.Array]


def make_case(setting: Setting, seed: int = 0) -> Case:
    """Random inputs, and the truth about all of them."""
    shape = (setting.batch, setting.ladder.length, setting.heads, setting.head_size)
    *qkv, cotangent = (
        jax.random.normal(key, shape, setting.dtype) for key in jax.random.split(jax.random.key(seed), 4)
    )
    scale = jnp.linspace(3, 5, setting.heads) if setting.norm else None
    # Tuning the products of the truth would take longer than what is measured.
    quickly = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    find = jax.jit(_truth, compiler_options=quickly)
    truth = [x for x in find(setting.key_ranges, qkv, scale, cotangent) if x is not None]
    return Case(setting, tuple(qkv) if scale is None else (*qkv, scale), cotangent, truth)


def _truth(key_ranges: jax.Array, qkv: Any, scale: jax.Array | None, cotangent: jax.Array) -> tuple[Any, ...]:
    """Output and gradients by the reference in float32, one head of one sequence after the other.

    The logits of all might not fit; and a few dense products compile in a fifth of the time of those of all scales.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array | None) -> jax.Array:
        return reference_attention(q, k, v, key_ranges, scale)

    def one_head(inputs: Any) -> tuple[Any, ...]:
        tensors, scale = inputs  # each (B,N,D), ()

        def one_sequence(inputs: Any) -> tuple[Any, ...]:
            q, k, v, g = (x.astype(jnp.float32)[None, :, None] for x in inputs)  # (1,N,1,D)
            out, pull = jax.vjp(attend, q, k, v, None if scale is None else scale[None])
            dq, dk, dv, dscale = pull(g)
            return *(x[0, :, 0] for x in (out, dq, dk, dv)), dscale

        *found, dscale = jax.lax.map(one_sequence, tensors)
        return *found, None if dscale is None else dscale.sum()

    heads_first = [jnp.moveaxis(x, 2, 0) for x in (*qkv, cotangent)]
    *tensors, dscale = jax.lax.map(one_head, (heads_first, scale))
    return *(jnp.moveaxis(x, 0, 2) for x in tensors), dscale


@jax.jit
def error_of(result: jax.Array, truth: jax.Array) -> jax.Array:
    """‖a−b‖/‖b‖; not a number, or infinite, where the result is not finite."""
    return jnp.linalg.norm((result - truth).ravel()) / jnp.linalg.norm(truth.ravel())


def errors_of(results: Sequence[jax.Array], truth: Sequence[jax.Array]) -> dict[str, float]:
    """What `TOLERANCE` bounds: of the output, of gradients of q, k, v (the largest; NaN above all), of q_scale."""
    output, *gradients = (float(error_of(*both)) for both in zip(results, truth, strict=True))
    largest = max(gradients[:3], key=lambda error: math.inf if math.isnan(error) else error)
    return dict(zip(TOLERANCE["float32"], (output, largest, *gradients[3:]), strict=False))


# Measuring


@dataclasses.dataclass(frozen=True)
class Row:
    """What one implementation did in one setting.

    Attributes:
      ours: whether it is one of `scale_attention`'s.
      absent: why it did not run; then all else is empty.
      errors: of output, gradients and q_scale, as in `TOLERANCE`.
      right: whether all of them are rounding and nothing else.
      times: pass → Time.
      extra_bytes: what both passes need beyond the inputs, where that is known.
      default: whether it is what `scale_attention` runs as here.
    """

    name: str
    ours: bool
    absent: str | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    right: bool = False
    times: dict[str, Time] = dataclasses.field(default_factory=dict)
    extra_bytes: int | None = None
    default: bool = False


def measure(
    name: str,
    start: Callable[[Case], JaxProgram | TorchProgram],
    case: Case,
    repeats: int,
    ours: bool,
    passes: Sequence[str] = PASSES,
) -> Row:
    """Checks and times one implementation; whatever stops it becomes the row's `absent`."""
    program, dtype = None, case.setting.dtype
    try:
        with _products_in(dtype):
            program = start(case)
            errors = errors_of(program.results(), case.truth)
            right = all(error <= TOLERANCE[dtype][which] for which, error in errors.items())
            times = {which: time_calls(program.call(which), program.wait, repeats) for which in passes}
            return Row(name, ours, None, errors, right, times, program.extra_bytes())
    except Exception as problem:  # peers fail in as many ways as they have versions
        return Row(name, ours, absent=_reason(problem))
    finally:
        if program is not None:
            program.close()


def _reason(problem: Exception) -> str:
    """One line."""
    if isinstance(problem, ModuleNotFoundError):
        return f"{problem.name} is not installed"
    said = textwrap.shorten(str(problem).partition("\n")[0], 200, placeholder=" …").rstrip(".")
    expected = isinstance(problem, ValueError | NotImplementedError) and said
    return said if expected else f"{type(problem).__name__}: {said}"


def measure_all(
    setting: Setting, implementations: Sequence[str], peers: Sequence[str], repeats: int, seed: int = 0
) -> Iterator[Row]:
    """A row for each implementation of ours, and for its way with a packed projection, then for each peer."""
    case = make_case(setting, seed)
    default = choose(case.operands[0], setting.ladder.length)
    for name in implementations:
        row = measure(name, functools.partial(_start_ours, name), case, repeats, ours=True)
        yield dataclasses.replace(row, default=name == default)
        if name not in ("reference", "xla") and row.absent is None:  # those take the packed array apart
            row = measure(f"{name}, packed", functools.partial(_start_packed, name), case, repeats, ours=True)
            yield dataclasses.replace(row, default=name == default)
    for name in peers:
        yield measure(name, functools.partial(_start_peer, PEERS[name]), case, repeats, ours=False)


def _start_ours(name: Any, case: Case) -> JaxProgram:
    setting = case.setting
    logits = 4 * setting.batch * setting.heads * setting.ladder.length**2
    if name == "reference" and logits > DENSE_LIMIT:
        raise ValueError(f"its dense logits would take {logits / 2**30:.0f} GiB, and its workings several times that")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, q_scale: jax.Array | None = None) -> jax.Array:
        return scale_attention(q, k, v, setting.ladder, pattern=setting.pattern, q_scale=q_scale, implementation=name)

    return JaxProgram(attend, case)


def _start_packed(name: Any, case: Case) -> JaxProgram:
    ladder, pattern = case.setting.ladder, case.setting.pattern

    def attend(qkv: jax.Array, q_scale: jax.Array | None = None) -> jax.Array:
        return packed_scale_attention(qkv, ladder, pattern=pattern, q_scale=q_scale, implementation=name)

    return PackedJaxProgram(attend, case)


def _start_peer(peer: Peer, case: Case) -> JaxProgram | TorchProgram:
    platform = jax.default_backend()
    if platform not in peer.platforms:
        raise ValueError(f"needs a {' or '.join(peer.platforms).upper()}")
    return peer.program(peer.make(case.setting), case)
