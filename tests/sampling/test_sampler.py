"""The loop over scales and steps: every token committed once, nothing but a sample's own key decides it.

Most tests sample from a stand-in for the model, a few random projections; the last ones from a tiny model.
"""

import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY

import hmar_jax
from hmar_jax.sampling import program
from hmar_jax.sampling.sampler import sample_tokens
from hmar_jax.sampling.schedule import Schedule

LADDER = TINY.ladder
COUNTS = [[1], [1, 3], [1, 3, 5]]
BASE = {"cfg": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "noise": 0.0}


def make_keys(batch, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(batch))


class StandIn:
    """Logits as random projections of all that a pass may know; remembers what it was asked, outside of `jit`."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(5), 5)
        self.place = 0.5 * jax.random.normal(keys[0], (9, 16))
        self.pooled, self.current = (jax.random.normal(key, (4, 16)) for key in keys[1:3])
        self.masked, self.guidance = (jax.random.normal(key, (16,)) for key in keys[3:])
        self.asked, self.logits = [], []

    def __call__(self, scale, inputs, cfg):
        logits = inputs.pooled @ self.pooled + self.place[: inputs.pooled.shape[1]]
        if inputs.masked is not None:
            around = inputs.current.mean(1, keepdims=True) @ self.current
            logits = logits + around + jnp.where(inputs.masked[..., None], self.masked, 0)
        if cfg is not None:
            logits = logits + cfg * self.guidance
        self.asked.append((scale, inputs, cfg))
        self.logits.append(logits)
        return logits


def run(quantizer, counts=COUNTS, batch=3, seed=0, *, greedy=False, leak_free=False, **scalars):
    schedule = Schedule.from_counts(counts, **BASE | scalars)
    predict = StandIn()
    tokens, latents, draws = sample_tokens(
        predict,
        quantizer,
        schedule.plan,
        schedule.controls,
        make_keys(batch, seed),
        greedy=greedy,
        leak_free=leak_free,
    )
    return predict, np.asarray(tokens), latents, [(np.asarray(t), np.asarray(m)) for t, m, _ in draws]


def check_commitment(counts, tokens, draws):
    """Replays the draws: at each step exactly its count is committed, once and for all."""
    draws = iter(draws)
    finished = []
    for steps in counts:
        number = sum(steps)
        committed = np.zeros((len(tokens), number), int)
        final = np.full((len(tokens), number), -1)
        here = [next(draws) for _ in steps]
        still_open = [masked for _, masked in here] + [np.zeros((len(tokens), number), bool)]
        assert still_open[0].all()
        for (drawn, _), before, after, count in zip(here, still_open[:-1], still_open[1:], steps, strict=True):
            assert not (after & ~before).any()  # a committed token is never opened again
            now = before & ~after
            assert (now.sum(1) == count).all()
            committed += now
            final[now] = drawn[now]
        assert (committed == 1).all()
        finished.append(final)
    np.testing.assert_array_equal(np.concatenate(finished, 1), tokens)
    assert next(draws, None) is None


def steps_of(total):
    """Random ways to write a count as a sum."""
    return st.sets(st.integers(1, total - 1), max_size=4).map(lambda cuts: np.diff([0, *sorted(cuts), total]).tolist())


@hypothesis.settings(max_examples=6)
@hypothesis.given(
    steps_of(4), steps_of(9), st.integers(0, 99), st.sampled_from([0.0, 1.5, 1e4]), st.booleans(), st.booleans()
)
def test_each_token_is_committed_once_and_stays(quantizer, four, nine, seed, noise, greedy, leak_free):
    counts = [[1], four, nine]
    _, tokens, latents, draws = run(
        quantizer, counts, seed=seed, noise=noise, greedy=greedy, leak_free=leak_free, top_k=9, top_p=0.9
    )
    check_commitment(counts, tokens, draws)
    np.testing.assert_allclose(latents, quantizer.reconstruct(jnp.asarray(tokens))[-1], atol=1e-5)


def test_the_most_confident_are_committed_first(quantizer):
    predict, _, _, draws = run(quantizer, greedy=True)
    compared = 0
    for i, (scale, _, _) in enumerate(predict.asked):
        following = draws[i + 1][1] if i + 1 < len(draws) and predict.asked[i + 1][0] == scale else None
        if following is not None:
            confidence = np.asarray(jax.nn.softmax(predict.logits[i], axis=-1)).max(-1)
            now = draws[i][1] & ~following
            for row in range(3):
                assert confidence[row][now[row]].min() >= confidence[row][following[row]].max()
                compared += 1
    assert compared == 9  # three passes that leave tokens open, three samples


def test_much_noise_makes_the_order_of_commitment_uniform(quantizer):
    """Over many samples every place is as likely to be committed first; without noise some are far likelier."""
    number, schedule = 900, Schedule.from_counts([[1], [4], [1, 8]], **BASE)

    @jax.jit
    def committed_first(noise):
        controls = schedule.controls._replace(noise=jnp.full(4, noise))
        *_, draws = sample_tokens(StandIn(), quantizer, schedule.plan, controls, make_keys(number))
        return ~draws[-1].masked

    worst = {noise: np.abs(np.mean(committed_first(noise), 0) - 1 / 9).max() for noise in (0.0, 1e4)}
    standard_error = np.sqrt(1 / 9 * 8 / 9 / number)
    assert worst[1e4] < 4 * standard_error
    assert worst[0.0] > 8 * standard_error


@pytest.mark.parametrize("leak_free", [False, True])
def test_passes_know_the_coarser_scales_and_the_current_draw(quantizer, leak_free):
    predict, tokens, _, draws = run(quantizer, leak_free=leak_free)
    sums = np.concatenate([np.zeros((1, 3, 3, 3, 4)), quantizer.reconstruct(jnp.asarray(tokens))])
    state = None
    for (scale, inputs, _), (drawn, masked) in zip(predict.asked, draws, strict=True):
        pooled = quantizer.pool(jnp.asarray(sums[scale], jnp.float32), scale)
        np.testing.assert_allclose(inputs.pooled, pooled, atol=1e-5)
        if masked.all():
            assert inputs.current is None
            assert inputs.masked is None
            state = drawn
        else:
            np.testing.assert_array_equal(inputs.masked, masked)
            keep = jnp.asarray(~masked) if leak_free else None
            own = quantizer.pool(quantizer.lift(jnp.asarray(state), scale, keep), scale)
            np.testing.assert_allclose(inputs.current, own, atol=1e-5)
            state = np.where(masked, drawn, state)


def test_leak_free_changes_what_masked_passes_draw(quantizer):
    leaky, free = (run(quantizer, leak_free=leak_free)[1] for leak_free in (False, True))
    assert (leaky != free).any()


def test_passes_without_guidance_are_asked_without(quantizer):
    cfg = [[0.0], [0.5, 0.0], [0.0, 2.0, 0.0]]
    predict, *_ = run(quantizer, cfg=cfg)
    assert [None if value is None else float(value) for *_, value in predict.asked] == [None, 0.5, None, None, 2, None]
    predict, *_ = run(quantizer, cfg=0)
    assert [value for *_, value in predict.asked] == [None] * 6


def test_greedy_ignores_filters_noise_and_seed(quantizer):
    _, plain, _, _ = run(quantizer, greedy=True)
    _, other, _, _ = run(quantizer, greedy=True, seed=9, temperature=3.0, top_k=2, top_p=0.3, noise=4.0)
    np.testing.assert_array_equal(plain, other)
    _, guided, _, _ = run(quantizer, greedy=True, cfg=5.0)
    assert (plain != guided).any()


@pytest.mark.parametrize(("name", "value"), [("temperature", 1e-5), ("top_k", 1), ("top_p", 1e-6)])
def test_each_filter_at_its_narrowest_is_argmax(quantizer, name, value):
    counts = [[1], [4], [9]]
    _, greedy, _, _ = run(quantizer, counts, greedy=True)
    _, narrow, _, _ = run(quantizer, counts, **{name: value})
    np.testing.assert_array_equal(narrow, greedy)


# --- through the model


LABELS = np.arange(16) % 5
MASKED_STEPS = Schedule.from_counts([[1], [4], [2, 7]], noise=1.0)


def test_same_seed_same_picture_for_any_batch_size(model):
    sixteen = model.sample(LABELS, MASKED_STEPS, seed=11)
    for batch in (1, 3):
        part = model.sample(LABELS[:batch], MASKED_STEPS, seed=11)
        np.testing.assert_array_equal(part.tokens, sixteen.tokens[:batch])
        np.testing.assert_allclose(part.images, sixteen.images[:batch], atol=1e-5)
    again = model.sample(LABELS, MASKED_STEPS, seed=11)
    np.testing.assert_array_equal(again.tokens, sixteen.tokens)
    np.testing.assert_array_equal(again.images, sixteen.images)
    other = model.sample(LABELS, MASKED_STEPS, seed=12)
    assert ((other.tokens != sixteen.tokens).any(1)).all()


def test_a_sample_is_a_function_of_seed_number_and_label(model):
    sixteen = model.sample(LABELS, MASKED_STEPS, seed=11)
    chosen = [13, 2, 7]
    some = model.sample(LABELS[chosen], MASKED_STEPS, seed=11, numbers=chosen)
    np.testing.assert_array_equal(some.tokens, sixteen.tokens[chosen])
    for wrong in ([1, 2], [[1, 2, 3]], [1, 2, -1], [1, 2, 2**32], [1.0, 2.0, 3.0]):
        with pytest.raises(hmar_jax.InputError, match=r"numbers are .* expected 3 integers"):
            model.sample(LABELS[chosen], MASKED_STEPS, numbers=wrong)


_ON_EIGHT_DEVICES = """
import sys
import jax, numpy as np
import hmar_jax
assert jax.device_count() == 8
model = hmar_jax.from_pretrained(sys.argv[1])
schedule = hmar_jax.Schedule.from_counts([[1], [4], [2, 7]], noise=1.0)
for batch in (11, 16):
    out = model.sample(np.arange(batch) % 5, schedule, seed=11)
    np.savez(f"{sys.argv[2]}/{batch}.npz", tokens=out.tokens, images=out.images)
