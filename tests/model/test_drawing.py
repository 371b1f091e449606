"""Requests of `Model.sample`: labels by name and number, batches, several of a label, tokens alone; saved pictures."""

import dataclasses
import logging
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image
from tiny_models import TINY, lively_model

from hmar_jax import InputError, Sample, from_pretrained
from hmar_jax.images import grid, to_uint8
from hmar_jax.model import Model
from hmar_jax.model.arguments import read_labels
from hmar_jax.sampling import program

# --- labels


def named(*names):
    transformer = dataclasses.replace(TINY.transformer, num_classes=len(names) or 5)
    return dataclasses.replace(TINY, transformer=transformer, class_names=names)


ANIMALS = named("red fox", "arctic fox", "goldfish", "tench, Tinca tinca", "3")
READ = {
    "a name": (TINY, "c", 2),
    "a number": (TINY, 3, 3),
    "a number in digits": (TINY, "3", 3),
    "a number of an unnamed class": (named(), "3", 3),
    "a name with spaces around it": (TINY, " c ", 2),
    "names and numbers": (TINY, ["c", 1, "4", np.int64(0)], [2, 1, 4, 0]),
    "a tuple": (TINY, ("e", "a"), [4, 0]),
    "a range": (TINY, range(1, 4), [1, 2, 3]),
    "an array": (TINY, np.array([4, 2], np.uint8), [4, 2]),
    "an array of JAX": (TINY, jnp.array([4, 2]), [4, 2]),
    "a number of an array": (TINY, np.arange(5)[3], 3),
    "an array of names": (TINY, np.array(["e", "b"]), [4, 1]),
    "an array of both": (TINY, np.array(["e", 2], object), [4, 2]),
    "a name with a comma": (ANIMALS, "tench, Tinca tinca", 3),
    "a name that is a number": (ANIMALS, ["3", 3], [4, 3]),
}


@pytest.mark.parametrize("case", READ)
def test_labels_are_names_or_numbers_one_or_several(case):
    config, labels, expected = READ[case]
    found = read_labels(config, labels)
    assert found.dtype == np.int32
    assert found.tolist() == expected


