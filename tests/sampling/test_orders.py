"""Order policies: every position once, Halton's spread evenly, random ones uniform; what they name is committed."""

import functools
import itertools
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY

from hmar_jax.sampling import filters, orders, program
from hmar_jax.sampling.commitment import commitment
from hmar_jax.sampling.sampler import Kept, pass_keys, sample_tokens
from hmar_jax.sampling.schedule import Schedule

COUNTS = [[1], [1, 3], [2, 3, 4]]
LABELS = np.arange(6) % 5


def keys_of(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


KEYS = keys_of(6)


def steps_of(draws, scale):
    """The step, from 0, that commits each token of a scale: (B,N), -1 where it was kept."""
    return np.sum([draw.masked for at, draw in draws if at == scale], axis=0) - 1


# --- Halton


@pytest.mark.parametrize("side", range(1, 65))
def test_halton_has_each_position_once(side):
    assert sorted(orders.halton(side).tolist()) == list(range(side * side))


def radical_inverse(index, base):
    value, unit = Fraction(0), Fraction(1)
    while index:
        unit /= base
        index, digit = divmod(index, base)
        value += digit * unit
    return value


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 6, 9, 13, 16, 27])
def test_halton_is_the_sequence_of_bases_2_and_3_without_what_comes_again(side):
    seen = {}
    for index in itertools.count(1):
        y, x = (int(side * radical_inverse(index, base)) for base in (2, 3))
        seen.setdefault(y * side + x, len(seen))
        if len(seen) == side * side:
            break
    np.testing.assert_array_equal(orders.halton(side), [seen[position] for position in range(side * side)])


def discrepancy(positions, side):
    """The most that the share of positions in a box from the corner differs from its area (star discrepancy)."""
    there = np.zeros(side * side)
    there[positions] = 1
    inside = there.reshape(side, side).cumsum(0).cumsum(1) / len(positions)
    edges = np.arange(1, side + 1) / side
    return np.abs(inside - np.outer(edges, edges)).max()


@pytest.mark.parametrize("side", [16, 24, 32, 64])
@pytest.mark.parametrize("part", [2, 4, 8, 16])
def test_halton_spreads_more_evenly_than_any_of_many_random_orders(side, part):
    first = side * side // part
    rng = np.random.default_rng(0)
    others = [discrepancy(rng.permutation(side * side)[:first], side) for _ in range(30)]
    assert discrepancy(np.argsort(orders.halton(side))[:first], side) < min(others)


# --- random


def test_every_random_order_is_as_likely():
    number = 4800
    found = np.argsort(np.asarray(orders.random(keys_of(number), 4)))
    counts = np.unique(found, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    chi_squared = np.sum((counts - number / 24) ** 2) / (number / 24)
    assert chi_squared < 49.7  # of 23 degrees of freedom: one in a thousand


def test_every_position_is_as_likely_at_every_place_of_a_random_order():
    number = 3000
    places = np.argsort(np.argsort(np.asarray(orders.random(keys_of(number, 1), 25))))
    shares = np.stack([(places == place).mean(0) for place in range(25)])
    assert np.abs(shares - 1 / 25).max() < 5 * np.sqrt(1 / 25 * 24 / 25 / number)


# --- confidence


def test_confidence_without_noise_is_left_as_it_is():
    confidence = jax.random.uniform(jax.random.key(0), (3, 9))
    np.testing.assert_array_equal(orders.confident(confidence, jnp.float32(0), keys_of(3)), confidence)
    noisy = orders.confident(confidence, jnp.float32(1), keys_of(3))
    assert (np.argsort(noisy) != np.argsort(confidence)).any()


# --- commitment


@st.composite
def commitments(draw):
    """A side up to 64, counts of steps, the share of positions that are candidates, and a seed."""
    side = draw(st.sampled_from([1, 2, 3, 7, 16, 64]))  # each compiles anew
    length = side * side
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=4)) if length > 1 else set()
    counts = np.diff([0, *sorted(cuts), length]).tolist()
    return side, counts, draw(st.sampled_from([1.0, 0.5, 0.05])), draw(st.integers(0, 99))