"""


def test_same_seed_same_picture_for_any_number_of_devices(model, tmp_path):
    model.save(tmp_path / "model", source="a test")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-W", "error", "-c", _ON_EIGHT_DEVICES, tmp_path / "model", tmp_path]
    finished = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    alone = model.sample(LABELS, MASKED_STEPS, seed=11)
    for batch in (11, 16):
        with np.load(tmp_path / f"{batch}.npz") as spread:
            assert spread["tokens"].shape == (batch, LADDER.length)
            np.testing.assert_array_equal(spread["tokens"], alone.tokens[:batch])
            np.testing.assert_allclose(spread["images"], alone.images[:batch], atol=1e-5)


def test_one_step_per_scale_is_next_scale_sampling_bit_for_bit(model, stage1_model):
    labels = [0, 1, 2]
    plain = stage1_model.sample(labels, "next-scale", seed=5)
    stepped = model.sample(labels, Schedule.from_counts([[1], [4], [9]]), seed=5)
    np.testing.assert_array_equal(stepped.tokens, plain.tokens)
    np.testing.assert_array_equal(stepped.images, plain.images)


@pytest.mark.parametrize("kind", ["model", "leak_free_model"])
def test_greedy_draws_are_the_teacher_forced_argmax(request, kind):
    network, labels = request.getfixturevalue(kind), [0, 1, 2]
    out = network.sample(labels, Schedule.from_counts(COUNTS, cfg=0), greedy=True, record=True)
    state = None
    for draw in out.draws:
        where = LADDER.slices[draw.scale]
        if draw.step == 0:
            logits = network.next_scale_logits(labels, out.tokens)[:, where]
            state = draw.tokens
        else:
            tokens, masked = out.tokens.copy(), np.zeros(out.tokens.shape, bool)
            tokens[:, where], masked[:, where] = state, draw.masked
            logits = network.masked_logits(labels, tokens, masked)[:, where]
            state = np.where(draw.masked, draw.tokens, state)
        np.testing.assert_array_equal(np.argmax(logits, -1), draw.tokens)


def test_recorded_draws_tell_the_whole_story(model):
    out = model.sample(LABELS, MASKED_STEPS, record=True)
    assert [(draw.scale, draw.step) for draw in out.draws] == [(0, 0), (1, 0), (2, 0), (2, 1)]
    check_commitment(MASKED_STEPS.counts, out.tokens, [(draw.tokens, draw.masked) for draw in out.draws])
    plain = model.sample(LABELS, MASKED_STEPS)
    assert plain.draws is None
    np.testing.assert_array_equal(plain.tokens, out.tokens)


def test_scalars_change_the_picture_and_compile_nothing(model):
    schedule = Schedule.from_counts(MASKED_STEPS.counts, **BASE)
    base = model.sample(LABELS, schedule)
    compiled = program.sample._cache_size()
    changes = {"cfg": 4.0, "temperature": 0.5, "top_k": 2, "top_p": 0.4, "noise": 20.0, "seed": 1}
    for name, value in changes.items():
        changed = model.sample(LABELS, schedule, **{name: value})
        assert (changed.tokens != base.tokens).any(), name
    cooler = model.sample(LABELS, schedule, temperature=[[1.0], [1.0], [1.0, 0.3]])
    assert (cooler.tokens != base.tokens).any()
    np.testing.assert_array_equal(cooler.tokens[:, :5], base.tokens[:, :5])  # only the last pass was cooler
    assert program.sample._cache_size() == compiled


def test_the_null_half_costs_nothing_where_there_is_no_guidance(model):
    def flops(cfg):
        schedule = Schedule.from_counts([[1], [4], [1, 8]], cfg=cfg)
        request = program.Request.of(TINY, "float32", schedule, model.params, np.zeros(4))
        return program.sample.lower(request).cost_analysis()["flops"]

    none, last, everywhere = (
        flops(cfg) for cfg in ([[0.0], [0.0], [0.0, 0.0]], [[0.0], [0.0], [0.0, 1.0]], [[1.0], [1.0], [1.0, 1.0]])
    )
    tokens = [1, 4, 9, 9]  # that the passes run over; each costs a share of the transformer's work
    assert (last - none) / (everywhere - none) == pytest.approx(9 / sum(tokens), rel=0.15)
