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
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.scale_attention.api import choose, packed_scale_attention, scale_attention
from pallas_kernels.scale_attention.bench import cases
from pallas_kernels.scale_attention.bench.cases import Case, Setting
from pallas_kernels.scale_attention.bench.peers import PEERS, JaxProgram, PackedJaxProgram, Peer, TorchProgram

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

# How fast the device is


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


# Whether an answer is right


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
    case = cases.make_case(setting, seed)
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
