"""The doors of `Model`: shapes, types, ranges, one sentence for every wrong argument; official generations."""

import copy
import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_models import TINY, random_tokens

import hmar_jax
from hmar_jax import InputError, Schedule
from hmar_jax.model import Model
from hmar_jax.sampling import program

LABELS = [0, 4]
TOKENS = random_tokens(TINY, 2)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 3)).astype(np.float32)
MASKED = np.arange(14) % 3 > np.zeros((2, 1))


@pytest.fixture(scope="module")
def tokenizer_alone(model):
    return Model(dataclasses.replace(TINY, transformer=None), {"tokenizer": model.params["tokenizer"]})


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def network(request, model):
    return model if request.param == "float32" else Model(TINY, model.params, request.param)


class TestDoors:
    """In both compute types."""

    def test_encode_gives_int32_tokens_of_the_codebook(self, network):
        tokens = network.tokenizer.encode(IMAGES)
        assert (tokens.shape, tokens.dtype) == ((2, 14), jnp.int32)
        assert 0 <= tokens.min() <= tokens.max() < 16

    def test_decode_gives_float32_pictures_within_one(self, network):
        pictures = network.tokenizer.decode(TOKENS)
        assert (pictures.shape, pictures.dtype) == ((2, 6, 6, 3), jnp.float32)
        assert np.abs(pictures).max() <= 1
        assert np.std(pictures) > 0.05

    def test_logits_are_float32_for_every_token_and_code(self, network):
        for logits in (network.next_scale_logits(LABELS, TOKENS), network.masked_logits(LABELS, TOKENS, MASKED)):
            assert (logits.shape, logits.dtype) == ((2, 14, 16), jnp.float32)
            assert np.isfinite(logits).all()

    def test_sample_gives_pictures_from_zero_to_one_and_their_tokens(self, network):
        out = network.sample(LABELS, "next-scale", seed=3)
        assert (out.images.shape, out.images.dtype) == ((2, 6, 6, 3), np.float32)
        assert 0 <= out.images.min() < out.images.max() <= 1
        assert (out.tokens.shape, out.tokens.dtype) == ((2, 14), np.int32)
        assert out.draws is None
        decoded = (network.tokenizer.decode(out.tokens) + 1) / 2
        tolerance = 1e-5 if network.dtype == "float32" else 5e-2
        np.testing.assert_allclose(out.images, decoded, atol=tolerance)


def test_the_config_tells_what_the_model_is(model):
    assert model.config.ladder.sides == (1, 2, 3)
    assert (model.config.num_classes, model.config.image_size) == (5, 6)
    assert model.config.tokenizer.codebook_size == 16
    assert model.transformer is not None


def test_a_tokenizer_alone_has_no_transformer(tokenizer_alone, model):
    assert tokenizer_alone.transformer is None
    np.testing.assert_array_equal(tokenizer_alone.tokenizer.encode(IMAGES), model.tokenizer.encode(IMAGES))
    for door in (
        lambda: tokenizer_alone.sample(LABELS),
        lambda: tokenizer_alone.next_scale_logits(LABELS, TOKENS),
        lambda: tokenizer_alone.masked_logits(LABELS, TOKENS, MASKED),
    ):
        with pytest.raises(InputError, match="tokenizer alone"):
            door()


def test_the_null_class_has_logits_but_no_samples(model):
    null, other = (model.next_scale_logits([label] * 2, TOKENS) for label in (5, 4))
    assert np.abs(null - other).max() > 1e-2
    with pytest.raises(InputError, match="Label 5 is out of range; this model has classes 0 to 4"):
        model.sample([5])


