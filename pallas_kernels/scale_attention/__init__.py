"""Block-sparse attention for token pyramids: one function, `scale_attention`, behind which are all implementations.

`api` chooses among them; `reference` is the specification, `xla` runs anywhere, `hopper`, `tpu` and `triton` are rooms
of kernels; `operands` and `ranges` check what kernels are called with; `bench` checks and times them all.
"""

from pallas_kernels.scale_attention.api import BATCH_AXES, packed_scale_attention, scale_attention

__all__ = ["BATCH_AXES", "packed_scale_attention", "scale_attention"]
