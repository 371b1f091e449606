"""scale inputs → logits: the shared trunk with a next-scale branch and, from stage 2 on, a mask branch (HMAR §4).

Without a mask branch and with `pattern="block_causal"` it is VAR. The same methods serve training, where the L tokens
of all scales go in joined, and sampling, where one scale goes in alone.
Axis letters: B batch, L tokens, K scales, C width, Z latent channels, V codebook.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hmar_jax.config import TransformerConfig
from hmar_jax.scales import ScaleLadder
from hmar_jax.transformer import fused
from hmar_jax.transformer.blocks import Head, KeysValues, Modulation, Remat, Stack, weight_init
from hmar_jax.transformer.fused import Output

BranchName = Literal["next_scale", "masked"]


class BranchModulation(NamedTuple):
    """Modulations of a branch's blocks, with a leading depth axis, and of its head."""

    blocks: Modulation = ()
    head: Modulation = ()


class Condition(NamedTuple):
    """What blocks and heads take of a batch's labels, computed once for all passes of a request: (…,B,1,C) float32.

    Attributes:
      embedding: of the classes, (B,1,C).
      trunk, next_scale, masked: modulations of the trunk's blocks, and of each branch; none where there is no such.
    """

    embedding: jax.Array
    trunk: Modulation
    next_scale: BranchModulation
    masked: BranchModulation

    def every(self, step: int) -> Condition:
        """The conditions of samples 0, step, 2·step and so on."""
        return jax.tree.map(lambda x: x[..., ::step, :, :], self)


class Branch(nnx.Module):
    """The last blocks and the head of one kind of prediction."""

    def __init__(
        self,
        config: TransformerConfig,
        codebook_size: int,
        *,
        dtype: DTypeLike,
        remat: Remat,
        scan: bool,
        rngs: nnx.Rngs,
    ):
        depth, first = config.branch_depth, config.trunk_depth
        self.stack = Stack(config, depth, first, dtype=dtype, remat=remat, scan=scan, rngs=rngs)
        self.head = Head(config, codebook_size, dtype=dtype, rngs=rngs)

    def modulation(self, activated: jax.Array, cond: jax.Array) -> BranchModulation:
        """From `activated`, SiLU of the class embedding (B,C), for the head; from `cond`, that or the projection of it
        that all blocks share (B,6C), for the blocks.
        """
        return BranchModulation(self.stack.modulations(cond), self.head.modulation(activated))

    def __call__[T](
        self, x: jax.Array, modulation: BranchModulation, ladder: ScaleLadder, output: Output[T], key: jax.Array | None
    ) -> T:
        """The output for what the trunk gives, (B,N,C)."""
        return self.head(self.stack(x, modulation.blocks, ladder, key), modulation.head, output)


