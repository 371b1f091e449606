"""Train configs: files, overrides and values give a config with these values, or a sentence refuses them."""

import dataclasses
import importlib
import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import ODD_TEXTS, ODD_VALUES, odd_json

from hmar_jax.config import TrainConfig, load
from hmar_jax.config.plain import from_config_dict, from_plain, to_plain
from hmar_jax.errors import InputError
from hmar_jax.params import flatten

CONFIGS = {
    name: from_config_dict(TrainConfig, importlib.import_module(f"hmar_jax.configs.{name}").get_config())
    for name in ("glyphs_tokenizer", "glyphs_next_scale", "imagenet_tokenizer", "imagenet")
    if importlib.util.find_spec(f"hmar_jax.configs.{name}")
}
PLAIN = {name: json.loads(json.dumps(to_plain(config))) for name, config in CONFIGS.items()}
FIELDS = sorted(flatten(to_plain(TrainConfig(stage="tokenizer"))))


def check(make, values=None):
    """What `make` gives or refuses; a config that it gives has the values that were asked for, within bounds."""
    try:
        config = make()
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 700
        return
    plain = flatten(to_plain(config))
    for name, value in plain.items():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int | float):
                assert math.isfinite(item), name
                assert isinstance(item, float) or abs(item) < 2**31, name
    assert sum(side**2 for side in config.sides) <= 2**18
    for name, value in flatten(values or {}).items():
        taken = json.loads(json.dumps(plain[name], default=to_plain))
        assert taken == (float(value) if isinstance(taken, float) else value), name


@pytest.mark.parametrize("name", PLAIN)
def test_the_configs_that_come_with_the_project_are_taken(name):
    assert from_plain(TrainConfig, PLAIN[name]) == CONFIGS[name]


@given(st.sampled_from(sorted(PLAIN)), st.data())
def test_odd_values_are_refused_or_taken_as_they_are(name, data):
    values = data.draw(odd_json(PLAIN[name]).map(lambda text: parsed(text)))
    if isinstance(values, dict):
        check(lambda: from_plain(TrainConfig, values), values)


def parsed(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


ODD_NUMBERS = [
    -(2**31),
    2**31 - 1,
    2**31,
    10**12,
    10**30,
    1e300,
    -1e-300,
    math.nan,
    math.inf,
    -math.inf,
    True,
    "1",
    None,
]


@given(st.sampled_from(FIELDS), st.sampled_from(ODD_NUMBERS + ODD_VALUES) | st.integers() | st.floats())
@example("sides", [1, 3000])
@example("sides", [1, 2**40])
@example("batch_size", 10**12)
@example("steps", 10**30)
@example("transformer.depth", 10**9)
@example("mesh.data", 10**9)
@example("tokenizer_loss.kmeans_batches", 10**9)
@example("tokenizer_loss.discriminator_layers", 10**6)
@example("keep", 10**30)
@example("sample_labels", [2**31])
def test_an_odd_value_of_any_field_is_refused_or_taken_as_it_is(field, value):
    values = json.loads(json.dumps(PLAIN["glyphs_tokenizer"]))
    *groups, last = field.split(".")
    place = values
    for group in groups:
        place = place[group]
    place[last] = value
    check(lambda: from_plain(TrainConfig, values), values)


VALUES = [*ODD_TEXTS, "9" * 30, "9" * 5000, "1e400", "nan", "inf", "(1,3000)", "(1,", "[" * 3000, "-" * 99999]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "config.py"
    file.write_text("from hmar_jax.configs.glyphs_tokenizer import get_config\n")
    return file


@given(
    st.lists(
        st.builds("{}={}".format, st.sampled_from(["", ".", "x", "data", "a.b", *FIELDS]), st.sampled_from(VALUES))
        | st.builds("{}={}".format, st.sampled_from(FIELDS), st.integers() | st.floats() | st.text(max_size=9))
        | st.text(max_size=9),
        max_size=2,
    )
)
def test_overrides_are_refused_or_give_a_config(config_file, overrides):
    check(lambda: load(str(config_file), [f"--config.{override}" for override in overrides]))


HEAD = "import ml_collections\n"
PROGRAMS = [
    *["1/0", "def", "raise SystemExit", "raise SystemExit(3)", "import sys; sys.exit('\x1b[2J')", "raise MemoryError"],
    *[
        "raise BaseException",
        "raise GeneratorExit",
        "x = 1",
        "",
        "\0",
        "get_config = 7",
        "import nowhere",
        "open('/no')",
    ],
    *["raise ValueError('x' * 100_000)", "x=" + "(" * 5000, "def f(): f()\nf()", '{"stage": "tokenizer"}', "\ufeff1/0"],
    "class E(Exception):\n  def __str__(self): raise ValueError\nraise E",
    "def get_config(): raise SystemExit",
    "def get_config(): return None",
    "def get_config(a, b): pass",
    "def get_config(): yield 1",
    "def get_config(): return get_config()",
    HEAD + "def get_config(): return ml_collections.ConfigDict({1: 2})",
    HEAD + "def get_config(): return ml_collections.FrozenConfigDict({})",
    HEAD + "def get_config():\n  c = ml_collections.ConfigDict(); c.a = c; return c",
    HEAD + "def get_config():\n  l = []; l.append(l); return ml_collections.ConfigDict({'sides': l})",
    HEAD + "def get_config():\n  l = []\n  for _ in range(9**5):\n    l = [l]\n  "
    "return ml_collections.ConfigDict({'sides': l})",
    HEAD + "def get_config():\n  c = ml_collections.ConfigDict()\n"
    "  for _ in range(3000): d = ml_collections.ConfigDict(); d.x = c; c = d\n  return c",
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: ascii(program)[:40])
def test_a_program_that_gives_no_config_is_refused(tmp_path, program):
    file = tmp_path / "config.py"
    file.write_bytes(program.encode())
    with pytest.raises(InputError) as caught:
        load(str(file))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x = '\xff'\n", bytes(range(256)), b"\x7fELF" + bytes(99)])
def test_what_is_no_text_is_refused(tmp_path, content):
    file = tmp_path / "config.py"
    file.write_bytes(content)
    with pytest.raises(InputError, match="is not Python"):
        load(str(file))


def test_every_field_of_the_dataclasses_is_tried():
    assert len(FIELDS) > 60
    assert {field.name for field in dataclasses.fields(TrainConfig)} == {name.partition(".")[0] for name in FIELDS}
