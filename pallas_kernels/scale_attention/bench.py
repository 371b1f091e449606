"""setting → every implementation of scale attention and its peers, checked and timed on the same inputs → a table.

Axis letters: B batch, N tokens, H heads, D head size.

Three passes are timed: `forward`; `backward` by itself, through `vjp` with the residuals in memory, as a training step
runs it (the difference of two times would have the noise of both, and let XLA fuse across them); and `both` as one
program. One method for all: queue enough calls to hide what launching costs, wait once, divide. Calls of PyTorch are
eager, as its users' are: many small ones are bound by their launch.

The file is long because the peers lie beside what times them: nothing else uses either.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scale_attention.api import Ladder, scale_attention
from pallas_kernels.scale_attention.reference import reference_attention, scale_queries_and_keys

PASSES = ("forward", "backward", "both")
# ‖a−b‖/‖b‖ of outputs and of gradients above which an answer is wrong, not rounded: about twice what the worst right
# implementation shows. float32 leaves room for TF32, in which GPUs multiply by default.
TOLERANCE = {"bfloat16": (1e-2, 3e-2), "float16": (2e-3, 5e-3), "float32": (1e-3, 3e-3)}
# Bytes of logits up to which the dense reference is timed; its workings take several times that.
DENSE_LIMIT = 4 * 2**30
LEGEND = (
    "Errors are norms of the difference to a float32 reference over its norm; ± is half the distance of the quartiles; "
    "× ours is against our fastest right one; FLOPs count visible pairs; MiB is what forward and backward need "
    "beyond their inputs."
)

# What is computed, and how fast it could be


class Pyramid(Ladder, Protocol):
    """What a table must say of the geometry besides; `hmar_jax.ScaleLadder` is one."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the scales, coarse to fine."""


