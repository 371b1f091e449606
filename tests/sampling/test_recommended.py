"""Schedules that a model recommends: kept with it, found by name, the default where nothing else is said."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY, lively_model, tiny

from hmar_jax import InputError, from_pretrained
from hmar_jax.bulk import samples
from hmar_jax.commands.main import main
from hmar_jax.formats.model_directory import open_model, read_config
from hmar_jax.images import save_png
from hmar_jax.sampling import presets, program, recommended
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.training.trained import trained_model

DEFAULT = Schedule.preset("small", TINY.ladder).replace(cfg=3.0, order="halton", top_k=7)
FAST = Schedule.from_counts([[1], [4], [9]], cfg=1.25, temperature=0.9)
OWN = {"default": DEFAULT, "fast": FAST}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model = lively_model(TINY)
    model.sampling = OWN
    return model.save(tmp_path_factory.mktemp("own") / "model", source="a test")


@pytest.fixture
def described(directory, tmp_path):
    """A function that has a copy of the directory described by other `sampling`; the copy."""

    def describe(sampling):
        folder = tmp_path / "described"
        folder.mkdir()
        for file in directory.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        meta = json.loads((folder / "config.json").read_text())
        del meta["digest"]
        (folder / "config.json").write_text(json.dumps(meta | {"sampling": sampling}))
        return folder

    return describe


@pytest.fixture
def asked(monkeypatch):
    """The digest of each schedule that the sampler was called with."""
    digests, resolve = [], Schedule.resolve

    def noted(*args, **changes):
        digests.append(resolve(*args, **changes).digest)
        return resolve(*args, **changes)

    def draw_grey(request):
        return jnp.full((len(request.labels), 6, 6, 3), 0.5), jnp.zeros((len(request.labels), 14), jnp.int32), []

    monkeypatch.setattr(Schedule, "resolve", noted)
    monkeypatch.setattr(program, "sample", draw_grey)
    monkeypatch.setattr(samples, "sample_classes", lambda *_, **__: 0)
    return digests


# --- kept


def test_a_model_keeps_them_however_it_is_copied(directory, tmp_path):
    model = from_pretrained(directory)
    assert model.sampling == OWN
    again = model.save(tmp_path / "again")
    assert open_model(again).sampling == pickle.loads(pickle.dumps(model)).sampling == copy.copy(model).sampling == OWN
    model.sampling = {"fast": DEFAULT}
    assert open_model(model.save(again, replace=True)).sampling == {"fast": DEFAULT}


def test_the_digest_covers_them(directory, described, caplog):
    _, meta = read_config(directory)
    assert meta["sampling"]["fast"] == json.loads(FAST.to_json())
    folder = described({"fast": json.loads(DEFAULT.to_json())})
    (folder / "config.json").write_text(json.dumps(read_config(folder)[1] | {"digest": meta["digest"]}))
    assert open_model(folder).sampling == {"fast": DEFAULT}
    assert "is not as it was written, since its digest is of other fields" in caplog.text


def test_they_may_be_written_by_hand(described):
    folder = described({"default": {"counts": [[1], [1, 3], [9]], "cfg": 2, "refine_cfg": 1}})
    assert from_pretrained(folder).sampling == {
        "default": Schedule.from_counts([[1], [1, 3], [9]], cfg=2.0, refine_cfg=1.0)
    }


def test_a_model_without_them_is_described_as_before(tmp_path, model):
    path = model.save(tmp_path / "model", source="x")
    assert "sampling" not in read_config(path)[1]
    assert from_pretrained(path).sampling == {}


# --- refused

BAD = {
    "a list": ([], "sampling is []; expected schedules by name"),
    "nothing": (None, "sampling is None; expected schedules by name"),
    "a schedule alone": ({"counts": [[1]], "cfg": 1}, "Recommended schedule 'counts': A schedule's JSON has 'counts'"),
    "a preset's name": ({"fast": "small"}, "Recommended schedule 'fast': A schedule's JSON has 'counts'"),
    "another ladder": ({"fast": {"counts": [[1], [4]]}}, "Recommended schedule 'fast': This schedule is for the sides"),
    "no counts": ({"fast": {"counts": [[1], [4], [8]]}}, "Recommended schedule 'fast': Counts [8] of scale 3"),
    "no number": ({"fast": {"counts": [[1], [4], [9]], "cfg": "x"}}, "Recommended schedule 'fast': cfg is 'x'"),
    "a file's name": ({"a.json": {"counts": [[1], [4], [9]]}}, "sampling has a schedule called 'a.json'; expected a"),
    "a curve": ({"equal:2": {"counts": [[1], [4], [9]]}}, "sampling has a schedule called 'equal:2'; expected a"),
    "no name": ({"": {"counts": [[1], [4], [9]]}}, "sampling has a schedule called ''; expected a letter"),
    "many": ({f"s{i}": {"counts": [[1], [4], [9]]} for i in range(65)}, "sampling has 65 schedules; expected 64"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_none_is_one_sentence_that_names_the_file(described, case):
    sampling, expected = BAD[case]
    folder = described(sampling)
    with pytest.raises(InputError) as refused:
        from_pretrained(folder)
    assert f"{folder / 'config.json'}: {expected}" in str(refused.value)


def test_masked_steps_need_a_mask_branch_and_schedules_a_transformer():
    with pytest.raises(InputError, match=r"^Recommended schedule 'default': A schedule with masked steps needs a mask"):
        recommended.check(OWN, tiny(masked=False))
    with pytest.raises(InputError, match="this model is a tokenizer alone; leave sampling out"):
        recommended.check(OWN, dataclasses.replace(TINY, transformer=None, class_names=()))
    recommended.check({}, dataclasses.replace(TINY, transformer=None, class_names=()))


def test_a_model_that_recommends_what_is_none_is_not_saved(tmp_path):
    model = lively_model(TINY)
    model.sampling = {"fast": "small"}
    with pytest.raises(InputError, match=r"^Recommended schedule 'fast': It is 'small'; expected a Schedule"):
        model.save(tmp_path / "model")
    with pytest.raises(InputError, match="The model's schedule 'fast' is 'small'; expected a Schedule"):
        model.schedule("fast")
    assert not list(tmp_path.iterdir())


# --- found


def test_a_name_is_the_models_before_a_preset_and_none_is_the_default(tmp_path):
    own = OWN | {"small": FAST, "single": DEFAULT}
    resolve = lambda schedule, **changes: Schedule.resolve(schedule, TINY.ladder, TINY.transformer, own, **changes)  # noqa: E731
    assert resolve(None) == resolve("default") == resolve("single") == DEFAULT
    assert resolve("fast") == resolve("small") == FAST
    assert resolve("fast", cfg=4.0) == FAST.replace(cfg=4.0)
    assert resolve("next-scale") == Schedule.preset("next-scale", TINY.ladder)
    (tmp_path / "fast").write_text(DEFAULT.to_json())
    assert resolve(tmp_path / "fast") == resolve(Path(tmp_path, "fast")) == DEFAULT


def test_an_unknown_name_lists_the_models_own():
    with pytest.raises(InputError, match=r"'quick' is unknown; choose default, fast of this model, or official-256,"):
        Schedule.resolve("quick", TINY.ladder, TINY.transformer, OWN)
    with pytest.raises(InputError, match="'default' is unknown; choose official-256"):
        Schedule.resolve("default", TINY.ladder, TINY.transformer)


def test_nothing_is_said_of_published_guidance_where_the_model_has_its_own(caplog):
    presets._note.cache_clear()
    with caplog.at_level("INFO", "hmar_jax"):
        for schedule in (None, "default", "fast"):
            Schedule.resolve(schedule, TINY.ladder, TINY.transformer, OWN)
        assert caplog.messages == []
        Schedule.resolve("small", TINY.ladder, TINY.transformer, OWN)
    assert len(caplog.messages) == 1


def test_sampling_and_editing_follow_the_default(directory, asked):
    model = from_pretrained(directory)
    pictures, mask = np.full((1, 6, 6, 3), 0.5, np.float32), (0, 0, 3, 3)
    model.sample([0])
    model.edit(pictures, mask, [0])
    model.sample([0], "fast")
    model.edit(pictures, mask, [0], "fast")
    assert asked == [DEFAULT.digest] * 2 + [FAST.digest] * 2


def test_commands_follow_the_default_and_find_the_others(directory, asked, tmp_path, capsys):
    sample = ["sample", f"--model={directory}", f"--output={tmp_path}"]
    for name, option, schedule in (("default", [], DEFAULT), ("fast", ["--schedule=fast"], FAST)):
        for which in ("--labels=0", "--classes=0"):
            assert main([*sample, which, *option]) == 0
        assert main(["schedule", "show", name, f"--model={directory}"]) == 0
        assert f"digest: {schedule.digest}" in capsys.readouterr().out
    assert asked == [DEFAULT.digest] * 3 + [FAST.digest] * 3


@pytest.mark.usefixtures("asked")
def test_commands_say_whose_guidance_they_take_where_none_was_published(directory, model, tmp_path, caplog):
    plain, mask = model.save(tmp_path / "plain"), tmp_path / "picture.png"
    save_png(np.zeros((6, 6, 3), np.uint8), mask)
    edit = ["edit", f"--image={mask}", "--box=0,0,3,3", f"--output={tmp_path / 'edited.png'}"]
    said = "No guidance was published for depth 3; cfg 1.7 and top-k 1000 are those of depth 16"
    for command in (["sample", "--labels=0", f"--output={tmp_path}"], edit):
        for folder, times in ((plain, 1), (directory, 0)):
            presets._note.cache_clear()
            caplog.clear()
            assert main([*command, f"--model={folder}"]) == 0
            assert caplog.text.count(said) == times


def test_training_that_goes_on_keeps_them_and_another_network_does_not(directory):
    start = SimpleNamespace(**open_model(directory)._asdict())
    state, config = SimpleNamespace(best=None, step=3), SimpleNamespace(stage="masked", batch_size=1, seed=0)
    for model, kept in ((lively_model(TINY), OWN), (lively_model(tiny(class_dropout=0.2)), {})):
        objective = SimpleNamespace(start=start, model_config=model.config, model_params=lambda *_, m=model: m.params)
        assert trained_model(config, objective, state, {}).sampling == kept