class HMAR(nnx.Module):
    """The scale-Markov masked transformer.

    Args:
      config: its sizes. ladder: the scales it is built for.
      codebook_size, latent_channels: V and Z of its tokenizer.
      dtype: of matrix products; parameters, AdaLN, softmax and logits are float32.
      remat, scan: as in `TrainConfig`; they change no result.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ladder: ScaleLadder,
        *,
        codebook_size: int,
        latent_channels: int,
        dtype: DTypeLike = jnp.float32,
        remat: Remat = "dots",
        scan: bool = True,
        rngs: nnx.Rngs,
    ):
        width, init = config.width, weight_init(config.width)
        self.ladder, self.dtype = ladder, dtype
        self.heads, self.head_size = config.heads, width // config.heads
        self.class_embed = nnx.Embed(config.num_classes + 1, width, embedding_init=init, dtype=jnp.float32, rngs=rngs)
        self.pos_start = nnx.Param(init(rngs.params(), (ladder.lengths[0], width)))
        self.pos = nnx.Param(init(rngs.params(), (ladder.length, width)))
        self.level = nnx.Param(init(rngs.params(), (ladder.num_scales, width)))
        self.word = nnx.Linear(latent_channels, width, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)
        self.word_bias = nnx.Param(jnp.zeros((width,)))
        if config.shared_adaln:
            self.adaln = nnx.Linear(width, 6 * width, kernel_init=init, dtype=jnp.float32, rngs=rngs)
        self.trunk = Stack(config, config.trunk_depth, 0, dtype=dtype, remat=remat, scan=scan, rngs=rngs)
        self.next_scale = Branch(config, codebook_size, dtype=dtype, remat=remat, scan=scan, rngs=rngs)
        if config.masked:
            self.mask_embed = nnx.Param(init(rngs.params(), (width,)))
            self.masked = Branch(config, codebook_size, dtype=dtype, remat=remat, scan=scan, rngs=rngs)

    def condition(self, labels: jax.Array) -> Condition:
        """Labels (B,) int32 in [0, num_classes], the last being the null class, as blocks and heads take them."""
        embedding = self.class_embed(labels)
        activated = nnx.silu(embedding)
        shared = self.adaln(activated) if hasattr(self, "adaln") else activated
        return Condition(
            embedding[:, None],
            self.trunk.modulations(shared),
            self.next_scale.modulation(activated, shared),
            self.masked.modulation(activated, shared) if hasattr(self, "masked") else BranchModulation(),
        )

    def inputs(
        self,
        cond: Condition,
        scales: range,
        pooled: jax.Array,
        current: jax.Array | None = None,
        masked: jax.Array | None = None,
    ) -> jax.Array:
        """What goes into the blocks for some scales.

        Args:
          cond: of the batch. scales: neighbouring scales, from 0; N is the number of their tokens without scale 0's.
          pooled: area(f_{k-1}, p_k) of these scales but 0, joined: (B,N,Z).
          current: area(u_k, p_k) likewise, for a masked pass. masked: (B,N) bool, where mask_embed replaces it.

        Returns:
          (B, tokens of `scales`, C) in the compute dtype.
        """
        offsets = self.ladder.offsets
        where = slice(offsets[scales.start], offsets[scales.stop])
        place = self.pos[...][where] + self.level[...][self.ladder.scale_ids[where]].astype(jnp.float32)
        parts = []
        if scales.start == 0:
            parts.append(cond.embedding + self.pos_start[...])
        if pooled.shape[1]:
            x = self.word(pooled) + self.word_bias[...]
            if current is not None and masked is not None:
                x = x + jnp.where(masked[..., None], self.mask_embed[...], self.word(current))
            parts.append(x)
        return (jnp.concatenate(parts, axis=1) + place).astype(self.dtype)

    def predict[T](
        self,
        branch: BranchName,
        x: jax.Array,
        cond: Condition,
        ladder: ScaleLadder,
        output: Output[T],
        key: jax.Array | None = None,
    ) -> T:
        """What a branch predicts of the N tokens of the scales in `ladder`.

        Args:
          branch: `next_scale`, or `masked` where the model has a mask branch.
          x: (B,N,C), `inputs` of those tokens. cond: of the batch.
          output: what to make of the logits: `fused.logits`, which are (B,N,V) float32, or `fused.scores_of(targets)`.
          key: given in training, for drop-path.
        """
        trunk_key, branch_key = (None, None) if key is None else jax.random.split(key)
        x = self.trunk(x, cond.trunk, ladder, trunk_key)
        run: Branch = getattr(self, branch)
        return run(x, getattr(cond, branch), ladder, output, branch_key)

    def empty_cache(self, batch: int) -> list[KeysValues]:
        """Room for the keys and values of all L tokens, in the blocks of the trunk and of the next-scale branch."""
        shape = (batch, self.ladder.length, self.heads, self.head_size)
        stacks = (self.trunk, self.next_scale.stack)
        return [KeysValues(*(jnp.zeros((stack.depth, *shape), self.dtype) for _ in range(2))) for stack in stacks]

    def extend(
        self, x: jax.Array, cond: Condition, ladder: ScaleLadder, cache: list[KeysValues]
    ) -> tuple[jax.Array, list[KeysValues]]:
        """Next-scale logits of the last tokens of `ladder`, where attention sees all of its tokens: VAR's sampling.

        Args:
          x: (B,N,C), `inputs` of those tokens. cond: of the batch. cache: holds the tokens before them.

        Returns:
          (B,N,V) float32, and the cache with these tokens in it.
        """
        branch, modulation = self.next_scale, cond.next_scale
        x, of_trunk = self.trunk.extend(x, cond.trunk, ladder, cache[0])
        x, of_branch = branch.stack.extend(x, modulation.blocks, ladder, cache[1])
        return branch.head(x, modulation.head, fused.logits), [of_trunk, of_branch]
