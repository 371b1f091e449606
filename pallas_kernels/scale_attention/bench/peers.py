"""case → an attention that can be timed: JAX's and PyTorch's way to run one, and other people's attentions.

Axis letters: B batch, N tokens, H heads, D head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scale_attention.bench.cases import Case, Setting
from pallas_kernels.scale_attention.reference import scale_queries_and_keys

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

    def results(self) -> list[jax.Array]:
        """Output and gradients in float32."""
        return [x.astype(jnp.float32) for x in self.both(*self.inputs)]

    def extra_bytes(self) -> int | None:
        """What both passes need beyond the inputs."""
        analysis = self.both.memory_analysis()
        return analysis and analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def call(self, name: str) -> Callable[[], Any]:
        """What runs `forward`, `backward` or `both` once; residuals of backward live as long as it."""
        operands, cotangent = self.inputs
        if name == "both":
            return lambda: self.both(*self.inputs)
        if name == "forward":
            forward = jax.jit(self.attend)
            return lambda: forward(*operands)
        _, pull = jax.jit(functools.partial(jax.vjp, self.attend))(*operands)
        residuals, tree = jax.tree.flatten(pull)  # flat: calls are quicker to queue
        backward = jax.jit(lambda residuals, cotangent: jax.tree.unflatten(tree, residuals)(cotangent))
        return lambda: backward(residuals, cotangent)

    def close(self) -> None:
        """Nothing to give back."""


class PackedJaxProgram(JaxProgram):
    """As `JaxProgram`, of an `attend` that takes q, k and v as one array (B,N,3,H,D); so is their gradient."""

    def __init__(self, attend: Callable[..., Any], case: Case) -> None:
        packed = jnp.stack(case.operands[:3], axis=2)
        super().__init__(attend, case._replace(operands=(packed, *case.operands[3:])))

    def results(self) -> list[jax.Array]:
        """Output and gradients of q, k, v and scales in float32."""
        out, packed, *scale = super().results()
        return [out, *(packed[:, :, i] for i in range(3)), *scale]


class TorchProgram:
    """An attention in PyTorch on a case's inputs."""

    def __init__(self, attend: Callable[..., Any], case: Case) -> None:
        import torch

        self.torch, self.attend, self.cuda = torch, attend, jax.default_backend() == "gpu"
        if self.cuda and not torch.cuda.is_available():
            raise ValueError("the installed PyTorch sees no GPU")

        def load(x: jax.Array) -> Any:  # by way of float32, which NumPy and PyTorch share
            dtype = getattr(torch, x.dtype.name)
            return torch.from_numpy(np.array(x.astype(jnp.float32))).to("cuda" if self.cuda else "cpu", dtype)

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

    def results(self) -> list[jax.Array]:
        """Output and gradients in float32."""
        return [jnp.asarray(x.detach().float().cpu().numpy()) for x in self.both()]

    def extra_bytes(self) -> int | None:
        """What both passes need beyond the inputs; PyTorch counts on a GPU only."""
        if not self.cuda:
            return None
        before = self.torch.cuda.memory_allocated()
        self.torch.cuda.reset_peak_memory_stats()
        self.wait(self.both())
        return self.torch.cuda.max_memory_allocated() - before

    def call(self, name: str) -> Callable[[], Any]:
        """What runs `forward`, `backward` or `both` once; residuals of backward live as long as it."""
        if name == "both":
            return self.both
        if name == "forward":
            return self.torch.no_grad()(lambda: self.attend(*self.operands))
        out = self.attend(*self.operands)
        grad = functools.partial(self.torch.autograd.grad, retain_graph=True)
        return lambda: grad(out, self.operands, self.cotangent)

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
    """Zeros behind odd lengths, which JAX does not hand to cuDNN in training."""
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
    """One call with the scales as segments of a packed sequence: the fastest that cuDNN has.

    JAX computes where segments start in every call, by some small kernels that are timed with it.
    """
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
