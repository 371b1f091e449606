"""Block-sparse attention for token pyramids, behind one door."""

from pallas_kernels.scale_attention.api import scale_attention

__all__ = ["scale_attention"]
