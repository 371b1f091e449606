"""From pictures to new pictures by commands alone: glyphs, and a folder of real photographs."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import tiny_training as tiny
from PIL import Image

import hmar_jax
from hmar_jax.commands.main import main
from hmar_jax.config import DataConfig, ObjectiveConfig
from hmar_jax.data.tokens import TokenSource
from hmar_jax.sampling.schedule import Schedule

STAGES = ("tokenizer", "next_scale", "masked")
NAMES = {"glyphs": ("A", "B"), "photographs": ("china", "flower")}


def ran(*command):
    logging.getLogger("hmar_jax").setLevel(logging.WARNING)
    assert main([str(word) for word in command]) == 0


LICENCE = "The tokenizer is bound to a licence."


def bind(config_file):
    """Makes a model one that came with a licence."""
    meta = json.loads(config_file.read_text())
    assert meta["licences"] == []
    config_file.write_text(json.dumps(meta | {"licences": [LICENCE]}))


def walk(root, kind, write_config):
    """Runs every command once, as README has them."""
    if kind == "glyphs":
        data, count = DataConfig("glyphs", classes="AB"), ["--count=24"]
    else:
        sklearn = pytest.importorskip("sklearn.datasets")
        for photograph, name in zip(sklearn.load_sample_images().images, NAMES[kind], strict=True):
            folder = root / "pictures" / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(photograph[20 * i : 20 * i + 200, 40 * i : 40 * i + 300]).save(folder / f"{i}.jpg")
        data, count = DataConfig("folder", path=str(root / "pictures"), flip=True), []
    two = {"transformer": dataclasses.replace(tiny.TRANSFORMER, num_classes=2)}
    configs = {
        "tokenizer": tiny.tokenizer_config(steps=3, data=data),
        "next_scale": tiny.next_scale_config(root, steps=3, init_from=str(root / "tokenizer/model"), **two),
        "masked": tiny.masked_config(
            root, steps=3, init_from=str(root / "next_scale/model"), objective=ObjectiveConfig(leak_free=True)
        ),
    }
    files = {stage: write_config(root / f"{stage}.py", config) for stage, config in configs.items()}
    tokens = ["--model", root / "tokenizer/model", "--crops=2", "--batch-size=8", "--output", root / "tokens"]
    ran("train", f"--config={files['tokenizer']}", "--workdir", root / "tokenizer")
    bind(root / "tokenizer/model/config.json")
    ran("export", "tokens", f"--config={files['tokenizer']}", *tokens, *count)
    ran("train", f"--config={files['next_scale']}", "--workdir", root / "next_scale", "--config.batch_size=4")
    ran("train", f"--config={files['masked']}", "--workdir", root / "masked")
    ran("export", "model", "--workdir", root / "masked", "--output", root / "release")


@pytest.fixture(scope="session", params=NAMES)
def walked(request, tmp_path_factory, write_config):
    """Kind of pictures, and the folder that holds what the commands wrote about them."""
    folder = tiny.shared_folder(tmp_path_factory) / f"walked-{request.param}"
    return request.param, tiny.once(folder, lambda root: walk(root, request.param, write_config))


@pytest.mark.parametrize("stage", STAGES)
def test_training_leaves_a_model_metrics_checkpoints_and_its_config(walked, stage):
    workdir = walked[1] / stage
    assert {"model", "metrics.jsonl", "checkpoints", "config.json"} <= {entry.name for entry in workdir.iterdir()}
    assert tiny.steps_on_disk(workdir) == {"2", "3"}
    assert {entry.name for entry in (workdir / "model").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    recorded = json.loads((workdir / "config.json").read_text())
    assert (recorded["stage"], recorded["batch_size"]) == (stage, 4 if stage == "next_scale" else 8)


@pytest.mark.parametrize("model", ["next_scale/model", "masked/model", "release"])
def test_what_starts_from_a_bound_model_is_bound_as_well(walked, model):
    folder = walked[1] / model
    assert json.loads((folder / "config.json").read_text())["licences"] == [LICENCE]
    assert LICENCE in (folder / "README.md").read_text()


def test_the_model_knows_its_classes_and_what_it_is(walked):
    kind, root = walked
    alone, stage1, whole = (hmar_jax.from_pretrained(root / stage / "model") for stage in STAGES)
    assert alone.config.transformer is None
    assert not stage1.config.transformer.masked
    assert whole.config.transformer.masked
    assert whole.config.transformer.leak_free
    assert alone.config.class_names == stage1.config.class_names == whole.config.class_names == NAMES[kind]
    assert whole.config.ladder == tiny.LADDER


def test_the_masked_stage_moves_the_mask_branch_and_nothing_else(walked):
    before, after = (hmar_jax.from_pretrained(walked[1] / stage / "model").params for stage in STAGES[1:])
    copied = {"transformer": before["transformer"] | {"masked": before["transformer"]["next_scale"]}}
    trained = {"transformer": dict(after["transformer"])}
    assert np.any(trained["transformer"].pop("mask_embed"))
    assert not tiny.differing({"t": before["tokenizer"]}, {"t": after["tokenizer"]})
    moved = tiny.differing(copied, trained)
    assert moved == {name for name in moved if name.startswith("transformer.masked.")}
    assert {"transformer.masked.head.linear.kernel", "transformer.masked.stack.blocks.fc1.kernel"} <= moved


def test_export_model_gives_the_model_of_the_newest_checkpoint(walked):
    ours, theirs = (walked[1] / name / "model.safetensors" for name in ("release", "masked/model"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_token_cache_has_every_picture_in_its_crops(walked):
    kind, root = walked
    cache = TokenSource(root / "tokens")
    assert (len(cache), cache.crops, cache.class_names) == (24 if kind == "glyphs" else 16, 2, NAMES[kind])
    labels = [int(cache[i]["label"]) for i in range(len(cache))]
    assert set(labels) == {0, 1}
    assert any((cache[i]["tokens"][0] != cache[i]["tokens"][1]).any() for i in range(len(cache)))


def pictures_of(images):
    return np.floor(images * 255 + np.float32(0.5)).astype(np.uint8)


def read(folder):
    pictures = {}
    for file in sorted(folder.iterdir()):
        with Image.open(file) as picture:
            pictures[file.name] = np.asarray(picture)
    return pictures


def test_sampling_writes_one_picture_a_label_and_a_grid(walked, tmp_path, capsys):
    kind, root = walked
    labels = f"1,{NAMES[kind][0]},0"
    ran("sample", "--model", root / "release", "--labels", labels, "--schedule=small", "--seed=5", "--output", tmp_path)
    pictures = read(tmp_path)
    asked = (f"{i:05d}-class{name}-seed5.png" for i, name in enumerate(labels.split(",")))
    assert list(pictures) == [*asked, "grid.png"]
    assert pictures["00000-class1-seed5.png"].shape == (tiny.SIZE, tiny.SIZE, 3)
    assert pictures["grid.png"].shape == (tiny.SIZE + 4, 3 * (tiny.SIZE + 2) + 2, 3)
    assert f"3 pictures and grid.png are in {tmp_path}" in capsys.readouterr().out
    model = hmar_jax.from_pretrained(root / "release")
    images = model.sample([1, 0, 0], "small", seed=5).images
    np.testing.assert_array_equal(list(pictures.values())[1], pictures_of(images)[1])


def test_sampling_follows_a_schedule_file(walked, tmp_path):
    _, root = walked
    file = tmp_path / "mine.json"
    file.write_text(Schedule.from_counts([[1], [1, 3], [60, 4]], cfg=0.0, top_k=3, top_p=1.0).to_json())
    common = ["sample", "--model", root / "release", "--labels=0,1"]
    ran(*common, f"--schedule={file}", "--output", tmp_path / "file")
    ran(*common, f"--schedule={file}", "--top-k=16", "--temperature=3", "--output", tmp_path / "hot")
    model = hmar_jax.from_pretrained(root / "release")
    images = model.sample([0, 1], Schedule.from_json(file.read_text())).images
    ours, hot = read(tmp_path / "file"), read(tmp_path / "hot")
    np.testing.assert_array_equal(ours["00000-class0-seed0.png"], pictures_of(images)[0])
    assert (ours["grid.png"] != hot["grid.png"]).any()


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in ("train", "export", "sample", "demo"))
