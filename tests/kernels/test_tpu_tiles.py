"""The TPU kernels' lists of tile pairs, and how large tiles are, against pairs counted one by one."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh
from tile_pairs import visible_pairs

from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention.tpu import tiles as tpu_tiles
from pallas_kernels.scale_attention.tpu.attention import candidates
from pallas_kernels.scale_attention.tpu.tiles import TpuBlocks

PATTERNS = ["block_diagonal", "block_causal"]

ladders = st.lists(st.integers(1, 7), min_size=1, max_size=4, unique=True).map(lambda sides: ScaleLadder(sorted(sides)))
tile_sizes = st.integers(1, 40)


class TestTileList:
    @given(ladders, st.sampled_from(PATTERNS), tile_sizes, tile_sizes, st.sampled_from(["queries", "keys"]))
    def test_holds_each_pair_with_something_visible_once_and_masks_those_with_something_hidden(
        self, ladder, pattern, queries, keys, order
    ):
        ranges = ladder.key_ranges(pattern)
        query, key, flags = tpu_tiles.tile_list(ranges, queries, keys, order)
        expected = visible_pairs(ranges, queries, keys)
        assert sorted(zip(query.tolist(), key.tolist(), strict=True)) == sorted(expected)
        masked = [expected[pair] < queries * keys for pair in zip(query.tolist(), key.tolist(), strict=True)]
        np.testing.assert_array_equal(flags & tpu_tiles.MASKED != 0, masked)

    @given(ladders, st.sampled_from(PATTERNS), tile_sizes, tile_sizes, st.sampled_from(["queries", "keys"]))
    def test_flags_the_first_and_the_last_pair_of_every_tile_and_keeps_those_of_the_slow_index_together(
        self, ladder, pattern, queries, keys, order
    ):
        query, key, flags = tpu_tiles.tile_list(ladder.key_ranges(pattern), queries, keys, order)
        for index, first, last in (
            (query, tpu_tiles.FIRST_OF_QUERIES, tpu_tiles.LAST_OF_QUERIES),
            (key, tpu_tiles.FIRST_OF_KEYS, tpu_tiles.LAST_OF_KEYS),
        ):
            for step, tile in enumerate(index):
                assert bool(flags[step] & first) == (tile not in index[:step])
                assert bool(flags[step] & last) == (tile not in index[step + 1 :])
        slow = query if order == "queries" else key
        assert (np.diff(slow) >= 0).all()

    @given(ladders, st.sampled_from(PATTERNS), tile_sizes)
    def test_queries_beyond_the_end_see_what_the_last_one_does(self, ladder, pattern, queries):
        ranges = ladder.key_ranges(pattern)
        padded = tpu_tiles.pad_ranges(ranges, queries)
        assert len(padded) % queries == 0
        np.testing.assert_array_equal(padded[: len(ranges)], ranges)
        np.testing.assert_array_equal(padded[len(ranges) :], np.broadcast_to(ranges[-1], padded[len(ranges) :].shape))

    @pytest.mark.parametrize("preset", ["256", "512", "1024"])
    @pytest.mark.parametrize(
        ("pattern", "most"),
        [
            ("block_diagonal", {"256": 3.34, "512": 1.70, "1024": 1.39}),
            ("block_causal", {"256": 1.61, "512": 1.17, "1024": 1.13}),
        ],
    )
    def test_default_tiles_visit_little_more_than_the_visible_pairs(self, preset, pattern, most):
        ladder = ScaleLadder.preset(preset)
        ranges, blocks = ladder.key_ranges(pattern), tpu_tiles.tuned_blocks(ladder.length)
        steps = tpu_tiles.tile_list(ranges, blocks.queries, blocks.keys, "queries").shape[1]
        assert steps * blocks.queries * blocks.keys <= most[preset] * np.sum(ranges[:, 1] - ranges[:, 0])


class TestBlocks:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"queries": 64}, "queries is 64; it must be a positive multiple of 128"),
            ({"keys": 24}, "keys is 24; it must be a positive multiple of 16"),
            ({"groups": 0}, "groups is 0; it must be a positive multiple of 1"),
        ],
    )
    def test_sizes_that_the_hardware_does_not_have_raise(self, sizes, message):
        with pytest.raises(ValueError, match=message):
            TpuBlocks(**sizes)

    @pytest.mark.parametrize("preset", ["64", "128", "256", "512", "1024"])
    @pytest.mark.parametrize("itemsize", [2, 4])
    def test_defaults_fit_into_half_of_the_smallest_memory(self, preset, itemsize):
        length = ScaleLadder.preset(preset).length
        blocks = tpu_tiles.tuned_blocks(length)
        for backward in (False, True):
            terms = blocks.vmem_terms(length, 64, itemsize, backward=backward)
            assert 0 < sum(terms.values()) < 32 * 2**20

    def test_a_device_gets_its_own_row_and_one_that_nobody_measured_the_default(self, monkeypatch):
        default = tpu_tiles.tuned_blocks(680)
        monkeypatch.setitem(tpu_tiles.TUNED, "TPU v6 lite", {tpu_tiles.MOST_TOKENS: TpuBlocks(640, 512, 2)})
        for kind, expected in (("TPU v6 lite", TpuBlocks(640, 512, 2)), ("TPU v5 lite", default)):
            device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
            with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
                assert tpu_tiles.tuned_blocks(680) == expected

    @pytest.mark.parametrize("most", [1, 130, 1024, 1025, 4096, 4097, 10**6])
    def test_tiles_are_no_longer_than_the_tokens_fill(self, most):
        blocks = tpu_tiles.tuned_blocks(most)
        assert blocks.queries - 128 < most and blocks.keys - 16 < most

    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("preset", ["256", "512", "1024"])
    def test_candidates_start_with_what_is_in_use_fit_and_weigh_little_more_than_the_best(self, preset, pattern):
        ranges = ScaleLadder.preset(preset).key_ranges(pattern)
        used, *others = candidates(ranges, 64, "bfloat16", norm=True)
        assert used == tpu_tiles.tuned_blocks(len(ranges))
        assert others and len({used, *others}) == 1 + len(others)
        for blocks in others:
            assert sum(blocks.vmem_terms(len(ranges), 64, 2, backward=True).values()) < tpu_tiles.VMEM_BYTES
            assert tpu_tiles.weight(ranges, blocks) <= 1.26 * min(tpu_tiles.weight(ranges, b) for b in others)

    @given(ladders, st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(1, 3))
    def test_weight_counts_the_visited_tile_pairs(self, ladder, pattern, queries, keys):
        ranges, blocks = ladder.key_ranges(pattern), TpuBlocks(128 * queries, 16 * keys, 2)
        visited = tpu_tiles.tile_list(ranges, blocks.queries, blocks.keys, "queries").shape[1]
        pair = blocks.queries * blocks.keys + 64 * (blocks.queries + blocks.keys) + 23000
        assert tpu_tiles.weight(ranges, blocks) == visited * pair

    def test_candidates_print_as_what_the_table_wants(self):
        for blocks in candidates(ScaleLadder((1, 9)).key_ranges("block_causal"), 64, "float32", norm=False):
            assert eval(repr(blocks)) == blocks
