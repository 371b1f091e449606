"""Kernels for Hopper GPUs (H100, H200) in Mosaic GPU; `attention` has `hopper_attention` and what tunes it.

`blocks` and `tiles` are plain Python (sizes and visits); `pipeline`, `common`, `forward` and `backward` need Pallas.
"""
