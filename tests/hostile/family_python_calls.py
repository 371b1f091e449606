"""Python calls with arguments of every type: a result, or an InputError that says what was given."""

import decimal
import fractions
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY, random_tokens

from hmar_jax import from_pretrained
from hmar_jax.bulk import traces
from hmar_jax.config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TrainConfig,
    TransformerConfig,
)
from hmar_jax.errors import HmarError, InputError
from hmar_jax.formats.convert import convert
from hmar_jax.labels import parse_label, parse_labels
from hmar_jax.model import Model, Sample
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder

LADDER, TRANSFORMER, CONFIG = TINY.ladder, TINY.transformer, TINY
COUNTS = [[1], [1, 3], [2, 3, 4]]
TOKENS = random_tokens(TINY, 1)
IMAGE = np.zeros((TINY.image_size, TINY.image_size, 3), np.uint8)
BOX = [0, 0, 1, 1]


def holding_itself():
    made = []
    made.append(made)
    return made


def function(*_):
    return 0


class WithoutRepr:
    def __repr__(self):
        raise RuntimeError


ODD = [
    np.zeros((1, 6, 6, 3), ">f4"), np.zeros((1, 14), ">i4"), np.full(2, np.nan, ">f8"), {1, 2}, {0},
    None, True, False, np.True_, 0, 1, -1, 2**31, 2**63, 10**9, 10**400, -(10**400), 0.0, 0.5, -0.5, 1e39, 1e308,
    float("nan"), float("inf"), -float("inf"), 1j, fractions.Fraction(1, 3), decimal.Decimal("1e400"), "", "x",
    "a\0.json", "\x1b[2J\n", "\udcff", "A" * 5000, "0", "1-2", "small.json", "gs://a/b", b"", b"x", b"\xff\0",
    bytearray(b"x"), [], [[]], {}, set(), (), [1, [2, 3]], [[1], [2, 3]], [None], ["x"], [10**400], [10**400, 0.5],
    [float("nan")], {"a": 1}, {1: {}}, holding_itself(), [[[[0]]]], range(3), object(), function, int,
    np.float16(1.5), np.float16("nan"), np.int8(1), np.uint64(2**63), np.array(3), np.array(1.5),
    np.array([1, None], object), np.array("x"), np.array(["x"]), np.zeros((0,)), np.zeros((2, 0, 3)),
    np.zeros((1, 2, 3), complex), np.zeros(2, "i4,f4"), np.zeros(2, "V4"), np.zeros(2, np.longdouble),
    np.zeros(2, "M8[s]"), np.zeros((1, 6, 6, 3), np.longdouble), np.full((1, 6, 6, 3), np.nan),
    np.zeros((1, 6, 6, 3), ml_dtypes.float8_e4m3fn), np.zeros(1, ml_dtypes.int4), np.zeros((1, 14), np.uint64),
    np.zeros((1, 14), bool), np.full((1, 14), 2**40), jnp.zeros((2, 2)), np.zeros((1, 1, 0), int), jnp.int32(1),
    jnp.zeros((1,), jnp.bfloat16), jax.random.key(0), jnp.zeros((1, 14), jnp.uint8), Path("x"), Path("a/../.."),
    ScaleLadder, LADDER, CONFIG, TRANSFORMER,
]  # fmt: skip

# What a call may be given besides: whatever these hold, in lists, tuples and dicts.
leaves = st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8) | st.complex_numbers()
values = st.recursive(
    st.sampled_from(ODD) | leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)


def fields_of(*configs):
    """CONFIG.FIELD → a call that makes that config with another value there; for each of its fields."""
    needed = {
        TransformerConfig: {"depth": 2, "width": 8, "heads": 2, "branch_depth": 1},
        ModelConfig: {"ladder": LADDER, "tokenizer": TINY.tokenizer},
        TrainConfig: {"stage": "tokenizer"},
    }
    return {
        f"{config.__name__}.{name}": lambda _, value, config=config, name=name: config(
            **(needed.get(config, {}) | {name: value})
        )
        for config in configs
        for name in config.__dataclass_fields__
    }


