"""Guidance, top-k, top-p, draws and the order of commitment, by hand-made cases and by sorting in numpy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.sampling import filters

OFF_K, OFF_P = 0, 1.0
filter_logits, draw = jax.jit(filters.filter_logits), jax.jit(filters.draw)
by_comparing, by_sorting = jax.jit(filters._rank_by_comparing), jax.jit(filters._rank_by_sorting)


def kept(logits, top_k=OFF_K, top_p=OFF_P):
    """Indices that survive; what survives must be unchanged."""
    logits = jnp.asarray(logits, jnp.float32)
    filtered = np.asarray(filter_logits(logits, jnp.int32(top_k), jnp.float32(top_p)))
    survivors = np.flatnonzero(np.isfinite(filtered))
    np.testing.assert_array_equal(filtered[survivors], np.asarray(logits)[survivors])
    assert (filtered[np.isinf(filtered)] < 0).all()
    return survivors.tolist()


def test_guidance_formula():
    cond, null = jnp.asarray([1.0, 2.0, -3.0]), jnp.asarray([0.5, 2.5, 1.0])
    np.testing.assert_allclose(filters.guide(cond, null, jnp.float32(1.5)), [1.75, 1.25, -9.0])
    np.testing.assert_array_equal(filters.guide(cond, null, jnp.float32(0)), cond)


@pytest.mark.parametrize(
    ("top_k", "survivors"),
    [
        (1, [0]),
        (2, [0, 2, 3]),  # the second and third largest tie
        (3, [0, 2, 3]),
        (4, [0, 1, 2, 3]),
        (5, [0, 1, 2, 3, 4]),
        (0, [0, 1, 2, 3, 4]),  # off
        (99, [0, 1, 2, 3, 4]),  # more than there are
    ],
)
def test_top_k_keeps_ties_with_the_kth(top_k, survivors):
    assert kept([3.0, 1.0, 2.0, 2.0, 0.0], top_k=top_k) == survivors


def test_top_1_keeps_all_that_are_largest():
    assert kept([1.0, 4.0, 4.0, 0.0], top_k=1) == [1, 2]


@pytest.mark.parametrize(
    ("top_p", "survivors"),
    [
        (1.0, [0, 1, 2, 3]),
        (0.96, [0, 1, 2, 3]),  # the least has 0.05 > 0.04
        (0.94, [0, 2, 3]),  # 0.05 ≤ 0.06
        (0.81, [0, 2, 3]),  # 0.05 + 0.15 > 0.19
        (0.79, [0, 3]),
        (0.51, [0, 3]),
        (0.49, [0]),  # 0.05 + 0.15 + 0.3 ≤ 0.51
        (1e-6, [0]),
    ],
)
def test_top_p_drops_the_ascending_tail_of_at_most_the_rest(top_p, survivors):
    assert kept(np.log([0.5, 0.05, 0.15, 0.3]), top_p=top_p) == survivors


def test_top_p_drops_a_tail_of_exactly_the_rest():
    # softmax gives exactly 1/2, 1/4, 1/4 for these float32 logits, up to one rounding that 0.5 survives
    mass = np.asarray(jax.nn.softmax(jnp.log(jnp.asarray([0.5, 0.25, 0.25], jnp.float32))))
    top_p = 1 - float(mass[1] + mass[2])
    assert kept(np.log(np.asarray([0.5, 0.25, 0.25], np.float32)), top_p=top_p) == [0]


def test_top_p_keeps_all_that_tie_with_a_kept_one():
    assert kept([0.0, 0.0, 0.0, 0.0], top_p=0.3) == [0, 1, 2, 3]
    assert kept([5.0, 5.0, -5.0], top_p=1e-6) == [0, 1]


def test_top_p_weighs_what_top_k_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(logits, top_p=0.55) == [0, 1]  # tail 0.1 + 0.2 ≤ 0.45
    assert kept(logits, top_k=2, top_p=0.55) == [0]  # tail 0.3/0.7 ≤ 0.45


def filtered_by_sorting(logits, top_k, top_p):
    """The same by sorting: (N,V) float32 → (N,V), and how near to the limit of top-p the nearest tail is, (N,)."""
    size = logits.shape[-1]
    ascending = jnp.sort(logits, axis=-1)
    kth = ascending[:, size - (min(top_k, size) or size)][:, None]
    tail = jnp.cumsum(jax.nn.softmax(jnp.where(ascending < kth, -jnp.inf, ascending), axis=-1), axis=-1)
    dropped = ((tail <= 1 - top_p) & (top_p < 1)).at[:, -1].set(False)
    least = jnp.min(jnp.where(dropped, jnp.inf, ascending), axis=-1, keepdims=True)
    near = jnp.min(jnp.abs(tail - (1 - top_p)), axis=-1)
    return jnp.where(logits >= jnp.maximum(kth, least), logits, -jnp.inf), near


@pytest.mark.parametrize("shape", ["spread", "bfloat16, many ties", "of one sign", "one apart", "tiny and huge"])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (100, 1.0), (0, 0.96), (100, 0.905), (1, 0.5), (511, 0.3)])
def test_filters_equal_sorting_bit_for_bit(shape, top_k, top_p):
    noise = jax.random.normal(jax.random.key(5), (64, 512))
    logits = {
        "spread": 3 * noise,
        "bfloat16, many ties": noise.astype(jnp.bfloat16).astype(jnp.float32),
        "of one sign": -jnp.exp(noise),
        "one apart": jax.lax.bitcast_convert_type(1065353216 + jnp.argsort(noise).astype(jnp.int32), jnp.float32),
        "tiny and huge": jnp.where(noise > 1, 1e30 * noise, jnp.where(noise > 0, 1e-41 * noise, 0.0 * noise)),
    }[shape]
    expected, near = filtered_by_sorting(logits, top_k, top_p)
    filtered = filter_logits(logits, jnp.int32(top_k), jnp.float32(top_p))
    # Sums of 512 probabilities in another order differ by less than 1e-6: nearer to the limit either answer is right.
    decided = np.asarray(near > 1e-6) if top_p < 1 else np.full(64, True)
    assert decided.sum() > 60
    np.testing.assert_array_equal(np.asarray(filtered)[decided], np.asarray(expected)[decided])


@pytest.mark.parametrize(
    "search",
    [functools.partial(filters._filter_by_search, bits=3), filters._filter_by_sorting],
    ids=["by digits of 3 bits", "sort"],
)
def test_what_other_platforms_do_gives_the_same(search):
    logits = jnp.concatenate([3 * jax.random.normal(jax.random.key(6), (32, 24)), jnp.full((32, 2), -jnp.inf)], -1)
    search = jax.jit(search)
    for top_k, top_p in [(0, 1.0), (9, 0.9), (25, 1.0), (1, 0.4), (0, 0.7)]:
        controls = jnp.int32(top_k), jnp.float32(top_p)
        np.testing.assert_array_equal(search(logits, *controls), filter_logits(logits, *controls))


def test_dropped_logits_and_both_zeros_are_logits_like_others():
    logits = jnp.asarray([1.0, -jnp.inf, 0.0, -0.0, -1.0, -jnp.inf], jnp.float32)
    assert kept(logits, top_k=2) == [0, 2, 3]
    assert kept(logits, top_k=4) == [0, 2, 3, 4]
    assert kept(logits, top_k=6) == [0, 2, 3, 4]
    assert kept(logits, top_p=0.2) == [0]


@hypothesis.given(
    logits=st.lists(st.integers(-8, 8).map(lambda i: i / 2), min_size=1, max_size=12),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1.0, 0.97, 0.83, 0.41, 0.07]),
)
def test_filters_equal_a_walk_up_the_sorted_logits(logits, top_k, top_p):
    values = np.asarray(logits)
    limit = np.sort(values)[::-1][min(top_k or len(values), len(values)) - 1]
    mass = np.where(values >= limit, np.exp(values), 0)
    mass /= mass.sum()
    order = np.argsort(values, kind="stable")
    tail = np.cumsum(mass[order])
    hypothesis.assume(np.abs(tail - (1 - top_p)).min() > 1e-5)  # float32 decides those
    dropped = set(order[:-1][tail[:-1] <= 1 - top_p]) | set(np.flatnonzero(values < limit))
    survivors = [i for i in range(len(values)) if i not in dropped]
    survivors = [i for i in range(len(values)) if values[i] >= values[survivors].min()]
    padded = np.concatenate([values, np.full(12 - len(values), -np.inf)])  # one shape, one compilation
    assert kept_padded(padded, top_k if top_k < len(values) else 0, top_p) == survivors


def kept_padded(logits, top_k, top_p):
    filtered = filter_logits(jnp.asarray(logits, jnp.float32), jnp.int32(top_k), jnp.float32(top_p))
    return np.flatnonzero(np.isfinite(filtered)).tolist()


@pytest.mark.parametrize("top_k", [1, 3, 0])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 1.0])
def test_the_largest_of_every_row_is_kept(top_k, top_p):
    logits = 20 * jax.random.normal(jax.random.key(0), (3, 50, 64))
    filtered = filter_logits(logits, jnp.int32(top_k), jnp.float32(top_p))
    best = np.argmax(logits, -1)[..., None]
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(filtered), best, -1), np.take_along_axis(np.asarray(logits), best, -1)
    )


# --- draws


def sample_keys(batch):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(batch))


PROBABILITIES = {
    "one group": [0.5, 0.2, 0.0, 0.3],
    "several groups": np.repeat([0.5, 0.0, 0.1, 0.4], 96) * np.tile([0.0, 1 / 64, 1 / 64], 128),
    "one far from the others": np.eye(257)[256] * 0.9 + np.eye(257)[3] * 0.1,
    "a group left, of four": np.arange(512) // 128 == 2,
}


@pytest.mark.parametrize("kind", PROBABILITIES)
def test_draws_follow_the_softmax_of_what_is_left(kind):
    probabilities, number = np.asarray(PROBABILITIES[kind], np.float64), 40_000
    probabilities /= probabilities.sum()
    logits = jnp.where(jnp.asarray(probabilities) > 0, jnp.log(jnp.asarray(probabilities, jnp.float32)), -jnp.inf)
    tokens, confidence = draw(jnp.broadcast_to(logits, (2, number // 2, logits.size)), sample_keys(2))
    assert (tokens.dtype, tokens.shape) == (jnp.int32, (2, number // 2))
    expected, counts = number * probabilities, np.bincount(np.ravel(tokens), minlength=logits.size)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    freedom = possible.sum() - 1
    chi_square = (np.square(counts - expected)[possible] / expected[possible]).sum()
    assert abs(chi_square - freedom) <= 4 * np.sqrt(2 * freedom)
    np.testing.assert_allclose(confidence, probabilities[np.asarray(tokens)], rtol=1e-5)


def test_a_samples_draws_depend_on_its_own_key_alone():
    logits = jax.random.normal(jax.random.key(1), (5, 9, 16))
    keys = sample_keys(5)
    all_five, alone, otherwise = (
        np.asarray(draw(*given)[0]) for given in [(logits, keys), (logits[2:3], keys[2:3]), (logits[:1], keys[1:2])]
    )
    np.testing.assert_array_equal(all_five[2:3], alone)
    assert (all_five[0] != otherwise[0]).any()


def test_argmax_takes_the_likeliest_with_its_probability():
    tokens, confidence = filters.argmax(jnp.log(jnp.asarray([[[0.2, 0.7, 0.1], [0.4, 0.2, 0.4]]])))
    np.testing.assert_array_equal(tokens, [[1, 0]])
    np.testing.assert_allclose(confidence, [[0.7, 0.4]], rtol=1e-6)


# --- the order of commitment


@pytest.mark.parametrize(
    ("confidence", "candidates", "number", "chosen"),
    [
        ([0.9, 0.1, 0.5, 0.3], [1, 1, 1, 1], 2, [1, 3]),
        ([0.5, 0.2, 0.5, 0.5], [1, 1, 1, 1], 2, [0, 1]),  # ties: lowest index first
        ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], 3, [0, 1, 2]),
        ([0.5, 0.1, 0.5, 0.2], [1, 0, 1, 0], 1, [0]),  # only candidates count
        ([0.5, 0.1, 0.5, 0.2], [1, 0, 1, 0], 2, [0, 2]),
        ([0.5, 0.1, 0.5, 0.2], [1, 1, 1, 1], 0, []),
        ([0.1, np.inf, 0.5, np.inf], [0, 1, 0, 1], 1, [1]),  # a confidence out of range stays a candidate's
        ([np.nan, 0.1, np.nan, 0.2], [1, 0, 1, 1], 2, [0, 3]),
    ],
)
def test_the_least_confident_candidates_are_chosen(confidence, candidates, number, chosen):
    rows = filters.least_confident(jnp.asarray([confidence]), jnp.asarray([candidates], bool), number)
    assert np.flatnonzero(rows[0]).tolist() == chosen


@hypothesis.given(
    confidence=st.lists(st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, 1.0, np.nan]), min_size=1, max_size=40),
    data=st.data(),
)
def test_ranking_by_comparing_as_gpus_do_equals_ranking_by_sorting(confidence, data):
    size = len(confidence)
    values, candidates = np.zeros((1, 40), np.float32), np.zeros((1, 40), bool)  # one shape, one compilation
    values[0, :size] = confidence
    candidates[0, :size] = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    compared, sorted_ = (np.asarray(rank(values, candidates)) for rank in (by_comparing, by_sorting))
    np.testing.assert_array_equal(compared[candidates], sorted_[candidates])


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_least_confident_equals_a_stable_sort_of_the_candidates(seed, number):
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, 4, (3, 12)) / 4
    candidates = np.zeros((3, 12), bool)
    for row in candidates:
        row[rng.choice(12, size=rng.integers(number, 13), replace=False)] = True
    chosen = filters.least_confident(jnp.asarray(confidence, jnp.float32), jnp.asarray(candidates), number)
    for row, (values, allowed) in enumerate(zip(confidence, candidates, strict=True)):
        order = sorted(np.flatnonzero(allowed), key=lambda i: (values[i], i))
        assert np.flatnonzero(chosen[row]).tolist() == sorted(order[:number])
