"""How the Hopper kernels are cut: what fits on a multiprocessor, the fastest known, and what is worth timing."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices

SHARED_BYTES = 227 * 1024  # what a thread block may use on Hopper
REGISTERS = 64 * 1024  # of a multiprocessor
DEFAULT_KIND = "NVIDIA H200"  # whose blocks serve kinds that nobody has measured: Hoppers have the same multiprocessor


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a kernel keeps in shared memory and in registers.

    Attributes:
      rows: operands (rows, D) of a band, in two slots for each warpgroup.
      columns: operands (columns, D) of a tile, one for each stage.
      vectors: float32 numbers for each column and stage.
      outputs: staging buffers (rows, D), one for each warpgroup.
      logits: accumulators (rows, columns) of a warpgroup.
      sums: accumulators (rows, D) of a warpgroup.
    """

    rows: int
    columns: int
    vectors: int
    outputs: int
    logits: int
    sums: int


NEEDS = {
    "forward": Needs(rows=1, columns=2, vectors=0, outputs=1, logits=1, sums=1),
    "grad_queries": Needs(rows=2, columns=2, vectors=0, outputs=2, logits=2, sums=1),  # out is read into one slot
    "grad_keys": Needs(rows=2, columns=2, vectors=2, outputs=2, logits=2, sums=2),
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel is cut.

    Attributes:
      warpgroups: that compute; one more loads.
      rows: of a warpgroup's band, a multiple of 64, as wgmma wants.
      columns: of a tile, a multiple of 64.
      stages: column tiles in flight.
      loader_registers: of each thread that loads; the other threads get what that leaves.
      relay: whether computing warpgroups issue products one after the other, see `pipeline`.
      paired: whether a tile's logits and the values of the tile before are multiplied together, see `forward`;
        no other kernel heeds it.

    Raises:
      ValueError: a number is not supported.
    """

    warpgroups: int
    rows: int
    columns: int
    stages: int
    loader_registers: int = 32
    relay: bool = False
    paired: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.warpgroups <= 4:
            raise ValueError(f"{self.warpgroups} compute warpgroups are not between 1 and 4.")
        if any(size not in (64, 128, 192, 256) for size in (self.rows, self.columns)):
            raise ValueError(f"Tiles of {self.rows} x {self.columns} are not multiples of 64 up to 256.")
        if not 2 <= self.stages <= 32:
            raise ValueError(f"{self.stages} stages are not between 2 and 32.")

    @property
    def compute_registers(self) -> int:
        """Threads start with an equal share, and those that load then pass on what they do not need."""
        threads = self.warpgroups + 1
        pool = REGISTERS // 128 // threads // 8 * 8 * threads
        return min((pool - self.loader_registers) // self.warpgroups // 8 * 8, 240)

    def accumulators(self, needs: Needs, head_size: int) -> int:
        """Registers of a computing thread that hold accumulators: float32, a tile spread over 128 threads.

        With pairs of products also the weights of the tile before, of 16 bits.
        """
        weights = self.columns // 2 if self.paired else 0
        return self.rows * (needs.logits * self.columns + needs.sums * head_size + weights) // 128

    def shared_terms(self, needs: Needs, head_size: int) -> dict[str, int]:
        """Bytes of shared memory, term by term; operands and outputs have 16 bits."""
        band, tile = self.rows * head_size * 2, self.columns * head_size * 2
        return {
            "operands of bands, two slots each": 2 * self.warpgroups * needs.rows * band,
            "operands of tiles, all stages": self.stages * needs.columns * tile,
            "numbers of columns, all stages": self.stages * needs.vectors * self.columns * 4,
            "outputs on their way": self.warpgroups * needs.outputs * band,
            "barriers, scratch of reductions, alignment": 3 * 1024,
        }

    def check(self, needs: Needs, head_size: int) -> None:
        """Raises ValueError if a kernel of such needs takes more shared memory than there is."""
        terms = self.shared_terms(needs, head_size)
        used = sum(terms.values())
        if used > SHARED_BYTES:
            raise ValueError(f"{self} needs {used} bytes of shared memory, {terms}; there are {SHARED_BYTES}.")


@dataclasses.dataclass(frozen=True)
class HopperBlocks:
    """`Blocks` of each of the three kernels; their times add up, so that each can be chosen alone."""

    forward: Blocks
    grad_queries: Blocks
    grad_keys: Blocks

    def check(self, head_size: int) -> None:
        """Raises ValueError if a kernel takes more shared memory than there is."""
        for name, needs in NEEDS.items():
            getattr(self, name).check(needs, head_size)


# The fastest measured, bfloat16, D of 64, by kind of device, then by the greatest number in the table that some query
# sees more keys than, and whether there is QK-norm. Short ranges leave wide tiles half empty, and a relay waits there
# for whoever begins or ends a band. With QK-norm the loading warpgroup wants registers, to normalise a tile once for
# all who read it: of these four beat three with wider tiles. Only the longest ranges repay the pass over all keys that
# pairs of products want. The kernel for dk and dv has no registers to give.
TUNED = {
    DEFAULT_KIND: {
        (0, False): HopperBlocks(Blocks(4, 64, 64, 7, 32), Blocks(3, 64, 64, 5, 32), Blocks(3, 64, 64, 4, 32)),
        (0, True): HopperBlocks(Blocks(4, 64, 64, 7, 64), Blocks(3, 64, 64, 5, 56), Blocks(3, 64, 64, 4, 32)),
        (512, False): HopperBlocks(Blocks(3, 64, 128, 4, 32), Blocks(3, 64, 64, 5, 32), Blocks(3, 64, 64, 4, 32, True)),
        (512, True): HopperBlocks(
            Blocks(4, 64, 64, 7, 64, True), Blocks(3, 64, 64, 5, 56), Blocks(3, 64, 64, 4, 32, True)
        ),
        (2048, True): HopperBlocks(
            Blocks(4, 64, 64, 7, 32, True, True), Blocks(3, 64, 64, 5, 56), Blocks(3, 64, 64, 4, 32, True)
        ),
    },
}


def tuned_blocks(key_ranges: np.ndarray, norm: bool) -> HopperBlocks:
    """The fastest known for the device that is compiled for.

    Args:
      key_ranges: (L,2), what each query sees.
      norm: whether q and k are normalised.
    """
    kind, length = _place(key_ranges, norm)
    return TUNED.get(kind, TUNED[DEFAULT_KIND])[length, norm]


def table_entry(key_ranges: np.ndarray, head_size: int, dtype: Any, norm: bool) -> str:
    """Where in this module blocks belong that are measured here; arguments as of `candidates`."""
    del head_size, dtype
    kind, length = _place(key_ranges, norm)
    return f"TUNED[{kind!r}][{length}, {norm}]"


def _place(key_ranges: np.ndarray, norm: bool) -> tuple[str, int]:
    """The kind of device that is compiled for; the greatest number in the table that some query sees more keys than."""
    _, kind = devices.device()
    cases, most = TUNED.get(kind, TUNED[DEFAULT_KIND]), np.diff(key_ranges).max()
    return kind, max(length for length, normed in cases if length < most and normed == norm)


def candidates(key_ranges: np.ndarray, head_size: int, dtype: Any, norm: bool) -> list[HopperBlocks]:
    """What is worth timing: what is in use, then others that differ from it in the blocks of one kernel.

    They fit into shared memory, with as many stages as do or about half of them, and accumulators fill at most four
    fifths of the registers.

    Args:
      key_ranges: (L,2), what each query sees.
      head_size: D.
      dtype: of q, k and v.
      norm: whether q and k are normalised.
    """
    if jnp.dtype(dtype).itemsize != 2:
        raise ValueError(f"The Hopper kernels take numbers of 16 bits, not {dtype}.")
    used = tuned_blocks(key_ranges, norm)
    found = [used]
    for name, needs in NEEDS.items():
        mine: Blocks = getattr(used, name)
        choices = (2, 3, 4), (64, 128), (False, True), (False, True) if name == "forward" else (False,)
        for warpgroups, columns, relay, paired in itertools.product(*choices):
            cut = dataclasses.replace(mine, warpgroups=warpgroups, columns=columns, relay=relay, paired=paired)
            cuts = [dataclasses.replace(cut, stages=stages) for stages in range(2, 9)]
            fit = [blocks for blocks in cuts if sum(blocks.shared_terms(needs, head_size).values()) <= SHARED_BYTES]
            if fit and 5 * fit[0].accumulators(needs, head_size) <= 4 * fit[0].compute_registers:
                found += [dataclasses.replace(used, **{name: blocks}) for blocks in (fit[len(fit) // 2], fit[-1])]
    return list(dict.fromkeys(found))