RAGGED = [[0], [1, 2]]
TWICE = np.stack([TOKENS, TOKENS])
WRONG_TYPES = [
    (
        lambda m: m.sample(RAGGED),
        r"Labels are \[\[0\], \[1, 2\]\]; expected classes by name or number, integers from 0 to 4, one or a list\.",
    ),
    (lambda m: m.sample(np.array([0, None], object)), r"Labels are \[0, None\];"),
    (lambda m: m.sample([True, False]), r"Labels are \[True, False\];"),
    (lambda m: m.sample(None), r"Labels are None;"),
    (lambda m: m.sample(["a", None]), r"Labels are \['a', None\]; expected classes by name or number"),
    (lambda m: m.sample([["a"]]), r"Labels are \[\['a'\]\];"),
    (lambda m: m.sample([0], per_label=0), r"per_label is 0; expected a whole number, 1 to 10000\."),
    (lambda m: m.sample([0], batch_size=0), r"batch_size is 0; expected a whole number, 1 or more\."),
    (lambda m: m.sample([0], decode=1), r"decode is 1; expected True or False\."),
    (lambda m: m.stream([0], decode=1), r"decode is 1; expected True or False\."),
    (lambda m: m.stream([5]), r"Label 5 is out of range"),
    (lambda m: m.sample(np.zeros((1, 1), int)), r"Labels are array\(\[\[0\]\]\);"),
    (lambda m: m.sample(iter([0])), r"Labels are <list_iterator"),
    (lambda m: m.sample([0], numbers=RAGGED), r"numbers are \[\[0\], \[1, 2\]\]; expected 1 integers"),
    (lambda m: m.sample([0], numbers="0"), r"numbers are '0'; expected 1 integers"),
    (lambda m: m.sample([0], numbers=[-1]), r"numbers are \[-1\]; expected 1 integers"),
    (lambda m: m.sample([0], greedy=[]), r"greedy is \[\]; expected True or False\."),
    (lambda m: m.sample([0], record=None), r"record is None; expected True or False\."),
    (lambda m: m.sample([0], seed=[1]), r"seed is \[1\]; expected a whole number"),
    (lambda m: m.sample([0], 4), r"The schedule is 4; expected a Schedule, the name of one, .* \.json file\."),
    (lambda m: m.sample([0], ["next-scale"]), r"The schedule is \['next-scale'\];"),
    (lambda m: m.sample([0], b"small"), r"The schedule is b'small';"),
    (lambda m: m.sample([0], "a\0.json"), r"The schedule is 'a\\x00\.json';"),
    (lambda m: m.sample([0], Path("no.json")), r"Schedule file no\.json cannot be read"),
    (lambda m: m.sample([0], cfg="high"), r"cfg is 'high'; expected a number"),
    (lambda m: m.sample([0], cfg=10**400), r"cfg is inf; expected a finite number\."),
    (lambda m: m.sample([0], cfg=-math.inf), r"cfg is -inf; expected a finite number\."),
    (lambda m: m.sample([0], refine_cfg=[]), r"refine_cfg is \[\]; expected a number\."),
    (lambda m: m.sample([0], top_k=1.5), r"top_k is 1\.5; expected a whole number"),
    (lambda m: m.sample([0], temperature=math.nan), r"temperature is nan; expected above 0"),
    (lambda m: m.sample([0], noise=object()), r"noise is <object .*; expected a number"),
    (lambda m: m.sample([0], order=[]), r"order is \[\]; expected confidence, random or halton\."),
    (lambda m: m.edit(IMAGES * 0, RAGGED), r"The mask is \[\[0\], \[1, 2\]\]; expected bool"),
    (lambda m: m.edit("a.png", (0, 0, 2, 2)), r"Images are 'a\.png'; expected \(B, 6, 6, 3\)"),
    (lambda m: m.edit(IMAGES * 0, (0, 0, 2, 2), [0]), r"There are 1 labels for 2 pictures"),
    (
        lambda m: m.edit(IMAGES * 0, (0, 0, 2, 2), RAGGED),
        r"Labels are \[\[0\], \[1, 2\]\]; expected classes by name or number",
    ),
    (lambda m: m.edit(IMAGES * 0, (0, 0, 2, 2), 0.5), r"Labels are 0\.5;"),
    (lambda m: m.edit(IMAGES * 0, (0, 0, 2, 2), composite=1), r"composite is 1; expected True or False\."),
    (lambda m: m.edit(IMAGES * 0, (0, 0, 2, 2), variants=[]), r"variants is \[\]; expected a whole number, 1 to 10000"),
    (lambda m: m.next_scale_logits(RAGGED, TOKENS), r"Labels are \[\[0\], \[1, 2\]\];"),
    (lambda m: m.next_scale_logits(LABELS, RAGGED), r"Tokens are \[\[0\], \[1, 2\]\]; expected integers \(B, 14\)"),
    (lambda m: m.masked_logits(LABELS, TOKENS, RAGGED), r"masked is \[\[0\], \[1, 2\]\]; expected bool \(2, 14\)"),
    (lambda m: m.masked_logits(LABELS, TOKENS, None), r"masked is None; expected bool"),
    (lambda m: m.tokenizer.encode(RAGGED), r"Images are \[\[0\], \[1, 2\]\]; expected floats"),
    (lambda m: m.tokenizer.encode("a.png"), r"Images are 'a\.png'; expected floats \(B, 6, 6, 3\)"),
    (lambda m: m.tokenizer.encode(None), r"Images are None; expected floats"),
    (lambda m: m.tokenizer.decode(RAGGED), r"Tokens are \[\[0\], \[1, 2\]\]; expected integers"),
    (lambda m: m.tokenizer.decode(TOKENS > 0), r"Tokens are bool \(2, 14\);"),
    (lambda m: m.tokenizer.growth(None), r"Tokens are None;"),
    (lambda m: m.tokenizer.decode_until(TWICE, 0), r"Tokens are \(2, 2, 14\) and scales 0; expected \(T, B, L\)"),
    (lambda m: m.tokenizer.decode_until(TWICE, [0, 1.5]), r"and scales \[0, 1\.5\];"),
    (lambda m: m.tokenizer.decode_until(TWICE, [0, 3]), r"and scales \[0, 3\]; expected .* T of 0 to 2\."),
    (lambda m: m.tokenizer.decode_until(TWICE, RAGGED), r"Scales are \[\[0\], \[1, 2\]\]; expected T of 0 to 2"),
    (lambda m: m.tokenizer.decode_until(TWICE[0], [0, 1]), r"Tokens are \(2, 14\) and scales"),
]
BRIGHT = np.where(np.arange(3) == 1, 0.5, IMAGES).astype(np.float32)
WRONG_PIXELS = [
    (lambda m: m.tokenizer.encode((IMAGES + 1) * 127.5), r"Images range from .* to 25\d.*; .* floats in \[-1, 1\]"),
    (lambda m: m.tokenizer.encode(jnp.asarray(BRIGHT * 1.2 + 0.9)), r"Images range from .*; .* bytes are after / 127"),
    (lambda m: m.tokenizer.encode(np.where(IMAGES > 0.9, np.nan, IMAGES)), r"Images range from nan to nan;"),
    (lambda m: m.tokenizer.encode(np.where(IMAGES > 0.9, -np.inf, IMAGES)), r"Images range from -inf to 0\.8"),
    (lambda m: m.edit(IMAGES, (0, 0, 2, 2)), r"Images are float32 from -.*; expected uint8, or floats from 0 to 1"),
    (lambda m: m.edit(IMAGES * np.nan, (0, 0, 2, 2)), r"Images are float32 from nan to nan;"),
]


