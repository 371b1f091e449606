"""Kernels for TPUs in Pallas; `attention` has `tpu_attention` and what tunes it.

`tiles` and `problem` are plain Python about sizes and visits; `kernels` is what a core computes.
"""