@hypothesis.settings(max_examples=20)
@hypothesis.given(commitments(), st.sampled_from(["random", "halton"]))
def test_each_candidate_is_committed_once_in_the_order_named(drawn, policy):
    """Whatever the counts and the candidates, steps commit the next of the order that are candidates."""
    side, counts, share, seed = drawn
    length = side * side
    candidates = np.random.default_rng(seed).random((2, length)) < share
    order = -orders.halton(side) if policy == "halton" else orders.random(keys_of(2, seed), length)
    order = jnp.broadcast_to(order, (2, length))
    masked, to_draw, committed = jnp.asarray(candidates), candidates.sum(1), []
    for step in range(len(counts)):
        remaining = -(-sum(counts[step + 1 :]) * to_draw // length)
        after = filters.least_confident(order, masked, remaining)
        committed.append(np.asarray(masked & ~after))
        masked = after
    assert not masked.any()
    np.testing.assert_array_equal(np.sum(committed, axis=0), candidates)
    for row in range(2):
        expected = [i for i in np.argsort(-np.asarray(order[row]), stable=True) if candidates[row, i]]
        for now in committed:
            number = now[row].sum()
            assert set(np.flatnonzero(now[row])) == set(expected[:number])
            expected = expected[number:]


@pytest.fixture(scope="module")
def sample(quantizer):
    """Samples six pictures from a stand-in for the model, random projections: tokens and draws."""
    keys = jax.random.split(jax.random.key(5), 3)
    place, pooled, current = (jax.random.normal(k, (n, 16)) for k, n in zip(keys, (9, 4, 4), strict=True))

    def predict(_, inputs, cfg):
        logits = inputs.pooled @ pooled + place[: inputs.pooled.shape[1]]
        if inputs.masked is not None:
            logits = logits + jnp.where(inputs.masked[..., None], inputs.current @ current, 0)
        return logits if cfg is None else logits * (1 + cfg)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def compiled(plan, greedy, controls, keys, kept):
        return sample_tokens(predict, quantizer, plan, controls, keys, greedy=greedy, kept=kept)

    def run(policy, keys=KEYS, greedy=False, kept=None, **scalars):
        schedule = Schedule.from_counts(COUNTS, order=policy, **scalars)
        tokens, _, draws = compiled(schedule.plan, greedy, schedule.controls, keys, kept)
        passes = [at for scale in range(len(COUNTS)) for at in schedule.plan.passes(scale)]
        return np.asarray(tokens), [(at.scale, draw) for at, draw in zip(passes, draws, strict=True)]

    return run


def order_of(policy, scale, keys=KEYS):
    """What a policy orders a scale by, for each of the keys: (B,N), the greatest first."""
    length = sum(COUNTS[scale])
    if policy == "halton":
        return np.tile(-orders.halton(math.isqrt(length)), (len(keys), 1))
    return np.asarray(orders.random(pass_keys(keys, scale, 0)[1], length))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("policy", ["random", "halton"])
def test_samples_commit_what_the_order_names_whatever_their_confidence(sample, policy, greedy):
    _, draws = sample(policy, greedy=greedy)
    for scale, counts in enumerate(COUNTS):
        ranks = np.argsort(np.argsort(-order_of(policy, scale)))
        np.testing.assert_array_equal(steps_of(draws, scale), np.repeat(np.arange(len(counts)), counts)[ranks])


@pytest.mark.parametrize("policy", orders.ORDERS)
def test_confidence_decides_the_order_only_where_it_is_the_policy(sample, policy):
    one, other = (steps_of(sample(policy, temperature=t, noise=n)[1], 2) for t, n in ((1.0, 0.0), (3.0, 9.0)))
    assert (one == other).all() == (policy != "confidence")


def test_a_random_order_is_a_samples_own(sample):
    tokens, draws = sample("random")
    places = steps_of(draws, 2)
    assert len(np.unique(places, axis=0)) == len(KEYS)
    again, draws = sample("random", KEYS[::-1])
    np.testing.assert_array_equal(steps_of(draws, 2), places[::-1])
    np.testing.assert_array_equal(again, tokens[::-1])


@hypothesis.settings(max_examples=8)
@hypothesis.given(st.integers(0, 99), st.sampled_from([0.1, 0.4, 0.8]), st.sampled_from(["random", "halton"]))
def test_edits_commit_what_is_to_draw_in_the_order_named(sample, seed, share, policy):
    rng = np.random.default_rng(seed)
    keep = rng.random((len(KEYS), 14)) < share
    keep[0], keep[1] = True, False
    given = rng.integers(0, 16, keep.shape, np.int32)
    tokens, draws = sample(policy, kept=Kept(jnp.asarray(given), jnp.asarray(keep)))
    np.testing.assert_array_equal(tokens[keep], given[keep])
    for scale, counts in enumerate(COUNTS):
        steps, order = steps_of(draws, scale), order_of(policy, scale)
        here = keep[:, TINY.ladder.slices[scale]]
        np.testing.assert_array_equal(steps == -1, here)
        for row in range(len(KEYS)):
            to_draw = np.flatnonzero(~here[row])
            in_order = steps[row, to_draw[np.argsort(-order[row, to_draw])]]
            assert (np.diff(in_order) >= 0).all()
            for step in range(len(counts)):  # each leaves its share of what is to draw, rounded up
                left = -(-sum(counts[step + 1 :]) * len(to_draw) // sum(counts))
                assert (in_order > step).sum() == left


# --- controls


def test_order_and_guided_refinement_change_the_picture_and_an_order_compiles_once(model):
    schedule = Schedule.from_counts([[1], [4], [4, 5]], cfg=1.0, top_k=0, top_p=1.0)
    compiled = program.sample._cache_size()
    samples = {
        (policy, refine): model.sample(LABELS, schedule, order=policy, refine_cfg=refine, record=True)
        for policy in orders.ORDERS
        for refine in (1.0, 6.0)
    }
    assert program.sample._cache_size() <= compiled + len(orders.ORDERS)
    for one, other in itertools.combinations(samples, 2):
        tokens = samples[one].tokens, samples[other].tokens
        assert (tokens[0] != tokens[1]).any(), (one, other)
        np.testing.assert_array_equal(tokens[0][:, :5], tokens[1][:, :5])  # those scales have no masked step
    for policy in ("random", "halton"):
        shown, _ = commitment(schedule.replace(order=policy))  # of sample 0 of seed 0
        steps = np.sum([draw.masked[0] for draw in samples[policy, 1.0].draws[2:]], axis=0) - 1
        np.testing.assert_array_equal(shown[2][1].ravel(), steps)


def test_guidance_is_refined_only_where_there_is_a_label(model, monkeypatch):
    guided = []

    def capture(request):
        guided.append(request.plan.guided)
        raise InterruptedError

    monkeypatch.setattr(program, "sample", capture)
    images = np.zeros((1, TINY.image_size, TINY.image_size, 3), np.float32)
    for labels in (None, [2]):
        with pytest.raises(InterruptedError):
            model.edit(images, (0, 0, 4, 4), labels, Schedule.from_counts(COUNTS, refine_cfg=1.0), cfg=2.0)
    assert guided == [
        ((False,), (False,) * 2, (False,) * 3),
        ((False,), (True,) * 2, (True,) * 3),
    ]