def test_pixels_may_be_off_by_rounding_and_are_not_looked_at_within_a_program(model):
    edge = np.sign(IMAGES)
    tokens = model.tokenizer.encode(edge * np.float32(1.004))
    np.testing.assert_array_equal(jax.jit(model.tokenizer.encode)(edge * np.float32(1.004)), tokens)


@pytest.mark.parametrize("write", [lambda path: path, str], ids=["Path", "str"])
def test_a_schedule_may_be_the_path_of_a_file(model, tmp_path, write):
    schedule = Schedule.preset("small", TINY.ladder)
    (tmp_path / "s.json").write_text(schedule.to_json())
    assert model.schedule(write(tmp_path / "s.json")) == schedule
    (tmp_path / "small").write_text(schedule.replace(cfg=1.0).to_json())
    assert model.schedule(tmp_path / "small") == schedule.replace(cfg=1.0)  # a Path is no preset's name


@pytest.mark.parametrize("value", [None, 3, b"model", "a\0b", ["model"]], ids=repr)
def test_what_is_no_path_is_no_model(value):
    with pytest.raises(InputError, match=r"The model is .*; expected a path") as error:
        hmar_jax.from_pretrained(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("again", [lambda model: pickle.loads(pickle.dumps(model)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_models_are_pickled_and_copied_before_and_after_they_have_sampled(model, again, kind):
    fresh = Model(TINY, model.params, kind)
    before = again(fresh)
    out = fresh.sample(LABELS, "next-scale", seed=3)
    for other in (before, again(fresh)):
        assert (other.config, other.dtype, other._placed) == (TINY, kind, None)
        jax.tree.map(np.testing.assert_array_equal, other.params, fresh.params)
        np.testing.assert_array_equal(other.sample(LABELS, "next-scale", seed=3).tokens, out.tokens)
    np.testing.assert_array_equal(other.tokenizer.encode(IMAGES), fresh.tokenizer.encode(IMAGES))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample([0, 5]), r"Label 5 is out of range; this model has classes 0 to 4\."),
        (lambda m: m.sample([-1]), r"Label -1 is out of range"),
        (lambda m: m.next_scale_logits([0, 6], TOKENS), r"Label 6 is out of range"),
        (
            lambda m: m.sample([]),
            r"Labels are .*; expected classes by name or number, integers from 0 to 4, one or a list",
        ),
        (lambda m: m.sample([0.5]), r"Labels are .*; expected classes by name"),
        (lambda m: m.sample([0], "official-256"), r"official-256 is for the sides 1,2,3,4,5.*built for 1,2,3;"),
        (lambda m: m.sample([0], Schedule.from_counts([[1], [4]])), r"is for the sides 1,2, .*built for 1,2,3;"),
        (lambda m: m.sample([0], "fast"), r"Schedule 'fast' is unknown"),
        (lambda m: m.sample([0], top_p=2), r"top_p is 2\.0; expected above 0 and at most 1"),
        (lambda m: m.sample([0], seed=-1), r"seed is -1; expected a whole number, 0 to 4294967295\."),
        (lambda m: m.sample([0], seed=2**32), r"seed is 4294967296; expected a whole number, 0 to 4294967295\."),
        (lambda m: m.sample([0], seed=0.7), r"seed is 0\.7; expected a whole number"),
        (lambda m: m.sample([0], seed=None), r"seed is None; expected a whole number"),
        (lambda m: m.tokenizer.encode(IMAGES[:, :5]), r"Images are float32 \(2, 5, 6, 3\); .*floats \(B, 6, 6, 3\)"),
        (lambda m: m.tokenizer.encode(IMAGES[0]), r"Images are float32 \(6, 6, 3\)"),
        (lambda m: m.tokenizer.encode(IMAGES[:0]), r"Images are float32 \(0, 6, 6, 3\); .* B being 1 or more\."),
        (lambda m: m.tokenizer.encode(IMAGES.astype(np.uint8)), r"Images are uint8 .*; this model takes floats"),
        (lambda m: m.tokenizer.decode(TOKENS[:0]), r"Tokens are int32 \(0, 14\); .* B being 1 or more\."),
        (lambda m: m.tokenizer.growth(TOKENS[:0]), r"Tokens are int32 \(0, 14\);"),
        (lambda m: m.tokenizer.decode(TOKENS[:, :5]), r"Tokens are int32 \(2, 5\); .* integers \(B, 14\),"),
        (lambda m: m.tokenizer.decode(TOKENS + 16), r"Tokens range from .* to .*; the codebook has 0 to 15\."),
        (lambda m: m.next_scale_logits(LABELS, TOKENS - 20), r"Tokens range from -"),
        (lambda m: m.next_scale_logits(LABELS, TOKENS[0]), r"Tokens are int32 \(14,\);"),
        (lambda m: m.next_scale_logits(LABELS, TOKENS[:1]), r"There are 2 labels but tokens of 1 pictures\."),
        (lambda m: m.next_scale_logits(LABELS, TOKENS + 0.5), r"Tokens are float64 \(2, 14\); .* integers"),
        (lambda m: m.masked_logits(LABELS, TOKENS, MASKED[:, :5]), r"masked is bool \(2, 5\); expected bool \(2, 14\)"),
        (lambda m: m.masked_logits(LABELS, TOKENS, MASKED * 1), r"masked is int.* \(2, 14\); expected bool"),
        *WRONG_TYPES,
        *WRONG_PIXELS,
    ],
)
def test_a_wrong_argument_gets_one_sentence(model, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", ["sample", "stream", "schedule"])
@pytest.mark.parametrize("name", ["cgf", "counts"])
def test_an_argument_that_is_none_is_called_by_its_name(model, call, name):
    with pytest.raises(TypeError, match=f"'{name}' is no argument here; a schedule's are cfg, temperature, top_k"):
        getattr(model, call)(0 if call != "schedule" else None, **{name: 2})


def test_a_seed_may_have_all_of_32_bits(model):
    seeds = (3_000_000_000, 3_000_000_000 - 2**31, 2**32 - 1)
    tokens = {seed: model.sample([0, 1], "next-scale", top_k=0, top_p=1.0, seed=seed).tokens for seed in seeds}
    assert len({drawn.tobytes() for drawn in tokens.values()}) == 3
    again = model.sample([0, 1], "next-scale", top_k=0, top_p=1.0, seed=seeds[0]).tokens
    np.testing.assert_array_equal(again, tokens[seeds[0]])


def test_masked_doors_need_a_mask_branch(stage1_model):
    with pytest.raises(InputError, match=r"has no mask branch; .* use next_scale_logits\.$"):
        stage1_model.masked_logits(LABELS, TOKENS, MASKED)
    with pytest.raises(InputError, match=r"masked steps needs a mask branch.*'next-scale'"):
        stage1_model.sample(LABELS, Schedule.from_counts([[1], [1, 3], [9]]))


@pytest.mark.parametrize(
    ("kind", "name"), [("model", "next-scale"), ("stage1_model", "next-scale"), ("var_model", "var")]
)
def test_by_default_a_scale_has_one_step_with_the_guidance_published_for_the_model(request, monkeypatch, kind, name):
    def draw_grey(request):
        assert request.plan == expected.plan
        np.testing.assert_array_equal(np.stack(request.controls), np.stack(expected.controls))
        return jnp.full((len(LABELS), 6, 6, 3), 0.5), jnp.zeros((len(LABELS), 14), jnp.int32), []

    expected = Schedule.preset(name, TINY.ladder)
    monkeypatch.setattr(program, "sample", draw_grey)
    assert (request.getfixturevalue(kind).sample(LABELS).images == 0.5).all()


@pytest.mark.parametrize("name", hmar_jax.__all__)
def test_public_names_are_importable(name):
    assert getattr(hmar_jax, name) is not None


SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
import hmar_jax

model = hmar_jax.from_pretrained("glyphs", jnp.bfloat16, jax.make_mesh((8,), ("data",)))
mixed = ["fox", 207]
for labels in (np.arange(3), jnp.arange(3)):
    model.sample(labels, per_label=4, batch_size=2)
out = model.sample(["fox", 207], "small", seed=3, cfg=2.0, top_k=10, order="halton", record=True)
print(model.sample(mixed).images.shape, model.sample("fox").tokens.dtype, [draw.scale for draw in out.draws or []])
out.grid(columns=2).show(out.save("a.png").name)
events = model.stream(range(3), decode=False)
for event in events:
    print(event.scale + event.step, event.images.mean())
events.close()
model.edit(out.images, (0, 0, 2, 2), mixed, variants=2)
model.sampling["default"] = hmar_jax.Schedule.from_json(hmar_jax.Schedule.from_counts([[1], [1, 3]], cfg=2.0).to_json())
trained = hmar_jax.train("glyphs_masked", "run", [lambda step, metrics: metrics["loss"] < 2.0, print])
if trained is not None:
    trained.save("model", source="mine", licences=["CC0"], replace=True)
model.sample(0, cgf=2.0)
"""


def test_a_type_checker_knows_the_interface(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    strict = ["-m", "mypy", "--strict", "--ignore-missing-imports", "--follow-imports=silent", "--cache-dir=cache"]
    root = str(Path(hmar_jax.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *strict, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": root},
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert 'Unexpected keyword argument "cgf" for "sample" of "Model"' in errors[0]  # the last line of the script


# --- greedy generation of the official code


@pytest.mark.parametrize("kind", ["nsp", "mask"])
def test_official_generation(golden, golden_model, kind):
    model = golden_model("hmar")
    counts = [[1], [4], [9], [16]] if kind == "nsp" else json.loads(str(golden["schedule"]))
    out = model.sample(golden["labels"], Schedule.from_counts(counts), cfg=1.7, greedy=True, record=True)
    assert [draw.tokens.shape[1] for draw in out.draws] == golden[f"gen_{kind}_calls"].tolist()
    draws = np.concatenate([draw.tokens for draw in out.draws], axis=1)
    np.testing.assert_array_equal(draws, golden[f"gen_{kind}_tokens"])
    pictures = out.images.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(pictures, golden[f"gen_{kind}_img"], rtol=0, atol=3e-5)


def test_official_var_generation(golden_var, golden_model):
    out = golden_model("var").sample(golden_var["labels"], "var", cfg=1.5, greedy=True)
    np.testing.assert_array_equal(out.tokens, golden_var["var_tokens"])
    np.testing.assert_allclose(out.images.transpose(0, 3, 1, 2), golden_var["var_img"], rtol=0, atol=3e-5)


def test_under_a_mesh_with_explicit_axes_sampling_says_how_to_make_it(model):
    with (
        jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))),
        pytest.raises(InputError, match=r"\{'data': 1\}, has axes of type Explicit; .*axis_types=\(AxisType.Auto,\)"),
    ):
        model.sample([0])


def test_parameters_go_to_a_mesh_once_and_stay_where_somebody_has_put_them(model):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    placed = model.placed(mesh)
    assert model.placed(mesh) is placed
    assert {leaf.sharding for leaf in jax.tree.leaves(placed)} == {NamedSharding(mesh, PartitionSpec())}
    jax.tree.map(np.testing.assert_array_equal, placed, model.params)
    changed = Model(TINY, model.params)
    changed.placed(mesh)
    changed.params = changed.params | {"tokenizer": jax.tree.map(jnp.zeros_like, changed.params["tokenizer"])}
    assert not any(leaf.any() for leaf in jax.tree.leaves(changed.placed(mesh)["tokenizer"]))
    put = Model(TINY, jax.device_put(model.params, jax.devices()[0]))
    assert put.placed(mesh) is put.params
