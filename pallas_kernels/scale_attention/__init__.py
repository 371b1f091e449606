"""Block-sparse attention for token pyramids, behind one door."""

from pallas_kernels.scale_attention.api import BATCH_AXES, packed_scale_attention, scale_attention

__all__ = ["BATCH_AXES", "packed_scale_attention", "scale_attention"]