REFUSED = {
    "a name that is nearly one": (ANIMALS, "red fix", r"Label 'red fix' is .*; expected its name, such as 'red fox'\."),
    "a part of names": (ANIMALS, ["fox"], r"Label 'fox' .* such as 'red fox', 'arctic fox'\."),
    "letters of another case": (ANIMALS, "Goldfish", r"Label 'Goldfish' .* such as 'goldfish'\."),
    "a number where names are numbers": (ANIMALS, "1", r"Label '1' .*; as some names are numbers, a class's number is"),
    "no name at all": (
        TINY,
        "Q",
        r"Label 'Q' is not a class .*; expected its number, or its name, such as 'a', 'b', 'c'",
    ),
    "a name of an unnamed class": (named(), "fox", r"Label 'fox' is not a class .*; expected its name or number\."),
    "a list as in a command": (TINY, "a,b", r"Label 'a,b' is not a class"),
    "a range as in a command": (TINY, "a-b", r"Label 'a-b' is not a class"),
    "a number too high": (TINY, "5", r"Label 5 is out of range; this model has classes 0 to 4\."),
    "a number below 0": (TINY, ["a", -1], r"Label -1 is out of range"),
    "the null class": (TINY, 5, r"Label 5 is out of range"),
    "True": (TINY, True, r"Labels are True; expected classes by name or number"),
    "bytes": (TINY, b"a", r"Labels are b'a';"),
    "a set": (TINY, {"a"}, r"Labels are \{'a'\};"),
    "a dict": (TINY, {"a": 0}, r"Labels are \{'a': 0\};"),
    "names in rows": (TINY, np.array([["a"], ["b"]]), r"Labels are \[\['a'\], \['b'\]\];"),
    "no names": (TINY, np.array([], str), r"Labels are array\(\[\], dtype='<U1'\);"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_label_is_refused_with_the_names_that_are_near(case):
    config, labels, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        read_labels(config, labels)
    assert "\n" not in str(error.value)


# --- requests


@pytest.fixture(scope="module")
def small():
    """A model of one step a scale, which compiles soon."""
    return lively_model(dataclasses.replace(TINY, transformer=dataclasses.replace(TINY.transformer, depth=2)))


@pytest.fixture(scope="module")
def all_at_once(small):
    return small.sample(["a", "d", 4], seed=3, per_label=2, record=True)


def assert_equal(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.images, other.images, atol=1e-6)
    for mine, others in zip(one.draws, other.draws, strict=True):
        assert (mine.scale, mine.step) == (others.scale, others.step)
        np.testing.assert_array_equal(mine.tokens, others.tokens)
        np.testing.assert_array_equal(mine.masked, others.masked)


def test_every_label_is_drawn_as_often_as_wanted_label_by_label(small, all_at_once):
    assert_equal(small.sample([0, 0, 3, 3, 4, 4], seed=3, numbers=range(6), record=True), all_at_once)
    apart = small.sample("d", seed=3, numbers=[2, 3], per_label=2, decode=False)
    np.testing.assert_array_equal(apart.tokens, all_at_once.tokens[2:4])


def test_batches_of_one_size_give_what_one_batch_gives_by_one_program(small, all_at_once):
    before = program.sample._cache_size()
    in_batches = small.sample(["a", "d", 4], seed=3, per_label=2, record=True, batch_size=4)
    assert program.sample._cache_size() == before + 1
    assert_equal(in_batches, all_at_once)
    assert_equal(small.sample([0, 0, 3, 3, 4, 4], seed=3, record=True, batch_size=100), all_at_once)
    assert program.sample._cache_size() == before + 1


def test_a_thousand_labels_are_drawn_in_batches(small):
    out = small.sample(np.arange(1000) % 5, seed=1, batch_size=128, decode=False)
    assert out.tokens.shape == (1000, 14)
    some = [7, 500, 999]
    alone = small.sample([n % 5 for n in some], seed=1, numbers=some, decode=False)
    np.testing.assert_array_equal(out.tokens[some], alone.tokens)


def test_edits_take_names_batches_and_tokens_alone(small):
    images = np.random.default_rng(0).random((2, 6, 6, 3)).astype(np.float32)
    by_number = small.edit(images, (0, 0, 4, 4), [1, 1], "next-scale", variants=2, decode=False)
    assert by_number.images is None
    by_name = small.edit(images, (0, 0, 4, 4), "b", "next-scale", variants=2, decode=False, batch_size=3)
    np.testing.assert_array_equal(by_name.tokens, by_number.tokens)
    with pytest.raises(InputError, match="composite blends pictures, which decode=False leaves out"):
        small.edit(images, (0, 0, 4, 4), composite=True, decode=False)


# --- dtype and mesh


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype("bfloat16"), "bfloat16", jnp.zeros((), "bfloat16").dtype])
def test_the_compute_type_is_given_as_numpy_and_jax_take_it(small, dtype):
    made = Model(small.config, small.params, dtype)
    assert made.dtype == "bfloat16"
    assert made.params["transformer"]["word"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "dtype",
    [None, "bf16", float, np.float16, 32, [], {}, "f4,f4", "(", object(), np.ones(2, np.float32)],
    ids=lambda x: type(x).__name__,
)
def test_other_compute_types_are_refused(small, dtype):
    with pytest.raises(InputError, match=r"^dtype is .*; expected 'float32' or 'bfloat16'\.$"):
        Model(small.config, small.params, dtype)


@pytest.mark.parametrize("dtype", [np.float32, "f4", np.dtype(">f4"), jnp.float32])
def test_float32_has_several_names(small, dtype):
    assert Model(small.config, small.params, dtype).dtype == "float32"


