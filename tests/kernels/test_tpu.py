"""The TPU kernels: interpreted on a CPU against the definition, and compiled for TPUs that are not there.

Run as a script, with the environment of `compiled` below, it compiles and prints what came of it as JSON.
"""

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tile_pairs import visible_pairs

from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention.reference import reference_attention
from pallas_kernels.scale_attention.tpu import tiles as tpu_tiles
from pallas_kernels.scale_attention.tpu.attention import TpuBlocks, tpu_attention, tpu_attention_packed

PATTERNS = ["block_diagonal", "block_causal"]
# Norm of the difference over norm of the truth: of the output, and of gradients.
TOLERANCE = {"float32": (3e-6, 5e-6), "bfloat16": (5e-3, 1e-2), "float16": (1e-5, 1e-4)}
STRICT = functools.partial(
    pltpu.InterpretParams, detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@pytest.fixture(autouse=True)
def interpreter():
    """An exception inside a kernel leaves the interpreter broken for the next test."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


def error_of(result, truth):
    result, truth = np.asarray(result, np.float64), np.asarray(truth, np.float64)
    return np.linalg.norm(result - truth) / np.linalg.norm(truth)


def make_case(sides, pattern, heads, size, dtype="float32", normalize=True, batch=1, seed=0):
    """q, k, v, the cotangent of the output, q_scale; key ranges."""
    ladder, rng = ScaleLadder(sides), np.random.default_rng(seed)
    shape = (batch, ladder.length, heads, size)
    arrays = [jnp.asarray(2 * rng.normal(size=shape), dtype) for _ in range(4)]
    scale = jnp.asarray(rng.uniform(1, 4, heads), jnp.float32) if normalize else None
    return (*arrays, scale), ladder.key_ranges(pattern)


def value_and_gradients(attention):
    @jax.jit
    def run(q, k, v, cotangent, q_scale):
        out, pull = jax.vjp(attention, q, k, v, q_scale)
        return out, [gradient for gradient in pull(cotangent) if gradient is not None]

    return run


def tpu(ranges, blocks, interpret):
    return lambda q, k, v, scale: tpu_attention(q, k, v, ranges, scale, blocks=blocks, interpret=interpret)


def reference(ranges):
    return lambda q, k, v, scale: reference_attention(q, k, v, ranges, scale)


# Between them: a scale of one token; lengths (155, 274, 256, 157, 140) within, beyond and at the end of a tile; odd H;
# groups of 4, 2 and 1 heads, one and two groups a step.
CASES = {
    "float32": ((1, 3, 8, 9), "block_causal", 4, 64, "float32", True),
    "plain": ((1, 3, 8, 9), "block_diagonal", 4, 64, "float32", False),
    "bfloat16": ((3, 11, 12), "block_diagonal", 4, 64, "bfloat16", True),
    "float16": ((1, 3, 4), "block_diagonal", 1, 128, "float16", True),
    "no edge": ((16,), "block_diagonal", 1, 128, "float32", False),
    "odd heads of 32": ((2, 3, 12), "block_diagonal", 3, 32, "float32", True),
    "odd heads of 64": ((2, 3, 12), "block_causal", 3, 64, "bfloat16", True),
    "odd heads of 128": ((1, 3, 7, 9), "block_diagonal", 3, 128, "bfloat16", False),
}


def random_case(seed):
    rng = np.random.default_rng(seed)
    sides = tuple(sorted(rng.choice(np.arange(1, 13), size=rng.integers(2, 5), replace=False).tolist()))
    return sides, PATTERNS[seed % 2], 2, 64, "float32", bool(seed // 2 % 2)


class TestInterpreted:
    """As a TPU would run it, with undefined memory as NaN, bounds checked and races looked for."""

    @pytest.mark.parametrize(
        "case", [*CASES.values(), *map(random_case, range(2))], ids=[*CASES, "random 0", "random 1"]
    )
    def test_outputs_and_gradients_are_those_of_the_definition_and_the_same_bits_each_time(self, case, capfd):
        arguments, ranges = make_case(*case)
        run = value_and_gradients(tpu(ranges, TpuBlocks(128, 48, 2), STRICT()))
        results, again = run(*arguments), run(*arguments)
        truth = value_and_gradients(reference(ranges))(*arguments)
        for tolerance, mine, true in zip(TOLERANCE[case[4]], results, truth, strict=True):
            for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
                assert x.shape == y.shape and x.dtype == y.dtype
                assert error_of(x, y) < tolerance
        jax.tree.map(np.testing.assert_array_equal, results, again)
        assert "RACE DETECTED" not in capfd.readouterr().out

    @pytest.mark.parametrize("normalize", [True, False], ids=["qk_norm", "plain"])
    def test_a_token_alone_gets_its_value_and_no_gradient_but_for_the_value(self, normalize):
        (q, k, v, cotangent, scale), ranges = make_case((1,), "block_causal", 2, 64, normalize=normalize)
        attention = tpu(ranges, TpuBlocks(128, 16), STRICT())
        out, (dq, dk, dv, *dscale) = value_and_gradients(attention)(q, k, v, cotangent, scale)
        np.testing.assert_allclose(out, v, rtol=1e-6)
        np.testing.assert_allclose(dv, cotangent, rtol=1e-6)
        for gradient in (dq, dk, *dscale):
            np.testing.assert_allclose(gradient, jnp.zeros_like(gradient), atol=2e-5)

    def test_queries_and_keys_of_zeros_have_the_gradients_of_the_definition_under_qk_norm(self):
        (q, k, v, cotangent, scale), ranges = make_case((1, 2), "block_diagonal", 2, 64)
        arguments = q.at[:, 2].set(0), k.at[:, 1].set(0).at[:, 3].set(1e-14), v, cotangent, scale
        results = value_and_gradients(tpu(ranges, TpuBlocks(128, 16), STRICT()))(*arguments)
        truth = value_and_gradients(reference(ranges))(*arguments)
        for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(truth), strict=True):
            assert error_of(x, y) < TOLERANCE["float32"][1]

    def test_packed_arrays_give_the_same_bits(self):
        arguments, ranges = make_case((1, 2), "block_causal", 3, 64)
        options = {"blocks": TpuBlocks(128, 16), "interpret": STRICT()}

        def packed(q, k, v, scale):
            return tpu_attention_packed(jnp.stack([q, k, v], axis=2), ranges, scale, **options)

        expected = value_and_gradients(tpu(ranges, **options))(*arguments)
        jax.tree.map(np.testing.assert_array_equal, value_and_gradients(packed)(*arguments), expected)

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_visits_the_tiles_that_hold_a_visible_pair_and_no_others(self, pattern):
        arguments, ranges = make_case((1, 3, 8, 9), pattern, 4, 64)
        visited = []

        def record(token, point, core):
            visited.append(tuple(map(int, point)))
            return token

        interpret = STRICT(grid_point_recorder=record)
        jax.block_until_ready(value_and_gradients(tpu(ranges, TpuBlocks(128, 48), interpret))(*arguments))
        expected = []
        for order in ("queries", "keys"):  # forward, then backward; two groups of two heads
            pairs = tpu_tiles.tile_list(ranges, 128, 48, order)
            assert set(zip(*pairs[:2].tolist(), strict=True)) == set(visible_pairs(ranges, 128, 48))
            expected += [(0, group, step) for group in range(2) for step in range(pairs.shape[1])]
        assert sorted(visited) == sorted(expected)


class TestCostEstimate:
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_counts_the_products_exponentials_and_tile_moves_of_the_visited_pairs(self, pattern):
        (q, k, v, cotangent, scale), ranges = make_case((1, 3, 8, 9), pattern, 4, 64, batch=2)
        run = value_and_gradients(tpu(ranges, TpuBlocks(128, 48), False))
        text = str(jax.make_jaxpr(run)(q, k, v, cotangent, scale))
        estimates = re.findall(r"CostEstimate\(flops=(\d+), transcendentals=(\d+), bytes_accessed=(\d+)", text)
        tile, number = 8 * 64 * 4, 8 * 4  # bytes of a row of q, and of a statistic, of all images and heads

        def moves(tiles):
            return len(list(itertools.groupby(tiles)))

        expected = []
        for order, products, by_query, statistics, by_key, whole in (
            ("queries", 192, 2, 1, 2, 0),
            ("keys", 576, 2, 2, 4, 1),
        ):
            pairs = sorted(visible_pairs(ranges, 128, 48), key=lambda pair: pair if order == "queries" else pair[::-1])
            visited = 8 * len(pairs) * 128 * 48
            queries, keys = 128 * moves(pair[0] for pair in pairs), 48 * moves(pair[1] for pair in pairs)
            moved = (by_query * queries + by_key * keys + whole * 155) * tile + statistics * queries * number
            expected.append((2 * products * visited, visited, moved))
        assert [tuple(map(int, estimate)) for estimate in estimates] == expected


class TestTransformations:
    def check(self, transform, interpret):
        arguments, ranges = make_case((1, 2, 3), "block_causal", 2, 64, batch=2)
        mine, truth = (
            value_and_gradients(transform(attention))(*arguments)
            for attention in (tpu(ranges, TpuBlocks(128, 16), interpret), reference(ranges))
        )
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(truth), strict=True):
            assert error_of(x, y) < TOLERANCE["float32"][1]

    def test_scan_and_checkpoint(self):
        def transform(attention):
            def layers(q, k, v, scale):
                layer = jax.checkpoint(lambda q: attention(q, k, v, scale))
                return jax.lax.scan(lambda q, _: (layer(q), None), q, length=2)[0]

            return layers

        # The strict interpreter has side effects, which checkpoint does not take; this one is plain JAX.
        self.check(transform, interpret=True)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_shard_map(self, check_vma):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": (P("data"), P("data"), P("data"), P()), "out_specs": P("data")}
        self.check(functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma, **specs), STRICT())


class TestErrors:
    @pytest.mark.parametrize(
        ("shapes", "dtype", "message"),
        [
            (
                [(1, 5, 2, 64), (1, 4, 2, 64), (1, 5, 2, 64)],
                "float32",
                r"float32\[1, 4, 2, 64\].*expected thrice the same",
            ),
            ([(5, 2, 64)] * 3, "float32", "expected thrice the same"),
            (
                [(1, 5, 2, 48)] * 3,
                "float32",
                r"head size that divides 128 or is a multiple, not float32\[1, 5, 2, 48\]",
            ),
            ([(1, 5, 2, 64)] * 3, "int32", "take bfloat16, float32 or float16"),
            ([(1, 6, 2, 64)] * 3, "float32", r"key_ranges are of 5 tokens, float32\[1, 6, 2, 64\] has 6"),
        ],
    )
    def test_arrays_that_do_not_fit(self, shapes, dtype, message):
        ranges = ScaleLadder((1, 2)).key_ranges("block_causal")
        with pytest.raises(ValueError, match=message):
            tpu_attention(*(jnp.zeros(shape, dtype) for shape in shapes), ranges, None)

    @pytest.mark.parametrize("shape", [(1, 5, 2, 64), (1, 5, 2, 2, 64)])
    def test_packed_arrays_that_are_not_three(self, shape):
        with pytest.raises(ValueError, match=r"expected \(B, L, 3, H, D\)"):
            tpu_attention_packed(jnp.zeros(shape), ScaleLadder((1, 2)).key_ranges("block_causal"), None)

    @pytest.mark.parametrize(
        "ranges", [[[0, 1], [1, 1]], [[0, 2], [0, 1]], [[0, 1], [0, 1]], [[1, 2], [1, 2]]], ids=str
    )
    def test_ranges_that_are_empty_decrease_or_leave_a_key_unseen(self, ranges):
        with pytest.raises(ValueError, match="key_ranges are to cover all keys"):
            tpu_attention(*[jnp.zeros((1, 2, 2, 64))] * 3, np.array(ranges), None)


CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
OVERSIZED, PROJECTED = "v5e oversized", "v5e between projections"


def compile_for_tpus():
    """Name → "compiled" or the error, of forward and backward in one program; see also `_compile_projected`."""
    programs = {
        f"{chip} {preset}": (chip, preset, {"pattern": PATTERNS[i % 2]})
        for i, (chip, preset) in enumerate((chip, preset) for chip in CHIPS for preset in ("256", "512", "1024"))
    }
    programs |= {
        "v6e odd heads of 32": ("v6e", "128", {"heads": 5, "size": 32}),
        "v5p odd heads of 128": ("v5p", "128", {"heads": 3, "size": 128}),
        "v5e odd heads of 64, float32": ("v5e", "128", {"heads": 3, "dtype": "float32"}),
        OVERSIZED: ("v5e", "1024", {"heads": 32, "blocks": TpuBlocks(128, 128, 16)}),
    }
    for chip in CHIPS:
        _sharding(chip)  # once: devices that two threads made of the same chip don't mix
    with futures.ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda program: _compile(*program[:2], **program[2]), programs.values())
        return dict(zip(programs, results, strict=True)) | {PROJECTED: _compile_projected()}


def _compile(chip, preset, pattern="block_diagonal", heads=16, size=64, dtype="bfloat16", blocks=None):
    ladder = ScaleLadder.preset(preset)
    # A batch too large for XLA to keep in VMEM, as in training: the kernel needs all of its own buffers.
    array = _on_chip(chip, (16, ladder.length, heads, size), dtype)
    run = value_and_gradients(tpu(ladder.key_ranges(pattern), blocks, False))
    try:
        run.lower(array, array, array, array, _on_chip(chip, (heads,), "float32")).compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return "compiled"


def _compile_projected():
    """Number of copies of tokens that XLA adds between a projection, attention and the next projection."""
    ladder = ScaleLadder.preset("256")

    def run(x, weights, last):
        qkv = (x @ weights).reshape(*x.shape[:2], 3, 16, 64)
        return tpu_attention_packed(qkv, ladder.key_ranges("block_diagonal"), None).reshape(x.shape) @ last

    shapes = (64, ladder.length, 1024), (1024, 3 * 1024), (1024, 1024)
    program = jax.jit(run).lower(*(_on_chip("v5e", shape, "bfloat16") for shape in shapes)).compile()
    return sum(" copy(" in line and f"[64,{ladder.length}," in line for line in program.as_text().splitlines())


def _on_chip(chip, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding(chip))


@functools.cache
def _sharding(chip):
    topology = topologies.get_topology_desc(CHIPS[chip], platform="tpu", chips_per_host_bounds=[1, 1, 1])
    return NamedSharding(Mesh(np.array(topology.devices), ("data",)), P())


@pytest.fixture(scope="module")
def compiled():
    """What `compile_for_tpus` returns in a process of its own: the rest of the tests stay on the CPU."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run([sys.executable, __file__], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed")
class TestCompiled:
    def test_forward_and_backward_compile_for_every_chip_and_ladder(self, compiled):
        assert [compiled[name] for name in compiled.keys() - {OVERSIZED, PROJECTED}] == 12 * ["compiled"]

    def test_tiles_larger_than_the_memory_raise(self, compiled):
        assert "memory space vmem" in compiled[OVERSIZED]

    def test_a_projection_is_read_in_place(self, compiled):
        assert compiled[PROJECTED] == 0


if __name__ == "__main__":
    print(json.dumps(compile_for_tpus()))
