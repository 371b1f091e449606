"""Kernels for TPUs in Pallas; `attention` has `tpu_attention` and what tunes it.

`tiles` is plain Python about sizes and visits; `kernels` is what a core computes.
"""