class Run(NamedTuple):
    """Queries [first, last) that see the keys [start, end): those of a scale."""

    first: int
    last: int
    start: int
    end: int


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
        found, first = [], 0
        for (start, end), same in itertools.groupby(map(tuple, self.key_ranges.tolist())):
            last = first + sum(1 for _ in same)
            found.append(Run(first, last, start, end))
            first = last
        return tuple(found)

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
    """The device's rates in `dtype`, with arrays too large for any cache."""
    small = jax.default_backend() == "cpu"
    array = jnp.ones((2**25 if small else 2**29) // jnp.dtype(dtype).itemsize, dtype)
    side = 1024 if small else 8192
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    negate, product = jax.jit(jnp.negative), jax.jit(jnp.matmul)  # a mere copy might be optimised away
    copying = time_calls(lambda: negate(array), jax.block_until_ready, repeats)
    multiplying = time_calls(lambda: product(square, square), jax.block_until_ready, repeats)
    return Rates(2 * array.nbytes / copying.median, 2 * side**3 / multiplying.median)


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
    truth: list[np.ndarray]


def make_case(setting: Setting, seed: int = 0) -> Case:
    """Random inputs, and the truth about all of them."""
    shape = (setting.batch, setting.ladder.length, setting.heads, setting.head_size)
    *qkv, cotangent = (
        jax.random.normal(key, shape, setting.dtype) for key in jax.random.split(jax.random.key(seed), 4)
    )
    scale = jnp.linspace(3, 5, setting.heads) if setting.norm else None
    truth = [np.asarray(x) for x in _truth(setting.runs, qkv, scale, cotangent) if x is not None]
    return Case(setting, tuple(qkv) if scale is None else (*qkv, scale), cotangent, truth)


@functools.partial(jax.jit, static_argnums=0)
def _truth(runs: tuple[Run, ...], qkv: Any, scale: jax.Array | None, cotangent: jax.Array) -> tuple[Any, ...]:
    """Output and gradients by the reference in float32, head by head: the logits of all heads might not fit."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array | None) -> jax.Array:
        parts = []
        for first, last, start, end in runs:
            everything = np.tile([[0, end - start]], (last - first, 1))
            seen = k[:, start:end], v[:, start:end]
            parts.append(reference_attention(q[:, first:last], *seen, everything, scale))
        return jnp.concatenate(parts, axis=1)

    def one_head(inputs: Any) -> tuple[Any, ...]:
        (q, k, v, g), scale = inputs  # (B,N,D), ()
        q, k, v, g = (x.astype(jnp.float32)[:, :, None] for x in (q, k, v, g))
        out, pull = jax.vjp(attend, q, k, v, None if scale is None else scale[None])
        return tuple(None if x is None else x.squeeze(-2 if x.ndim == 4 else 0) for x in (out, *pull(g)))

    heads_first = [jnp.moveaxis(x, 2, 0) for x in (*qkv, cotangent)]
    *tensors, dscale = jax.lax.map(one_head, (heads_first, scale))
    return *(jnp.moveaxis(x, 0, 2) for x in tensors), dscale


def error_of(result: np.ndarray, truth: np.ndarray) -> float:
    """‖a−b‖/‖b‖; not a number where the result is not finite."""
    return float(np.linalg.norm((result - truth).ravel()) / np.linalg.norm(truth.ravel()))


# How JAX and PyTorch run a pass. `attend` takes q, k, v, (B,N,H,D), with QK-norm also (H,) scales.


class JaxProgram:
    """An attention in JAX on a case's inputs."""

    wait = staticmethod(jax.block_until_ready)

    def __init__(self, attend: Callable[..., Any], case: Case) -> None:
        self.attend, self.inputs = attend, (case.operands, case.cotangent)

        def both(operands: tuple[jax.Array, ...], cotangent: jax.Array) -> Any:
            out, pull = jax.vjp(attend, *operands)
            return out, *pull(cotangent)

        self.both = jax.jit(both).lower(*self.inputs).compile()

    def results(self) -> list[np.ndarray]:
        """Output and gradients in float32."""
        return [np.asarray(x, np.float32) for x in self.both(*self.inputs)]

    def extra_bytes(self) -> int | None:
        """What both passes need beyond the inputs."""
        analysis = self.both.memory_analysis()
        return analysis and analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def passes(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each pass as a call; residuals are there for the last alone."""
        operands, cotangent = self.inputs
        forward = jax.jit(self.attend)
        yield "forward", lambda: forward(*operands)
        yield "both", lambda: self.both(*self.inputs)
        _, pull = jax.jit(functools.partial(jax.vjp, self.attend))(*operands)
        residuals, tree = jax.tree.flatten(pull)  # flat: calls are quicker to queue
        backward = jax.jit(lambda residuals, cotangent: jax.tree.unflatten(tree, residuals)(cotangent))
        yield "backward", lambda: backward(residuals, cotangent)

    def close(self) -> None:
        """Nothing to give back."""


class TorchProgram:
    """An attention in PyTorch on a case's inputs."""

    def __init__(self, attend: Callable[..., Any], case: Case) -> None:
        import torch

        self.torch, self.attend, self.cuda = torch, attend, jax.default_backend() == "gpu"
        if self.cuda and not torch.cuda.is_available():
            raise ValueError("the installed PyTorch sees no GPU")

        def load(x: jax.Array) -> Any:  # by way of float32, which NumPy and PyTorch share
            dtype = getattr(torch, x.dtype.name)
            return torch.from_numpy(np.array(x, np.float32)).to("cuda" if self.cuda else "cpu", dtype)

        self.operands = [load(x).requires_grad_() for x in case.operands]
        self.cotangent = load(case.cotangent)

    def both(self) -> Any:
        """Output and gradients."""
        out = self.attend(*self.operands)
        return out, *self.torch.autograd.grad(out, self.operands, self.cotangent)

    def wait(self, _: Any) -> None:
        """Until all that is queued is done."""
        if self.cuda:
            self.torch.cuda.synchronize()

    def results(self) -> list[np.ndarray]:
        """Output and gradients in float32."""
        return [x.detach().float().cpu().numpy() for x in self.both()]

    def extra_bytes(self) -> int | None:
        """What both passes need beyond the inputs; PyTorch counts on a GPU only."""
        if not self.cuda:
            return None
        before = self.torch.cuda.memory_allocated()
        self.torch.cuda.reset_peak_memory_stats()
        self.wait(self.both())
        return self.torch.cuda.max_memory_allocated() - before

    def passes(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each pass as a call; residuals are there for the last alone."""
        yield "forward", self.torch.no_grad()(lambda: self.attend(*self.operands))
        yield "both", self.both
        out = self.attend(*self.operands)
        grad = functools.partial(self.torch.autograd.grad, retain_graph=True)
        yield "backward", lambda: grad(out, self.operands, self.cotangent)

    def close(self) -> None:
        """Gives PyTorch's cache back, so that JAX can have it."""
        if self.cuda:
            self.torch.cuda.empty_cache()


# Peers: (setting) → attend. QK-norm, which none of them fuses, goes before.


def _with_jax_norm(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend` takes q, k, v and the softmax scale."""

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, q_scale: jax.Array | None = None) -> jax.Array:
        if q_scale is None:
            return attend(q, k, v, q.shape[-1] ** -0.5)
        q, k = (x.astype(v.dtype) for x in scale_queries_and_keys(q, k, q_scale))
        return attend(q, k, v, 1.0)

    return whole


def _dot_product_attention(*qkv: jax.Array, **options: Any) -> jax.Array:
    """By cuDNN; without a GPU by XLA, so that what is done around it can be tested anywhere."""
    implementation: Any = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(*qkv, implementation=implementation, **options)


def _pad_to_even(*arrays: jax.Array) -> list[jax.Array]:
    """Zeros behind odd lengths, which cuDNN refuses in training."""
    return [_pad(x.shape[1] + x.shape[1] % 2, x) for x in arrays]


def _pad(length: int, x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def cudnn_mask(setting: Setting) -> Callable[..., jax.Array]:
    """One call with a dense mask."""
    length = setting.ladder.length

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
        q, k, v = _pad_to_even(q, k, v)
        mask = setting.visible(q.shape[1], jnp)[None, None]  # as a constant it would slow compilation down
        return _dot_product_attention(q, k, v, mask=mask, scale=scale)[:, :length]

    return _with_jax_norm(attend)


def cudnn_per_scale(setting: Setting) -> Callable[..., jax.Array]:
    """One call a scale."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
        parts = []
        for first, last, start, end in setting.runs:
            queries, keys = last - first, end - start
            [own] = _pad_to_even(q[:, first:last])
            seen = _pad_to_even(k[:, start:end], v[:, start:end])
            lengths = {}
            if queries % 2 or keys % 2:
                names = {"query_seq_lengths": queries, "key_value_seq_lengths": keys}
                lengths = {name: jnp.full(len(q), number, jnp.int32) for name, number in names.items()}
            parts.append(_dot_product_attention(own, *seen, scale=scale, **lengths)[:, :queries])
        return jnp.concatenate(parts, axis=1)

    return _with_jax_norm(attend)


def cudnn_packed(setting: Setting) -> Callable[..., jax.Array]:
    """One call with the scales as segments of a packed sequence: the fastest that cuDNN has."""
    if setting.pattern != "block_diagonal":
        raise ValueError("packed segments cannot see each other")
    # No public function reaches the packed layout, and to leave out the strongest peer would flatter us.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    length = setting.ladder.length
    sizes = np.array([[run.last - run.first for run in setting.runs]], np.int32)
    starts = np.array([[*(run.first for run in setting.runs), -1]], np.int32)  # it adds the end itself

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
        size, offset = (jnp.tile(x, (len(q), 1)) for x in (sizes, starts))
        segments: dict[str, Any] = {"q_seqlen": size, "kv_seqlen": size, "q_offsets": offset, "kv_offsets": offset}
        q, k, v = _pad_to_even(q, k, v)
        return dot_product_attention(q, k, v, scale=scale, mask_type=MaskType.PADDING, **segments)[:, :length]

    return _with_jax_norm(attend)


def splash(setting: Setting) -> Callable[..., jax.Array]:
    """Splash attention with a static mask; padding is a scale of its own, so that no row is wholly masked."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    length = setting.ladder.length
    padded = 128 * math.ceil(length / 128)
    block = max(size for size in range(128, 513, 128) if padded % size == 0)
    kernel = library.make_splash_mha(
        library.MultiHeadMask([library.NumpyMask(setting.visible(padded))] * setting.heads),
        block_sizes=library.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=jax.default_backend() != "tpu",
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
        heads_first = (_pad(padded, x).swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)[:, :length]

    return _with_jax_norm(attend)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """By PyTorch's compiler, such that a backward pass can be run again, as its timing does."""
    import torch
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch.compiler.reset()  # else it gives up compiling after some settings
    return torch.compile(function, dynamic=False)


def _with_torch_norm(attend: Callable[..., Any]) -> Callable[..., Any]:
    """`attend` takes q, k, v, (B,H,N,D) without a copy, and the softmax scale."""
    import torch

    def normalize(q: Any, k: Any, q_scale: Any) -> Any:
        q, k = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (q, k))
        return q * q_scale[:, None], k

    if jax.default_backend() == "gpu":
        normalize = _compile(normalize)

    def whole(q: Any, k: Any, v: Any, q_scale: Any = None) -> Any:
        scale = q.shape[-1] ** -0.5
        if q_scale is not None:
            q, k, scale = *(x.to(v.dtype) for x in normalize(q, k, q_scale)), 1.0
        return attend(*(x.transpose(1, 2) for x in (q, k, v)), scale).transpose(1, 2)

    return whole


def torch_flex(setting: Setting) -> Callable[..., Any]:
    """FlexAttention, compiled, with a block mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    start, end = torch.tensor(setting.key_ranges.T.copy(), device=device)

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key >= start[query]) & (key < end[query])

    length = setting.ladder.length
    mask = create_block_mask(visible, None, None, length, length, device=device)
    compiled: Any = _compile(flex_attention)
    return _with_torch_norm(lambda q, k, v, scale: compiled(q, k, v, block_mask=mask, scale=scale))


def torch_mask(setting: Setting) -> Callable[..., Any]:
    """SDPA with a dense boolean mask."""
    import torch

    mask = torch.from_numpy(setting.visible(setting.ladder.length))
    mask = mask.cuda() if jax.default_backend() == "gpu" else mask
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return _with_torch_norm(lambda q, k, v, scale: sdpa(q, k, v, attn_mask=mask, scale=scale))


def torch_flash_per_scale(setting: Setting) -> Callable[..., Any]:
    """One call of SDPA's flash attention a scale."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    runs = setting.runs

    def attend(q: Any, k: Any, v: Any, scale: float) -> Any:
        sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=scale)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            parts = [sdpa(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]) for a, b, c, d in runs]
        return torch.cat(parts, dim=2)

    return _with_torch_norm(attend)


class Peer(NamedTuple):
    """Somebody else's attention, where it runs, and what runs it."""

    platforms: tuple[str, ...]
    program: Callable[..., JaxProgram | TorchProgram]
    make: Callable[[Setting], Callable[..., Any]]


PEERS = {
    "FlexAttention": Peer(("gpu",), TorchProgram, torch_flex),
    "SDPA, dense mask": Peer(("gpu", "cpu"), TorchProgram, torch_mask),
    "SDPA flash, by scale": Peer(("gpu", "cpu"), TorchProgram, torch_flash_per_scale),
    "cuDNN, packed": Peer(("gpu",), JaxProgram, cudnn_packed),
    "cuDNN, by scale": Peer(("gpu",), JaxProgram, cudnn_per_scale),
    "cuDNN, dense mask": Peer(("gpu",), JaxProgram, cudnn_mask),
    "splash attention": Peer(("tpu",), JaxProgram, splash),
}


# Measuring


@dataclasses.dataclass(frozen=True)
class Row:
    """What one implementation did in one setting.

    Attributes:
      ours: whether it is one of `scale_attention`'s.
      absent: why it did not run; then all else is empty.
      error, gradient_error: of the output, and the largest of the gradients.
      right: whether both are rounding and nothing else.
      times: pass → Time.
      extra_bytes: what both passes need beyond the inputs, where that is known.
    """

    name: str
    ours: bool
    absent: str | None = None
    error: float | None = None
    gradient_error: float | None = None
    right: bool = False
    times: dict[str, Time] = dataclasses.field(default_factory=dict)
    extra_bytes: int | None = None


def measure(name: str, start: Callable[[Case], JaxProgram | TorchProgram], case: Case, repeats: int, ours: bool) -> Row:
    """Checks and times one implementation; whatever stops it becomes the row's `absent`."""
    program = None
    try:
        program = start(case)
        errors = [error_of(*both) for both in zip(program.results(), case.truth, strict=True)]
        allowed = TOLERANCE[case.setting.dtype]
        error, gradient_error = errors[0], max(errors[1:], key=lambda x: math.inf if math.isnan(x) else x)
        right = error <= allowed[0] and gradient_error <= allowed[1]
        times = {which: time_calls(call, program.wait, repeats) for which, call in program.passes()}
        return Row(name, ours, None, error, gradient_error, right, times, program.extra_bytes())
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
    """A row for each implementation of ours, then for each peer, as they are done."""
    case = make_case(setting, seed)
    for name in implementations:
        yield measure(name, functools.partial(_start_ours, name), case, repeats, ours=True)
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


def _start_peer(peer: Peer, case: Case) -> JaxProgram | TorchProgram:
    platform = jax.default_backend()
    if platform not in peer.platforms:
        raise ValueError(f"needs a {' or '.join(peer.platforms).upper()}")
    return peer.program(peer.make(case.setting), case)


# The table


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Right ones, fastest training first; then wrong ones; then absent ones."""
    return sorted(rows, key=lambda row: (row.absent is not None, not row.right, row.times and row.times["both"].median))


def ours_at_best(rows: Sequence[Row], name: str) -> float:
    """Seconds of a pass by our fastest right implementation; not a number if there is none."""
    return min((row.times[name].median for row in rows if row.ours and row.right), default=math.nan)


def table(setting: Setting, rows: Sequence[Row], rates: Rates, markdown: bool = False) -> str:
    """A setting's rows under its bounds, aligned for a terminal or as Markdown."""
    columns = {"forward": 4, "backward": 4, "both": 2}
    header, body, absent = ["", "error", "of gradients"], [], []
    for name, width in columns.items():
        header += [f"{name}, ms", "× ours", "of bound", "TFLOP/s"][:width]
    for row in ranked(rows):
        if row.absent:
            absent.append(f"{row.name}: absent, {row.absent}.")
            continue
        cells = [row.name, f"{row.error:.1e}", f"{row.gradient_error:.1e}"]
        for name, width in columns.items():
            cells += _pass_cells(setting, row, name, rates, ours_at_best(rows, name))[:width]
        body.append([*cells, "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.0f}"])
    lines = [[*header, "MiB"], *body]
    bounds = []
    for name in PASSES[:2]:
        limit = "bytes" if setting.least_bytes(name) / rates.copy > setting.flops(name) / rates.matmul else "FLOPs"
        bounds.append(
            f"{name} {1e3 * rates.bound(setting, name):.3g} ms by {limit} ({setting.flops(name) / 1e9:.4g} GFLOP)"
        )
    title, limits = str(setting), f"Bound: {', '.join(bounds)}."
    if markdown:
        drawn = ["| " + " | ".join(line) + " |" for line in lines]
        drawn.insert(1, "|---" + "|--:" * (len(lines[0]) - 1) + "|")
        return "\n".join([f"### {title}", "", limits, "", *drawn, "", *(f"* {line}" for line in absent), ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([title, limits, *drawn, *absent, ""])


def _pass_cells(setting: Setting, row: Row, name: str, rates: Rates, ours: float) -> list[str]:
    taken = row.times[name]
    milliseconds = f"{1e3 * taken.median:.3g} ± {1e3 * (taken.high - taken.low) / 2:.1g}"
    ratio = f"{taken.median / ours:.2f}" if row.right else "wrong"
    share = f"{rates.bound(setting, name) / taken.median:.0%}"
    return [milliseconds, ratio, share, f"{setting.flops(name) / taken.median / 1e12:.3g}"]


def as_json(setting: Setting, rows: Sequence[Row], rates: Rates) -> dict[str, Any]:
    """Everything in the table, in seconds, bytes and FLOPs; null where something is unknown or not finite."""
    shape = dataclasses.asdict(setting) | {"ladder": list(setting.ladder.sides), "length": setting.ladder.length}
    work = {}
    for name in PASSES:
        limits = {"flops": setting.flops(name), "bytes": setting.least_bytes(name)}
        work[name] = limits | {"bound": rates.bound(setting, name)}
    lines = []
    for row in ranked(rows):
        errors = {which: getattr(row, which) for which in ("error", "gradient_error")}
        finite = {
            which: error if error is not None and math.isfinite(error) else None for which, error in errors.items()
        }
        lines.append(dataclasses.asdict(row) | finite)
    return {"setting": shape, "work": work, "rows": lines}