SCHEDULES = {
    "from_counts": lambda _, value: Schedule.from_counts(value),
    "from_counts of one scale": lambda _, value: Schedule.from_counts([[1], value]),
    "from_json": lambda _, value: Schedule.from_json(value),
    "preset": lambda _, value: Schedule.preset(value, LADDER),
    "preset for a ladder": lambda _, value: Schedule.preset("small", value),
    "preset for a depth": lambda _, value: Schedule.preset("small", LADDER, value),
    "generate for a ladder": lambda _, value: Schedule.generate(value),
    "generate by a curve": lambda _, value: Schedule.generate(LADDER, value, 2),
    "generate steps": lambda _, value: Schedule.generate(LADDER, "equal", value),
    "generate steps of single": lambda _, value: Schedule.generate(LADDER, "single", value),
    "generate scales": lambda _, value: Schedule.generate(LADDER, "equal", 2, value),
    "generate exponent": lambda _, value: Schedule.generate(LADDER, "power", 2, exponent=value),
    "parse": lambda _, value: Schedule.parse(value, LADDER),
    "parse for a ladder": lambda _, value: Schedule.parse("cosine:2", value),
    "resolve": lambda _, value: Schedule.resolve(value, LADDER, TRANSFORMER),
    "resolve for a ladder": lambda _, value: Schedule.resolve(None, value, TRANSFORMER),
    "resolve for a transformer": lambda _, value: Schedule.resolve(None, LADDER, value),
} | {
    f"{what} {name}": lambda _, value, make=make, name=name: make(**{name: value})
    for what, make in (
        ("from_counts", lambda **scalars: Schedule.from_counts(COUNTS, **scalars)),
        ("replace", lambda **scalars: Schedule.from_counts(COUNTS).replace(**scalars)),
        (
            "Schedule",
            lambda **field: Schedule(**(vars(Schedule.from_counts(COUNTS)) | field)),
        ),
    )
    for name in ("cfg", "temperature", "top_k", "top_p", "noise", "refine_cfg", "order")
    if (what, name) != ("Schedule", "refine_cfg")
}
CONFIGS = {
    "ScaleLadder": lambda _, value: ScaleLadder(value),
    "ScaleLadder of a side": lambda _, value: ScaleLadder((1, value)),
    "ScaleLadder.preset": lambda _, value: ScaleLadder.preset(value),
    "key_ranges": lambda _, value: LADDER.key_ranges(value),
    "TransformerConfig.preset": lambda _, value: TransformerConfig.preset(value),
    **fields_of(
        TokenizerConfig, TransformerConfig, ModelConfig, DataConfig, OptimizerConfig, TokenizerLossConfig,
        ObjectiveConfig, MeshConfig, EvalConfig, TrainConfig,
    ),
}  # fmt: skip
MODELS = {
    "Model of a config": lambda model, value: Model(value, model.params),
    "Model of parameters": lambda model, value: Model(CONFIG, value),
    "Model of a dtype": lambda model, value: Model(CONFIG, model.params, value),
    "schedule": lambda model, value: model.schedule(value),
    "encode": lambda model, value: model.tokenizer.encode(value),
    "decode": lambda model, value: model.tokenizer.decode(value),
    "growth": lambda model, value: model.tokenizer.growth(value),
    "decode_until": lambda model, value: model.tokenizer.decode_until(value, [0]),
    "decode_until of scales": lambda model, value: model.tokenizer.decode_until(TOKENS[None], value),
    "next_scale_logits of labels": lambda model, value: model.next_scale_logits(value, TOKENS),
    "next_scale_logits of tokens": lambda model, value: model.next_scale_logits([0], value),
    "masked_logits": lambda model, value: model.masked_logits([0], TOKENS, value),
    "frames of a model": lambda model, value: traces.frames(value, Sample(IMAGE, TOKENS, [])),
    "frames": lambda model, value: traces.frames(model, value),
    "frames without draws": lambda model, value: traces.frames(model, Sample(IMAGE, TOKENS), value),
    "frames of a picture": lambda model, value: traces.frames(model, Sample(IMAGE, TOKENS, []), value),
}
# The arguments before the odd one are right, and another one is wrong, so that nothing is drawn whatever it is.
DRAWN = {
    "sample of labels": lambda model, value: model.sample(value, seed=-1),
    "sample by a schedule": lambda model, value: model.sample([0], value, seed=-1),
    "stream of labels": lambda model, value: model.stream(value, seed=-1),
    "sample in batches": lambda model, value: model.sample([0], batch_size=value, seed=-1),
    "edit of pictures": lambda model, value: model.edit(value, BOX, seed=-1),
    "edit of a mask": lambda model, value: model.edit(IMAGE, value, seed=-1),
    "edit of labels": lambda model, value: model.edit(IMAGE, BOX, value, seed=-1),
} | {
    f"{what} {name}": lambda model, value, what=what, wrong=wrong, name=name: getattr(model, what)(
        *([[0]] if what == "sample" else [IMAGE, BOX]), **{wrong: "wrong", name: value}
    )
    for what, wrong, names in (
        ("sample", "numbers", ("seed", "greedy", "record", "decode", "cfg", "top_k", "order")),
        ("sample", "seed", ("numbers", "per_label")),
        ("edit", "numbers", ("variants", "composite", "feather", "seed", "greedy", "refine_cfg")),
    )
    for name in names
}
LABELS = {
    "parse_labels": lambda _, value: parse_labels(value, ["a", "b"], 2),
    "parse_label": lambda _, value: parse_label(value, ["a", "b"], 2),
}
FILES = {
    "from_pretrained": lambda _, value: from_pretrained(value),
    "from_pretrained as a dtype": lambda _, value: from_pretrained("nowhere", value),
    "from_pretrained of a revision": lambda _, value: from_pretrained("./nowhere", revision=value),
    "save of a source": lambda model, value: model.save("/dev/null/out", source=value),
    "save of licences": lambda model, value: model.save("/dev/null/out", licences=value),
    "convert a kind": lambda _, value: convert(value, "in.safetensors", LADDER, "out"),
    "convert a file": lambda _, value: convert("vae", value, LADDER, "out"),
    "convert for sides": lambda _, value: convert("vae", "in.safetensors", value, "out"),
    "convert to a path": lambda _, value: convert("vae", "in.safetensors", LADDER, value),
    "convert with a tokenizer": lambda _, value: convert("var", "in.safetensors", LADDER, "out", tokenizer=value),
    "convert as a dtype": lambda _, value: convert("vae", "in.safetensors", LADDER, "out", dtype=value),
}
CALLS = SCHEDULES | CONFIGS | MODELS | DRAWN | LABELS | FILES


