"""Kernels for NVIDIA GPUs since Ampere in Triton; `attention` has `triton_attention` and what tunes it.

`tiles` is plain Python about sizes and visits; `kernels` and `attention` need the package `triton`, whose name this
room shares: imports here are absolute.
"""
