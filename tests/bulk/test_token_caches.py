"""What an export of tokens promises: the tokens of the right crops, and a run that was stopped goes on to the same."""

import dataclasses
import json
import logging
import os
import shutil

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image
from tiny_models import TINY, fingerprint, lively_model

from hmar_jax import from_pretrained
from hmar_jax.bulk import token_caches
from hmar_jax.bulk.token_caches import BROKEN, MANIFEST, export_tokens
from hmar_jax.config import DataConfig
from hmar_jax.data import pipeline
from hmar_jax.data.tokens import TokenSource, write_shard
from hmar_jax.errors import InputError
from hmar_jax.files import lock
from hmar_jax.images import to_signed

COUNT, CROPS, SHARDS = 40, 2, 3  # of 16, 16 and 8 pictures


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return lively_model(TINY).save(tmp_path_factory.mktemp("model") / "model", source="made for a test")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data") / "pictures", np.random.default_rng(0)
    for i in range(COUNT):
        file = folder / f"class {i % 2}" / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + i % 3, 12, 3), np.uint8)).save(file)
    return DataConfig("folder", path=str(folder), flip=True)


@pytest.fixture(scope="module")
def whole(model_path, data, tmp_path_factory):
    """A cache that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    assert export_tokens(model_path, data, path, crops=CROPS) == COUNT
    return path


def records(folder):
    return {file.name: list(ArrayRecordDataSource([file])) for file in folder.glob("tokens-*")}


def partial_of(path):
    return path.with_name(f".{path.name}.partial")


def begun(path, whole, keep):
    """Makes what is left of an export to `path` that was killed once these shards were finished."""
    shutil.copytree(whole, partial_of(path))
    (partial_of(path) / "cache.json").unlink()
    for i, file in enumerate(sorted(partial_of(path).glob("tokens-*"))):
        if i not in keep:
            file.rename(file.with_name(f".{file.name}.partial"))
    return path


@pytest.fixture
def coded(monkeypatch):
    """The indices of the pictures that are coded."""
    indices, encoded = [], token_caches._encoded

    def spied(*arguments):
        indices.extend(arguments[-1])
        return encoded(*arguments)

    monkeypatch.setattr(token_caches, "_encoded", spied)
    return indices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tokens_are_those_of_every_crop(model_path, data, whole, tmp_path, dtype):
    model = from_pretrained(model_path, dtype)
    if dtype == "bfloat16":
        export_tokens(model_path, data, tmp_path / "cache", crops=CROPS, batch_size=3, dtype=dtype)
    source = TokenSource(whole if dtype == "float32" else tmp_path / "cache")
    ((images, labels),) = pipeline.examples(data, TINY.image_size, crops=CROPS)
    expected = np.stack([np.asarray(model.tokenizer.encode(to_signed(crop))) for crop in images], axis=1)
    ours = np.stack([example["tokens"] for example in source])
    assert ours.shape == expected.shape
    assert (ours != expected).mean() <= (0.0 if dtype == "float32" else 0.02)  # near-ties
    assert [example["label"] for example in source] == labels.tolist()
    assert source.dtype == dtype
    assert source.tokenizer == fingerprint(from_pretrained(model_path))
    assert (source.crops, source.class_names, source.ladder) == (CROPS, ("class 0", "class 1"), TINY.ladder)


def test_bfloat16_is_for_the_encoder_alone(model_path):
    config = dataclasses.replace(TINY, transformer=None)
    params = from_pretrained(model_path, "bfloat16").params["tokenizer"]
    mesh = token_caches.sharding.make_mesh(token_caches.MeshConfig())
    images = np.zeros((1, TINY.image_size, TINY.image_size, 3), np.uint8)
    text = token_caches._encode.lower(config, "bfloat16", mesh, {"tokenizer": params}, images).as_text(debug_info=True)
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    narrow = [line for line in convolutions if "bf16" in line]
    assert narrow and len(convolutions) - len(narrow) == TINY.ladder.num_scales - 1  # phis; the last scale needs none
    assert all("HIGHEST" in line for line in convolutions if line not in narrow)
    codes = TINY.tokenizer.codebook_size
    products = [line for line in text.splitlines() if "dot_general" in line and f"x{codes}xf32" in line]
    assert len(products) == TINY.ladder.num_scales
    assert all("HIGHEST" in line and "bf16" not in line for line in products)


@pytest.mark.parametrize("keep", [(), (0,), (1, 2), (0, 1, 2)])
def test_a_killed_export_goes_on_to_the_same_cache(model_path, data, whole, tmp_path, coded, keep):
    path = begun(tmp_path / "cache", whole, keep)
    assert export_tokens(model_path, data, path, crops=CROPS) == COUNT
    shards = [range(16), range(16, 32), range(32, 40)]
    assert coded == [index for i, shard in enumerate(shards) if i not in keep for index in shard]
    assert records(path) == records(whole)
    assert {file.name for file in path.iterdir()} == {file.name for file in whole.iterdir()}
    assert os.listdir(tmp_path) == ["cache"]


def test_what_is_finished_stays_when_an_export_ends_early(model_path, data, whole, tmp_path, monkeypatch):
    encoded = token_caches._encoded

    def interrupted(*arguments):
        batches = encoded(*arguments)
        for _ in range(2):  # of 16 pictures
            yield next(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(token_caches, "_encoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_tokens(model_path, data, tmp_path / "cache", crops=CROPS, batch_size=16)
    assert not (tmp_path / "cache").exists()
    names = sorted(records(whole))
    assert {file.name for file in partial_of(tmp_path / "cache").iterdir()} == {MANIFEST, *names[:2]}
    assert records(partial_of(tmp_path / "cache")) == {name: records(whole)[name] for name in names[:2]}


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(b""), lambda file: os.truncate(file, 300), flip_a_byte]
)
def test_a_damaged_shard_is_coded_again(model_path, data, whole, tmp_path, coded, damage):
    path = begun(tmp_path / "cache", whole, (0, 1, 2))
    first = min(partial_of(path).glob("tokens-*"))
    smaller = records(whole)[first.name][0][:20]
    damage(first)
    export_tokens(model_path, data, path, crops=CROPS)
    assert coded == list(range(16))
    assert records(path) == records(whole)
    assert smaller == records(path)[first.name][0][:20]


@pytest.mark.parametrize("fault", ["a label", "a code", "a size"])
def test_a_finished_shard_with_a_record_out_of_range_is_coded_again(model_path, data, whole, tmp_path, coded, fault):
    path = begun(tmp_path / "cache", whole, (0, 1, 2))
    first = min(partial_of(path).glob("tokens-*"))
    spoiled = [bytearray(record) for record in records(whole)[first.name]]
    if fault == "a size":
        del spoiled[3][-2:]
    else:
        at = slice(0, 4) if fault == "a label" else slice(4, 6)
        spoiled[3][at] = b"\xff" * len(spoiled[3][at])
    write_shard(first, map(bytes, spoiled), path)
    export_tokens(model_path, data, path, crops=CROPS)
    assert coded == list(range(16))
    assert records(path) == records(whole)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_finished_shard_that_is_no_file_is_a_sentence(model_path, data, whole, tmp_path, make):
    path = begun(tmp_path / "cache", whole, (1, 2))
    make(partial_of(path) / "tokens-00000-of-00003.array_record")
    with pytest.raises(InputError, match=r"Token file .* is a (named pipe|folder); give a file"):
        export_tokens(model_path, data, path, crops=CROPS)


CHANGES = {
    "crops": ({"crops": 1}, {}),
    "seed": ({"seed": 1}, {}),
    "dtype": ({"dtype": "bfloat16"}, {}),
    "data.flip": ({}, {"flip": False}),
    "data.resize": ({}, {"resize": 1.5}),
    "count": ({"count": 33}, {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused_by_name_and_leave_all_as_it_is(model_path, data, whole, tmp_path, name):
    path = begun(tmp_path / "cache", whole, (0,))
    before = sorted(file.name for file in partial_of(path).iterdir())
    options, changes = CHANGES[name]
    with pytest.raises(InputError, match=rf"\.cache\.partial has a part .* with another {name}; remove it"):
        export_tokens(model_path, dataclasses.replace(data, **changes), path, **({"crops": CROPS} | options))
    assert sorted(file.name for file in partial_of(path).iterdir()) == before


def test_other_pictures_are_refused_and_a_moved_folder_is_not(model_path, data, whole, tmp_path):
    path = begun(tmp_path / "cache", whole, (0,))
    moved = dataclasses.replace(data, path=str(shutil.copytree(data.path, tmp_path / "moved")))
    file = tmp_path / "moved/class 1/39.png"
    file.rename(file.with_name("00.png"))
    with pytest.raises(InputError, match="with another pictures"):
        export_tokens(model_path, moved, path, crops=CROPS)
    file.with_name("00.png").rename(file)
    export_tokens(model_path, moved, path, crops=CROPS)
    assert records(path) == records(whole)


def test_a_finished_export_is_left_alone_and_never_overwritten(model_path, data, whole, coded):
    before = {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    assert export_tokens(model_path, data, whole, crops=CROPS) == COUNT
    with pytest.raises(InputError, match="exists already; remove it"):
        export_tokens(model_path, data, whole, crops=1)
    assert coded == []
    assert {file.name: file.stat().st_mtime_ns for file in whole.iterdir()} == before


def test_two_exports_at_a_time_do_not_write_one_cache(model_path, data, whole, tmp_path, coded):
    path = begun(tmp_path / "cache", whole, keep=[0])
    with lock.locked(partial_of(path)):
        before = sorted(partial_of(path).iterdir())
        with pytest.raises(InputError, match=rf"Another process exports tokens in .*: PID {os.getpid()} on .*, since "):
            export_tokens(model_path, data, path, crops=CROPS)
        assert sorted(partial_of(path).iterdir()) == before and not coded
    assert export_tokens(model_path, data, path, crops=CROPS) == COUNT
    assert {file.name for file in path.iterdir()} == {file.name for file in whole.iterdir()}


def test_the_lock_of_an_export_that_was_killed_is_taken_over(model_path, data, whole, tmp_path):
    path = begun(tmp_path / "cache", whole, keep=[0, 1])
    gone = lock.Lock(partial_of(path))._me | {"started": 1, "token": "another's"}
    (partial_of(path) / ".lock").write_text(json.dumps(gone))
    assert export_tokens(model_path, data, path, crops=CROPS) == COUNT
    assert records(path) == records(whole)
    assert {file.name for file in path.iterdir()} == {file.name for file in whole.iterdir()}


def test_an_export_that_could_not_begin_leaves_nothing(model_path, data, tmp_path, monkeypatch):
    def fail(*_):
        raise InputError("it cannot begin")

    monkeypatch.setattr(token_caches._Job, "begin", fail)
    with pytest.raises(InputError, match="it cannot begin"):
        export_tokens(model_path, data, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_an_exports_is_refused(model_path, data, tmp_path):
    partial_of(tmp_path / "cache").mkdir()
    (partial_of(tmp_path / "cache") / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=f"has files but no {MANIFEST}; remove it"):
        export_tokens(model_path, data, tmp_path / "cache", crops=CROPS)
    assert (partial_of(tmp_path / "cache") / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000, '{"crops"', '{"crops": ' + "1" * 5000 + "}"])
def test_a_damaged_manifest_is_a_sentence(model_path, data, whole, tmp_path, text):
    path = begun(tmp_path / "cache", whole, (0,))
    (partial_of(path) / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=rf"{MANIFEST} is not .*; remove .*cache.partial, or choose") as caught:
        export_tokens(model_path, data, path, crops=CROPS)
    assert "\n" not in str(caught.value)


def test_held_out_pictures_have_a_cache_of_their_own_inside(model_path, data, whole, tmp_path, coded):
    held = dataclasses.replace(data, held_out=0.3)
    count = export_tokens(model_path, held, tmp_path / "cache", crops=CROPS)
    training, validation = (TokenSource(tmp_path / "cache" / part) for part in ("", "validation"))
    assert len(training) == count and len(training) + len(validation) == COUNT and len(validation) > 1
    for part, source in (("train", training), ("validation", validation)):
        ((images, labels),) = pipeline.examples(held, TINY.image_size, crops=CROPS, part=part)
        expected = from_pretrained(model_path).tokenizer.encode(to_signed(images[0]))
        np.testing.assert_array_equal([example["tokens"][0] for example in source], expected)
        assert [example["label"] for example in source] == labels.tolist()
    begun(tmp_path / "again", tmp_path / "cache", range(SHARDS))
    (partial_of(tmp_path / "again") / "validation/cache.json").unlink()
    min((partial_of(tmp_path / "again") / "validation").glob("tokens-*")).unlink()
    coded.clear()
    export_tokens(model_path, held, tmp_path / "again", crops=CROPS)
    assert coded == list(range(len(validation)))
    for part in ("", "validation"):
        assert records(tmp_path / "again" / part) == records(tmp_path / "cache" / part)


def test_off_a_terminal_the_log_says_how_fast_it_goes(model_path, data, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hmar_jax"):
        export_tokens(model_path, data, tmp_path / "cache", count=5)
    (said,) = [message for message in caplog.messages if "pictures" in message]
    assert said.startswith("5 of 5 pictures are coded (") and said.endswith(" a second).")


@pytest.mark.parametrize(("count", "size"), [(1, 16), (1000, 16), (12_000, 188), (1_281_167, 4096)])
def test_shards_are_small_enough_for_many_processes_to_share(count, size):
    assert token_caches._shard_size(count) == size


def test_a_cache_from_before_the_dtype_was_recorded_is_float32(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "cache")
    header = json.loads((tmp_path / "cache/cache.json").read_text())
    assert header.pop("dtype") == "float32"
    del header["digest"], header["ends"]  # later still
    (tmp_path / "cache/cache.json").write_text(json.dumps(header))
    assert TokenSource(tmp_path / "cache").dtype == "float32"


@pytest.mark.parametrize(
    ("options", "said"), [({"dtype": "float16"}, "'float16'"), ({"batch_size": 0}, "batch_size=0")]
)
def test_what_cannot_be_is_named(model_path, data, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        export_tokens(model_path, data, tmp_path / "cache", **options)
    assert not list(tmp_path.iterdir())


def test_an_export_names_all_broken_pictures_or_leaves_them_out_and_lists_them(model_path, tmp_path, caplog):
    for i in range(6):
        file = tmp_path / f"pictures/class {i % 2}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (40 * i,) * 3).save(file)
        if i in (1, 2):
            file.write_bytes(b"")
    data, path = DataConfig("folder", path=str(tmp_path / "pictures")), tmp_path / "cache"
    with pytest.raises(InputError, match=r"^2 of 6 pictures cannot be used: .*/2\.png' cannot .*/1\.png' cannot "):
        export_tokens(model_path, data, path)
    assert export_tokens(model_path, dataclasses.replace(data, skip_broken=True), path) == 4
    source = TokenSource(path)
    assert [int(source[i]["label"]) for i in range(4)] == [0, 0, 1, 1]
    first, second = (path / BROKEN).read_text().splitlines()
    assert "2.png" in first
    assert "1.png" in second