def check(name, model, value):
    try:
        made = CALLS[name](model, value)
    except HmarError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 500, str(error)
        return
    assert name not in DRAWN, made
    if isinstance(made, Schedule):
        assert Schedule.from_json(made.to_json()) == made
    if name in ("decode", "next_scale_logits of tokens"):
        assert np.shape(value)[1:] == (LADDER.length,)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CALLS)
def test_odd_values_are_refused_in_one_sentence_or_right(name, model):
    for value in [*ODD, WithoutRepr()]:  # hypothesis would show the latter
        check(name, model, value)


@hypothesis.settings(
    max_examples=20 * hypothesis.settings().max_examples,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@given(name=st.sampled_from(sorted(CALLS)), value=values)
def test_values_put_together_are_refused_in_one_sentence_or_right(name, model, value):
    check(name, model, value)


@pytest.mark.parametrize("value", [np.int8(3), np.uint64(3), np.array(3), jnp.int32(3)])
def test_whole_numbers_of_other_libraries_are_whole_numbers(value):
    assert Schedule.generate(LADDER, "equal", value) == Schedule.generate(LADDER, "equal", 3)
    assert Schedule.from_counts(COUNTS, top_k=[[3], [3, 3], [3, 3, value]]) == Schedule.from_counts(COUNTS, top_k=3)
    assert ScaleLadder((1, value)) == ScaleLadder((1, 3))


def test_arrays_in_the_byte_order_of_other_machines_are_what_they_hold(model):
    images = np.random.default_rng(0).uniform(-1, 1, (1, *IMAGE.shape)).astype(np.float32)
    tokens = model.tokenizer.encode(images)
    np.testing.assert_array_equal(model.tokenizer.encode(images.astype(">f4")), tokens)
    np.testing.assert_array_equal(
        model.tokenizer.decode(np.asarray(tokens).astype(">i4")), model.tokenizer.decode(tokens)
    )


def test_numbers_of_other_types_are_numbers():
    half = fractions.Fraction(1, 2)
    for number in (np.float16(0.5), np.float64(0.5), half):
        assert Schedule.from_counts(COUNTS, top_p=number) == Schedule.from_counts(COUNTS, top_p=0.5)
    with pytest.raises(InputError, match="top_p is True; expected a number"):
        Schedule.from_counts(COUNTS, top_p=True)