def test_a_model_is_placed_on_its_mesh_and_copied_without_it(small, tmp_path, all_at_once):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    for made in (Model(small.config, small.params, mesh=mesh), from_pretrained(small.save(tmp_path / "m"), mesh=mesh)):
        assert {leaf.sharding.mesh for leaf in jax.tree.leaves(made.params)} == {mesh}
        assert_equal(made.sample([0, 0, 3, 3, 4, 4], seed=3, record=True), all_at_once)
        assert pickle.loads(pickle.dumps(made)).mesh is None


@pytest.mark.parametrize("mesh", ["data", 8, jax.sharding.get_mesh()], ids=str)
def test_what_is_no_mesh_is_refused(small, mesh):
    with pytest.raises(InputError, match=r"^mesh is .*; expected a jax\.sharding\.Mesh with axes of type Auto"):
        Model(small.config, small.params, mesh=mesh)


def test_a_mesh_with_explicit_axes_is_refused(small):
    with pytest.raises(InputError, match=r"mesh is .*; expected .*axis_types=\(AxisType.Auto,\)"):
        from_pretrained("nowhere", mesh=jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,)))


# --- results


def test_a_sample_is_shown_and_saved(all_at_once, tmp_path, caplog):
    pictures = to_uint8(all_at_once.images)
    for shown, expected in zip(all_at_once.pil(), pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(shown), expected)
    for columns, used in ((None, 6), (4, 4)):
        np.testing.assert_array_equal(all_at_once.grid(columns), grid(pictures, used))
    assert all_at_once in [all_at_once]
    assert all_at_once != dataclasses.replace(all_at_once)  # compared as objects: arrays are not one truth
    assert all_at_once.grid(3, 2).width == 2 * all_at_once.grid(3).width
    path = all_at_once.save(tmp_path / "new" / "grid.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), all_at_once.grid())
    folder = all_at_once.save(str(tmp_path / "pictures"))
    assert sorted(file.name for file in folder.iterdir()) == [f"{i:05d}.png" for i in range(6)]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "00005.png")), pictures[5])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "pictures"]
    with caplog.at_level(logging.INFO, "hmar_jax"):
        dataclasses.replace(all_at_once, images=all_at_once.images[:1]).save(folder)
    assert f"Replacing {folder / '00000.png'}." in caplog.messages
    assert len(list(folder.iterdir())) == 6


def test_a_folder_of_pictures_appears_whole_or_not_at_all(all_at_once, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00003.png").write_text("mine")
    with pytest.raises(InputError, match=r"00003\.png, which is there already and is not a PNG file"):
        all_at_once.save(tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 1
    written = []

    def save_png(picture, path):
        written.append(path)
        if len(written) == 4:
            raise InputError("The disk refuses.")
        return path.parent.mkdir(parents=True, exist_ok=True) or path.write_bytes(b"")

    monkeypatch.setattr("hmar_jax.images.save_png", save_png)
    with pytest.raises(InputError, match="The disk refuses"):
        all_at_once.save(tmp_path / "new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("use", [Sample.pil, Sample.grid, lambda sample: sample.save("out")])
def test_tokens_alone_are_no_pictures(use):
    with pytest.raises(InputError, match=r"^This sample has no pictures, .*model\.tokenizer\.decode, or leave"):
        use(Sample(None, np.zeros((2, 14), np.int32)))


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("model", r"Model(HMAR d3, 6 px, 122K parameters, float32)"),
        ("stage1_model", r"Model(HMAR without masked steps, d3, 6 px, 101K parameters, float32)"),
        ("var_model", r"Model(VAR d3, 6 px, 101K parameters, float32)"),
    ],
)
def test_a_model_says_what_it_is(request, kind, shown):
    model = request.getfixturevalue(kind)
    assert repr(model) == shown
    config = dataclasses.replace(TINY, transformer=None)
    alone = Model(config, {"tokenizer": model.params["tokenizer"]}, "bfloat16")
    assert repr(alone) == "Model(tokenizer, 6 px, 40.3K parameters, bfloat16)"
