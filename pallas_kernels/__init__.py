"""Kernels that hmar_jax builds on; never imports hmar_jax."""
