"""Many samples into a directory: each a function of its class and index, there once and whole, whatever was killed."""

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image
from tiny_models import lively_model, tiny

from hmar_jax import progress_bar
from hmar_jax.bulk import samples
from hmar_jax.config import MeshConfig
from hmar_jax.errors import InputError, MachineError
from hmar_jax.files import lock
from hmar_jax.parallel import sharding
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder

HERE = Path(__file__).parent
CONFIG = dataclasses.replace(tiny(depth=2, width=16, heads=2), ladder=ScaleLadder((1, 2)))  # quick to compile
SCHEDULE = Schedule.from_counts([[1], [4]])
SETTINGS = samples.Settings("a test's", CONFIG, "float32", SCHEDULE, seed=7)
KINDS = ("png", "array_record")
ALL, EACH, BATCH = range(5), 13, 4  # 65 samples in 17 batches, the last of one
SLOW = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from test_samples import write_slowly
write_slowly(Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def model():
    return lively_model(CONFIG)


def draw(network, folder, labels=ALL, per_class=EACH, batch=BATCH, stop=lambda _: False, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        return samples.sample_classes(network, settings, labels, per_class, folder, batch=batch, stop=stop)


def read(folder):
    """(label, index) → tokens, and the bytes of the picture; fails where something is twice, or half, or not ours."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    del files["samples.json"]
    found = {}
    for name in sorted(name for name in files if name.startswith("tokens/")):
        with np.load(files.pop(name)) as part:
            labels, indices, tokens = part["labels"], part["indices"], part["tokens"]
        assert tokens.dtype == np.uint16
        assert name == f"tokens/{indices[0] * 5 + labels[0]:010}.npz"
        records = files.pop(name.replace("tokens", "pictures").replace("npz", "array_record"), None)
        records = records and ArrayRecordDataSource([str(records)])
        for row, at in enumerate(zip(labels.tolist(), indices.tolist(), strict=True)):
            assert at not in found
            png = records[row] if records else files.pop("pictures/{}/{:05}.png".format(*at)).read_bytes()
            found[at] = tokens[row].tobytes(), png
    assert not files
    return found


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Format → what a run that nothing stopped has written."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("whole") / kind
        assert draw(model, folder, pictures=kind) == 65
        made[kind] = read(folder)
    return made


def test_every_sample_is_there_once_and_the_formats_hold_the_same(whole):
    assert set(whole["png"]) == set(itertools.product(ALL, range(EACH)))
    assert whole["png"] == whole["array_record"]
    assert len({tokens for tokens, _ in whole["png"].values()}) > 60  # no seed came twice


def test_a_sample_is_the_models_own_of_that_number(model, whole):
    labels, indices = np.array([0, 4, 2, 4]), np.array([0, 12, 7, 3])
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        out = model.sample(labels, SCHEDULE, seed=7, numbers=indices * 5 + labels)
    for row, at in enumerate(zip(labels.tolist(), indices.tolist(), strict=True)):
        tokens, png = whole["png"][at]
        np.testing.assert_array_equal(np.frombuffer(tokens, np.uint16), out.tokens[row])
        with Image.open(io.BytesIO(png)) as picture:
            np.testing.assert_allclose(np.asarray(picture) / 255, out.images[row], atol=0.502 / 255)


def tokens_of(samples):
    return {at: tokens for at, (tokens, _) in samples.items()}


def test_neither_batch_nor_order_nor_number_of_classes_changes_a_sample(model, whole, tmp_path):
    assert draw(model, tmp_path / "some", labels=[3, 1, 3], per_class=2, batch=3) == 4
    some = read(tmp_path / "some")
    assert set(some) == {(1, 0), (1, 1), (3, 0), (3, 1)}
    assert draw(model, tmp_path / "some") == 61  # the same directory takes more classes and more of each
    assert draw(model, tmp_path / "some", labels=[0], per_class=1) == 0
    assert tokens_of(read(tmp_path / "some")) == tokens_of(whole["png"])


def test_the_last_batch_compiles_nothing(model, tmp_path):
    before = samples._sample._cache_size()
    assert draw(model, tmp_path, per_class=1) == 5  # four and one
    assert draw(model, tmp_path, per_class=2, labels=[0, 1, 2, 3]) == 4
    assert samples._sample._cache_size() == before


def test_the_next_batch_is_under_way_before_one_is_written(model, tmp_path, monkeypatch):
    happened = []

    def noted(what, function):
        return lambda *arguments: (happened.append(what), function(*arguments))[1]

    monkeypatch.setattr(samples, "_sample", noted("dispatch", samples._sample))
    monkeypatch.setattr(samples._Folder, "write", noted("write", samples._Folder.write))
    draw(model, tmp_path / "out", per_class=3)
    assert happened == ["dispatch", "dispatch", "write", "dispatch", "write", "dispatch", "write", "write"]


# --- stopped and killed


def test_a_run_that_is_told_to_stop_finishes_its_batch_and_goes_on_later(model, whole, tmp_path):
    asked = []
    assert draw(model, tmp_path, stop=lambda batch: asked.append(batch) or batch == 2) is None
    assert asked == [1, 2]
    there = sum(len(np.load(file)["labels"]) for file in tmp_path.glob("tokens/*.npz"))
    assert there == 2 * BATCH
    assert draw(model, tmp_path) == 65 - there
    assert read(tmp_path) == whole["png"]


def write_slowly(folder):
    """Runs that are slow at writing, so that they are caught at it."""
    replace = os.replace

    def slowly(*names):
        time.sleep(0.002)
        replace(*names)

    os.replace = slowly
    for kind in KINDS:
        draw(lively_model(CONFIG), folder / kind, pictures=kind)


def child(*arguments, devices=1):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": flags}, **options)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Format → copies of a directory at random moments of a run, as a kill leaves it; in the end it is killed."""
    base, copies, rng = tmp_path_factory.mktemp("killed"), {kind: [] for kind in KINDS}, np.random.default_rng(0)
    process = child("-c", SLOW, HERE, HERE.parent, base)
    try:
        for kind in KINDS:
            while not (base / kind / "pictures").exists():
                assert process.poll() is None, process.stderr.read()[-3000:]
                time.sleep(0.001)
            while len(list((base / kind).glob("tokens/*.npz"))) < 15 and process.poll() is None:
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                copy = base / f"{kind}-{len(copies[kind])}"
                copies[kind].append(Path(shutil.copytree(base / kind, copy)))
                process.send_signal(signal.SIGCONT)
                time.sleep(rng.uniform(0, 0.02))
    finally:
        process.kill()
        process.communicate()
    copies["array_record"].append(base / "array_record")
    return copies


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_and_nothing_tells_it_from_one_that_was_not(killed, model, whole, kind):
    copies = killed[kind]
    assert len(copies) > 4
    unfinished = 0
    for copy in copies[:: max(len(copies) // 8, 1)]:
        there = sum(len(np.load(file)["labels"]) for file in copy.glob("tokens/*.npz"))
        with_pictures = len([*copy.glob("pictures/*/*.png")]) or 4 * len([*copy.glob("pictures/*.array_record")])
        unfinished += with_pictures != there or any(copy.rglob("*.partial"))
        assert draw(model, copy, pictures=kind) == 65 - there
        assert read(copy) == whole[kind]
    assert unfinished > 0


def test_two_processes_of_four_devices_write_what_one_of_one_device_does(model, whole, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (tmp_path / "schedule.json").write_text(SCHEDULE.to_json())
    command = ["-m", "hmar_jax", "sample", "--model", model.save(tmp_path / "model", source="a test"), "--classes=all"]
    command += ["--schedule", tmp_path / "schedule.json", "--seed=7", f"--per-class={EACH}", "--batch=1"]
    command += ["--output", tmp_path / "out", f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    both = [child(*command, f"--process={i}", devices=4) for i in range(2)]
    said = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [out.count("65 pictures, 13 of each of 5 classes") for out, _ in said] == [1, 0]
    parts = list((tmp_path / "out").glob("tokens/*.npz"))
    assert len(parts) == 8 * 2 + 1  # the ninth batch, of one sample, is the first process's
    found = read(tmp_path / "out")
    assert tokens_of(found) == tokens_of(whole["png"])
    for at, (_, png) in found.items():
        ours, theirs = (np.asarray(Image.open(io.BytesIO(content)), int) for content in (png, whole["png"][at][1]))
        assert np.abs(ours - theirs).max() <= 1


def test_a_full_disk_is_a_sentence_and_what_was_written_stands(model, whole, tmp_path, monkeypatch):
    left, replace = iter(range(23)), os.replace

    def fail(*names):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*names)

    for kind in KINDS:
        left = iter(range(23))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(MachineError, match=r"Could not write .* make room on that disk and run") as caught:
                draw(model, tmp_path / kind, pictures=kind)
        assert "\n" not in str(caught.value)
        assert not [*(tmp_path / kind).rglob("*.partial")]
        assert 0 < draw(model, tmp_path / kind, pictures=kind) < 65
        assert read(tmp_path / kind) == whole[kind]


def test_samples_whose_files_are_gone_or_damaged_are_drawn_again(model, whole, tmp_path):
    for kind in KINDS:
        folder = tmp_path / kind
        draw(model, folder, pictures=kind)
        manifest = (folder / "samples.json").stat().st_ino
        tokens, pictures = (sorted(files for files in (folder / name).rglob("*.*")) for name in ("tokens", "pictures"))
        tokens[1].unlink()
        tokens[2].write_bytes(tokens[2].read_bytes()[:100])
        tokens[3].write_bytes(b"")
        flipped = bytearray(tokens[4].read_bytes())
        flipped[flipped.index(b"tokens.npy") + 150] ^= 1
        tokens[4].write_bytes(flipped)
        pictures[-1].unlink()
        assert draw(model, folder, pictures=kind) == 4 * 4 + 1
        assert read(folder) == whole[kind]
        assert (folder / "samples.json").stat().st_ino == manifest  # that is not written again


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_picture_is_drawn_again(model, whole, tmp_path, kind):
    draw(model, tmp_path, pictures=kind)
    first, second = sorted(file for file in (tmp_path / "pictures").rglob("*.*"))[:2]
    first.write_bytes(b"")
    if kind == "png":
        second.write_bytes(second.read_bytes()[:-5])  # cut short
    assert 4 <= draw(model, tmp_path, pictures=kind) <= 8
    assert read(tmp_path) == whole[kind]


def test_samples_that_are_gone_in_the_end_are_missed(model, whole, tmp_path, monkeypatch):
    write = samples._Folder.write

    def write_elsewhere(self, part, pool):
        """As a process that does not share the directory, or beside a run that takes this one's pictures for lost."""
        self.path = tmp_path / "elsewhere" if 3 in part.labels else tmp_path / "out"
        write(self, part, pool)

    with monkeypatch.context() as patch:
        patch.setattr(samples._Folder, "write", write_elsewhere)
        expected = (
            r"\d+ of the 65 samples are not in .*/out; let all processes share it, end other runs into it, and run"
        )
        with pytest.raises(InputError, match=expected):
            draw(model, tmp_path / "out")
    assert draw(model, tmp_path / "out") > 0
    assert read(tmp_path / "out") == whole["png"]


def test_off_a_terminal_the_log_has_a_line_a_minute(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, "hmar_jax"):
        draw(model, tmp_path, per_class=2)
        assert [message.split(" (")[0] for message in caplog.messages] == ["4 of 10 pictures are written"]
        monkeypatch.setattr(progress_bar, "_LOG_SECONDS", 0)
        draw(model, tmp_path, per_class=3)
    said = [re.sub(r"\(\S+ a second\)", "(RATE)", message) for message in caplog.messages[1:]]
    assert said == [f"{done} of 15 pictures are written (RATE)." for done in (14, 15)]


def test_samples_of_a_format_are_the_same_for_good(whole):
    tokens = b"".join(tokens for _, tokens in sorted(tokens_of(whole["png"]).items()))
    # Where samples have to change, raise the format with them: a directory of other ones is not gone on with.
    assert (samples.FORMAT, hashlib.sha256(tokens).hexdigest()[:12]) == (2, "09b1f0064e6f")


# --- what is refused, and leaves everything as it was


def contents(folder):
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"weights": "others"}, "weights"),
        ({"model": dataclasses.replace(CONFIG, class_names=tuple("fghij"))}, "model"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"schedule": SCHEDULE.replace(top_k=3)}, "schedule"),
        ({"seed": 8, "greedy": True}, "seed and greedy"),
        ({"pictures": "array_record"}, "pictures"),
        ({"format": 1}, "format"),
    ],
)
def test_a_directory_of_other_settings_is_refused(model, tmp_path, settings, named):
    draw(model, tmp_path / "out", per_class=1)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"out has samples with another {named}; choose a new directory, or"):
        draw(model, tmp_path / "out", **settings)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"labels": [0, 5]}, "Label 5 is out of range; this model has classes 0 to 4"),
        ({"labels": [-1]}, "Label -1 is out of range"),
        ({"per_class": 0}, "0 per class were asked for; expected 1 to 429496729"),
        ({"per_class": 10**9}, "1000000000 per class were asked for"),
        ({"batch": 0}, "batch is 0; expected 1 to"),
        ({"seed": -1}, "seed is -1; expected 0 to 4294967295"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model, tmp_path, options, expected):
    with pytest.raises(InputError, match=expected):
        draw(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_other_things_is_refused(model, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for path, expected in ((tmp_path, "has files but no samples.json"), (tmp_path / "file", "cannot be read .*Not a")):
        with pytest.raises(InputError, match=expected):
            draw(model, path)
    assert contents(tmp_path) == before


def test_a_directory_that_another_process_writes_is_refused_until_that_one_is_gone(model, tmp_path):
    draw(model, tmp_path, per_class=1)
    with lock.locked(tmp_path):
        before = contents(tmp_path)
        with pytest.raises(InputError, match=rf"Another process writes samples in .*: PID {os.getpid()} on .*, since "):
            draw(model, tmp_path, per_class=2)
        assert contents(tmp_path) == before
    (tmp_path / ".lock").write_text(json.dumps(lock.Lock(tmp_path)._me | {"started": 1, "token": "another's"}))
    assert draw(model, tmp_path, per_class=2) == 5
    assert not (tmp_path / ".lock").exists()


def test_a_directory_with_hidden_files_only_is_empty(model, tmp_path):
    for name in (".DS_Store", ".nfs000000000000001", ".gitkeep"):
        (tmp_path / name).write_text("theirs")
    (tmp_path / ".cache").mkdir()
    assert draw(model, tmp_path, per_class=1) == 5
    assert (tmp_path / ".DS_Store").read_text() == "theirs"


def test_what_cannot_be_read_is_named_and_notes_are_left_alone(model, tmp_path):
    draw(model, tmp_path, per_class=1)
    for note in ("notes.txt", "pictures/grid.png", "tokens/README", "tokens/best.npz", "pictures/0/best.png"):
        (tmp_path / note).write_text("mine")
    draw(model, tmp_path, per_class=1)
    assert (tmp_path / "pictures" / "0" / "best.png").read_text() == (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "tokens" / "1234567890.npz").mkdir()
    with pytest.raises(InputError, match=r"1234567890.npz could not be read .*; give a file, not a folder"):
        draw(model, tmp_path, per_class=1)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(InputError, match=r"samples\.json cannot be read"):
        draw(model, tmp_path, per_class=1)
