"""What is compiled for, where that is not the device here: what Triton is told, and which kernels it gets."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest
from absent_devices import A100, H200, V5E, compiling_for, gpu

from pallas_kernels import devices
from pallas_kernels.scale_attention.triton import tiles as triton_tiles

CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
ADA = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA RTX 4000 Ada", compute_capability="8.9")


@pytest.fixture(params=[CPU, ADA], ids=["cpu", "ada"])
def here(request, monkeypatch):
    """The first device of the machine."""
    monkeypatch.setattr(jax, "devices", lambda: [request.param])
    return request.param


@pytest.mark.parametrize(
    ("absent", "capability", "served", "shared"),
    [
        (H200, "9.0", True, 227 * 1024),
        (A100, "8.0", True, 163 * 1024),
        (gpu("NVIDIA L4"), "8.9", True, 99 * 1024),
        (gpu("Tesla T4"), "", False, 99 * 1024),
        (V5E, "", False, 99 * 1024),
    ],
    ids=lambda value: getattr(value, "device_kind", ""),
)
@pytest.mark.parametrize("installed", [True, False], ids=["jax_triton", "without"])
@pytest.mark.usefixtures("here")
def test_triton_is_judged_by_the_devices_of_the_mesh(monkeypatch, absent, capability, served, shared, installed):
    monkeypatch.setattr(devices, "is_installed", lambda _: installed)
    with compiling_for(absent, {"data": 2}):
        assert devices.compute_capability() == capability
        assert devices.is_served_by_triton() is served
        assert devices.has_triton() is (served and installed)
        assert triton_tiles.shared_bytes() == shared


def test_a_mesh_of_the_devices_here_is_asked_for_what_they_are(here):
    with compiling_for(gpu(here.device_kind), {"data": 2}):
        assert devices.compute_capability() == getattr(here, "compute_capability", "")
    assert devices.device() == (here.platform, here.device_kind)


def test_triton_is_told_of_the_gpu_and_to_fuse_products_with_sums(monkeypatch):
    fake = types.SimpleNamespace(triton_call=lambda *arrays, **told: told)
    monkeypatch.setitem(sys.modules, "jax_triton", fake)
    monkeypatch.setattr(devices, "vary_as", lambda array, tree: tree)
    with compiling_for(H200):
        told = devices.triton_call(jnp.zeros(3), num_warps=2)
    assert told == {"compute_capability": 90, "enable_fp_fusion": True, "num_warps": 2}
