"""What keeps the codebook alive: k-means finds clusters, exactly the dead codes are revived, usage is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder
from hmar_jax.tokenizer import codebook as cb

KEY = jax.random.key(0)
LADDER = ScaleLadder((1, 2, 3))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def by_rows(array):
    """Rows in lexicographic order, to compare sets of vectors."""
    array = np.asarray(array)
    return array[np.lexsort(array.T)]


def squared_error(vectors, codes):
    return ((vectors[:, None] - codes[None]) ** 2).sum(-1).min(1).mean()


# --- k-means


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_well_separated_clusters(rng, seed):
    grid = np.stack(np.meshgrid(*[[-10.0, 0.0, 10.0]] * 2), -1).reshape(-1, 2)
    members = grid[:, None] + 0.1 * rng.normal(size=(9, 20, 2))
    vectors = rng.permutation(members.reshape(-1, 2))
    codes = cb.kmeans(jnp.asarray(vectors, jnp.float32), 9, jax.random.key(seed))
    np.testing.assert_allclose(by_rows(np.round(codes)), by_rows(grid))
    centers = members.mean(1)
    nearest = ((np.asarray(codes)[:, None] - centers) ** 2).sum(-1).argmin(1)
    np.testing.assert_allclose(codes, centers[nearest], atol=1e-5)


@pytest.fixture(scope="module")
def cloud():
    """(300,4) vectors, and 40 codes (more than rounds of the start) after 0 and after 3 iterations."""
    vectors = np.random.default_rng(1).normal(size=(300, 4)).astype(np.float32)
    return vectors, *(np.asarray(cb.kmeans(vectors, 40, KEY, iterations=iterations)) for iterations in (0, 3))


def test_kmeans_starts_from_distinct_vectors(cloud):
    vectors, start, _ = cloud
    assert len(np.unique(start, axis=0)) == 40
    assert squared_error(start, vectors) == 0


def test_lloyd_matches_numpy_from_the_same_start_and_lowers_the_error(cloud):
    vectors, start, end = cloud
    codes = start
    for _ in range(3):
        nearest = ((vectors[:, None] - codes[None]) ** 2).sum(-1).argmin(1)
        codes = np.stack([vectors[nearest == i].mean(0) for i in range(40)])
    np.testing.assert_allclose(end, codes, atol=1e-5)
    assert squared_error(vectors, end) < 0.9 * squared_error(vectors, start)


def test_an_empty_code_moves_to_a_vector_that_no_code_fits():
    others = 10 + np.arange(39 * 4, dtype=np.float32).reshape(39, 4)
    vectors = np.concatenate([np.zeros((261, 4), np.float32), others])
    start, end = (cb.kmeans(vectors, 40, jax.random.key(1), iterations=iterations) for iterations in (0, 3))
    assert len(np.unique(start, axis=0)) < 40, "the first round should draw two of the zeros"
    np.testing.assert_allclose(by_rows(end), np.concatenate([np.zeros((1, 4)), others]), rtol=1e-6)


def test_as_many_codes_as_vectors_are_the_vectors(rng):
    vectors = rng.normal(size=(40, 3)).astype(np.float32)
    np.testing.assert_allclose(by_rows(cb.kmeans(vectors, 40, KEY)), by_rows(vectors), atol=1e-6)


def test_equal_vectors_give_finite_codes():
    np.testing.assert_array_equal(cb.kmeans(np.ones((40, 3), np.float32), 40, KEY), np.ones((40, 3)))


def test_fewer_vectors_than_codes_are_filled_up_with_close_copies(rng):
    vectors = rng.normal(size=(5, 3)).astype(np.float32)
    codes = np.asarray(cb.kmeans(jnp.asarray(vectors), 12, KEY))
    assert len(np.unique(codes, axis=0)) == 12
    assert squared_error(codes, vectors) < 1e-3
    assert squared_error(vectors, codes) < 1e-3


def test_chunks_do_not_change_the_nearest_code(rng, monkeypatch):
    vectors, codes = (rng.normal(size=(n, 3)).astype(np.float32) for n in (50, 7))
    expected = ((vectors[:, None] - codes) ** 2).sum(-1)
    for chunk in (4096, 16):
        monkeypatch.setattr(cb, "_CHUNK", chunk)
        nearest, distances = cb._nearest(jnp.asarray(vectors), jnp.asarray(codes))
        np.testing.assert_array_equal(nearest, expected.argmin(1))
        np.testing.assert_allclose(distances, expected.min(1), rtol=1e-5)


def test_full_size_kmeans_never_holds_all_distances():
    shape = jax.ShapeDtypeStruct((200_000, 32), jnp.float32)
    memory = cb.kmeans.lower(shape, 4096, KEY).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 400 * 2**20


def test_kmeans_refuses_no_vectors_and_no_codes():
    for vectors, codes in [(jnp.zeros((0, 2)), 4), (jnp.zeros((3, 2, 2)), 4), (jnp.zeros((3, 2)), 0)]:
        with pytest.raises(InputError, match="kmeans got"):
            cb.kmeans(vectors, codes, KEY)


# --- usage and revival


def test_usage_is_the_moving_average_of_shares(rng):
    usage, expected = jnp.full(6, 1 / 6), np.full(6, 1 / 6)
    for _ in range(3):
        tokens = rng.integers(0, 5, (4, 7))
        usage = cb.update_usage(usage, jnp.asarray(tokens), 0.9)
        expected = 0.9 * expected + 0.1 * np.bincount(tokens.ravel(), minlength=6) / 28
    np.testing.assert_allclose(usage, expected, rtol=1e-5)
    np.testing.assert_allclose(usage.sum(), 1, rtol=1e-6)
    assert usage.dtype == jnp.float32


def revival_case(rng, candidates):
    book = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    usage = jnp.asarray(
        [0.3, 0.0, 0.0124, 0.0126, 0.2, 0.001, 0.4, 0.0859], jnp.float32
    )  # dead_below 0.1 of 1/8: .0125
    vectors = jnp.asarray(100 + rng.normal(size=(candidates, 3)), jnp.float32)
    return book, usage, vectors, np.array([False, True, True, False, False, True, False, False])


def test_exactly_the_codes_below_the_threshold_are_revived_with_candidates_of_their_own(rng):
    book, usage, vectors, dead = revival_case(rng, 20)
    revive = jax.jit(cb.revive_dead_codes)
    new_book, new_usage, count = revive(book, usage, vectors, KEY, dead_below=0.1)
    assert count == 3
    np.testing.assert_array_equal(new_book[~dead], book[~dead])
    np.testing.assert_array_equal(new_usage, np.where(dead, np.float32(1 / 8), usage))
    rows = {tuple(row) for row in np.asarray(new_book)[dead].tolist()}
    assert len(rows) == 3
    assert rows <= {tuple(row) for row in np.asarray(vectors).tolist()}
    assert cb.revive_dead_codes(new_book, new_usage, vectors, KEY, dead_below=0.1)[2] == 0


def test_revival_is_a_function_of_the_key(rng):
    book, usage, vectors, _ = revival_case(rng, 20)
    once, again, other = (
        cb.revive_dead_codes(book, usage, vectors, jax.random.key(seed), dead_below=0.1)[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()


def test_revival_works_with_fewer_candidates_than_dead_codes(rng):
    book, usage, vectors, dead = revival_case(rng, 2)
    revived = np.asarray(cb.revive_dead_codes(book, usage, vectors, KEY, dead_below=0.1)[0])[dead]
    assert {tuple(row) for row in revived.tolist()} == {tuple(row) for row in np.asarray(vectors).tolist()}


def test_a_threshold_of_zero_revives_nothing(rng):
    book, usage, vectors, _ = revival_case(rng, 4)
    new_book, new_usage, count = cb.revive_dead_codes(book, usage, vectors, KEY, dead_below=0.0)
    assert count == 0
    np.testing.assert_array_equal(new_book, book)
    np.testing.assert_array_equal(new_usage, usage)


def test_revival_refuses_shapes_that_do_not_fit():
    book, usage, vectors = jnp.zeros((4, 3)), jnp.zeros(4), jnp.zeros((5, 3))
    for arguments in [(book, usage[:3], vectors), (book, usage, vectors[:, :2]), (book, usage, vectors[:0])]:
        with pytest.raises(InputError, match="To revive codes"):
            cb.revive_dead_codes(*arguments, KEY, dead_below=0.1)


# --- what the scales draw


def test_codes_in_use_counts_distinct_codes_of_each_scale():
    tokens = jnp.asarray([[0, 1, 1, 1, 1, *range(9)], [0, 1, 1, 2, 9, *range(9)]])
    codes_in_use = jax.jit(cb.codes_in_use, static_argnums=(1, 2))
    np.testing.assert_allclose(codes_in_use(tokens, LADDER, 10), [1 / 2, 3 / 8, 9 / 10], rtol=1e-6)
    np.testing.assert_allclose(codes_in_use(tokens, LADDER, 100), [1 / 2, 3 / 8, 9 / 18], rtol=1e-6)


def test_codes_in_use_refuses_tokens_of_another_ladder():
    with pytest.raises(InputError, match=r"not \(B,14\)"):
        cb.codes_in_use(jnp.zeros((2, 13), jnp.int32), LADDER, 10)


def test_truncation_keeps_a_uniform_number_of_scales_in_the_given_share_of_samples():
    kept = np.asarray(cb.truncate_scales(KEY, 40_000, 4, 0.4))
    assert kept.dtype == np.int32
    np.testing.assert_allclose(np.bincount(kept, minlength=5) / 40_000, [0, 0.1, 0.1, 0.1, 0.7], atol=0.01)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_truncation_at_the_ends_of_its_rate(rate):
    kept = np.asarray(cb.truncate_scales(KEY, 1000, 3, rate))
    assert set(kept.tolist()) == ({3} if rate == 0 else {1, 2, 3})
