"""What a checkpoint promises: whole or not there, the newest few kept, and a sentence when it or the disk is bad."""

import dataclasses
import errno
import functools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import assert_bit_equal, describe, idle_steps, next_scale_config, steps_on_disk, tokenizer_config

from hmar_jax.commands import train
from hmar_jax.commands.main import main
from hmar_jax.errors import DivergedError, InputError, MachineError, TransientError
from hmar_jax.training import digests, loop
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.state import TrainState

# Of a read or write that failed, TensorStore and Orbax leave coroutines and futures behind that nobody waits for.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. (None|<coroutine):pytest.PytestUnraisableExceptionWarning"
)
CONFIG = tokenizer_config(seed=7)
HERE = Path(__file__).parent


def state(step, size=64):
    weights = jnp.asarray(np.random.default_rng(step).normal(size=size), jnp.float32)  # the same in any process
    key = jax.random.key_data(jax.random.key(0))
    return TrainState(jnp.int32(step), key, {"net": {"w": weights}}, {"net": {"w": -weights}}, {"mu": 2 * weights}, {})


def data(step):
    return {"examples": 8 * step, "class_names": ["A", "é"], "start": "sha:1"}


def fill(workdir, steps, keep=None):
    checkpoints = Checkpoints(workdir, keep)
    for step in steps:
        checkpoints.save(step, state(step), data(step), CONFIG)
    checkpoints.close()


def test_a_checkpoint_gives_back_state_data_and_config(tmp_path):
    fill(tmp_path, [3])
    checkpoints = Checkpoints(tmp_path)
    restored, position = checkpoints.restore(describe(state(0)))
    assert isinstance(restored, TrainState)
    assert_bit_equal(restored, state(3))
    assert position == data(3)
    assert checkpoints.config() == CONFIG
    checkpoints.close()


def test_the_newest_few_are_kept(tmp_path):
    fill(tmp_path, [1, 2, 3, 4, 5], keep=2)
    assert steps_on_disk(tmp_path) == {"4", "5"}
    assert Checkpoints(tmp_path).latest() == 5


def test_a_step_that_is_saved_is_not_saved_again(tmp_path):
    fill(tmp_path, [3])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "checkpoints").rglob("*")}
    fill(tmp_path, [3])
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "checkpoints").rglob("*")} == before


def test_an_empty_work_directory_has_no_latest(tmp_path):
    assert Checkpoints(tmp_path).latest() is None


def python(script, *arguments):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def test_a_save_is_asynchronous_and_one_killed_in_the_middle_is_never_chosen(tmp_path):
    died = python(
        """
        import os, signal
        from pathlib import Path
        from test_checkpoints import CONFIG, Checkpoints, data, state
        checkpoints = Checkpoints(Path(sys.argv[1]))
        checkpoints.save(2, state(2), data(2), CONFIG)
        checkpoints.wait()
        checkpoints.save(4, state(4, 2**25), data(4), CONFIG)  # 400 MB: save returns long before they are written
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    (half,) = steps_on_disk(tmp_path) - {"2"}
    assert half.startswith("4.")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 2
    assert_bit_equal(checkpoints.restore(describe(state(0)))[0], state(2))
    checkpoints.save(4, state(4), data(4), CONFIG)
    checkpoints.close()
    assert steps_on_disk(tmp_path) == {"2", "4"}


def truncate(folder):
    largest = max((file for file in (folder / "state").rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def scribble(folder):
    for file in (folder / "state").rglob("d/*"):
        file.write_bytes(bytes(b ^ 0x5A for b in file.read_bytes()))


DAMAGE = {
    "truncated": truncate,
    "overwritten": scribble,
    "without its manifest": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "without its metadata": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "without its state": lambda folder: shutil.rmtree(folder / "state"),
    "without its data position": lambda folder: shutil.rmtree(folder / "data"),
    "with a damaged data position": lambda folder: (folder / "data" / "metadata").write_text('{"examp'),
}


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    fill(workdir, [2, 4])
    return workdir


def flip_a_digit(name):
    def apply(folder):
        file = folder / name / "metadata"
        text = file.read_text()
        at = next(i for i, c in enumerate(text) if c.isdigit())
        file.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])

    return apply


def write_items(folder, name, text):
    (folder / name).write_text(text)


DAMAGE |= {
    f"with {text[:9]} for its {name}": functools.partial(write_items, name=name, text=text)
    for name in ("data/metadata", "config/metadata", "digests/metadata", "state/_METADATA")
    for text in ("7", "[]", "{}", "", "[" * 100_000, '{"a": ' + "1" * 5000 + "}")
}
DAMAGE |= {
    "with another digit in its data position": flip_a_digit("data"),
    "with another digit in its config": flip_a_digit("config"),
    "with another digit in its digests": flip_a_digit("digests"),
    "without its keys": lambda folder: shutil.rmtree(folder / "state" / "d"),
    "of another step": lambda folder: [
        shutil.rmtree(folder),
        shutil.copytree(folder.with_name("2"), folder),
    ],
}


def read_all(workdir):
    """All that a resumed run reads of the newest checkpoint."""
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.config(), checkpoints.position(), checkpoints.restore(describe(state(0)))[0]
    finally:
        checkpoints.close()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_can_be_gone_back_to(two_saved, tmp_path, damage):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "4"
    DAMAGE[damage](newest)
    with pytest.raises(InputError, match=r"cannot be read .*remove that folder to resume from step 2") as caught:
        read_all(tmp_path)
    assert str(newest) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert steps_on_disk(tmp_path) == {"2", "4"}

    shutil.rmtree(newest)  # as it says
    assert_bit_equal(Checkpoints(tmp_path).restore(describe(state(0)))[0], state(2))


@pytest.mark.parametrize("text", ["7", "[]", "[" * 100_000, '{"a": ' + "1" * 5000 + "}", '{"custom_metadata": 7}'])
def test_what_orbax_recorded_of_a_checkpoint_is_read_or_refused(two_saved, tmp_path, text):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text(text)
    with pytest.raises(InputError, match=r"checkpoints.* cannot be read.* remove that"):
        read_all(tmp_path)


def test_a_flipped_bit_of_a_value_is_told(tmp_path):
    checkpoints, saved = Checkpoints(tmp_path), state(4, size=1000)  # small values are kept in nodes with checksums
    checkpoints.save(2, state(2, size=1000), data(2), CONFIG)
    checkpoints.save(4, saved, data(4), CONFIG)
    checkpoints.close()
    told = 0
    for file in (tmp_path / "checkpoints" / "4" / "state").rglob("d/*"):
        content = file.read_bytes()
        for at in range(3, len(content), 499):
            file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            reader = Checkpoints(tmp_path)
            try:
                assert_bit_equal(reader.restore(describe(saved))[0], saved)  # it is a part that nothing is read from
            except InputError as error:
                assert re.search("checkpoints/4 cannot be read .*remove that folder to resume from step 2", str(error))
                told += "an array is not what was saved" in str(error)
            reader.close()
        file.write_bytes(content)
    assert told > 5  # which nothing but the digests tell


def test_a_checkpoint_from_before_digests_is_read(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "digests")
    config, position, restored = read_all(tmp_path)
    assert (config, position) == (CONFIG, data(4))
    assert_bit_equal(restored, state(4))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint32, jnp.int32, jnp.uint8])
def test_a_digest_tells_any_element_and_any_exchange_and_is_the_same_by_either_way(monkeypatch, dtype):
    array = jnp.arange(60).reshape(3, 4, 5).astype(dtype)
    changed = [array.at[i, j, k].add(1) for i in range(3) for j in range(4) for k in range(5)]
    negated = [array.at[0, 1].multiply(-1), array ^ 192 if array.dtype == jnp.uint8 else -array]
    exchanged = [array[::-1], array[:, ::-1], array[:, :, ::-1], array.at[0, 0, 0].set(1).at[0, 0, 1].set(0), *negated]
    by_numpy = digests.of_arrays([array, *changed, *exchanged])
    assert by_numpy.count(by_numpy[0]) == 1
    monkeypatch.setattr(digests, "_SMALL", 0)
    assert digests.of_arrays([array, *changed[:2], *exchanged]) == [*by_numpy[:3], *by_numpy[-6:]]


KINDS = {
    "a named pipe": (os.mkfifo, "is a named pipe"),
    "a folder": (os.mkdir, "cannot be read|is a folder|Is a directory"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "data/metadata", "state/_METADATA", "state/manifest.ocdbt"])
def test_what_is_no_file_in_a_checkpoint_is_refused(two_saved, tmp_path, name, kind):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoints" / "4" / name
    file.unlink()
    make, expected = KINDS[kind]
    make(file)
    with pytest.raises(InputError, match=f"checkpoints/4.*({expected})"):
        read_all(tmp_path)


def test_folders_that_are_links_are_read_and_what_is_no_file_in_them_is_refused(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints" / "4" / "state"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path)
    assert_bit_equal(read_all(tmp_path)[2], state(4))
    os.mkfifo(tmp_path / "elsewhere" / "pipe")
    with pytest.raises(InputError, match=r"checkpoints/4.*is a named pipe"):
        read_all(tmp_path)


@pytest.mark.parametrize("name", ["-1", "007", "1e9", "０", "²", "x"])
def test_a_folder_among_the_checkpoints_that_is_none_is_passed_over(two_saved, tmp_path, name):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / name).mkdir()
    assert_bit_equal(read_all(tmp_path)[2], state(4))


def test_what_the_disk_refuses_is_not_called_damage_nor_to_be_removed(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoints" / "4" / "state" / "manifest.ocdbt"
    manifest.unlink()
    manifest.symlink_to(manifest)  # too many levels of them: a refusal that root gets too
    with pytest.raises(InputError, match=r"checkpoints/4 could not be read: .*; a symbolic link leads to itself"):
        Checkpoints(tmp_path).restore(describe(state(0)))


# What Orbax, TensorStore and JAX raise, and what becomes of it: a sentence of this kind, or, for a bug, the same again.
FAILURES = {
    "a barrier that times out": (
        jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: orbax_save::1. Timed out tasks: 3"),
        (TransientError, r"another process of the job has gone or is late; run the command again\."),
    ),
    "a coordinator that has gone": (
        jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses"),
        (TransientError, "another process of the job"),
    ),
    "a peer that was preempted": (
        RuntimeError("INTERNAL: The tasks have crashed: coordination service agent is in an error state"),
        (TransientError, "another process of the job"),
    ),
    "a peer that died in a collective": (
        jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:4711"),
        (TransientError, "another process of the job"),
    ),
    "a device that is full": (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."),
        (MachineError, "the device has too little memory; lower batch_size, raise accumulate, set remat='all'"),
    ),
    "a machine that is full": (MemoryError(), (MachineError, "this machine has too little memory; lower batch_size")),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), (MachineError, "make room on that disk")),
    "a full disk, as TensorStore says it": (
        ValueError("RESOURCE_EXHAUSTED: Error writing file: Failed to write [os_error_code='28'] [source locations=x]"),
        (MachineError, "No space left on device.*make room on that disk"),
    ),
    "no permission": (PermissionError(errno.EACCES, "Permission denied"), (InputError, "check the path and its perm")),
    "a folder that has gone": (FileNotFoundError(errno.ENOENT, "No such file"), (InputError, "check the path and its")),
    "a disk that fails": (OSError(errno.EIO, "Input/output error"), (TransientError, "see whether its disk is there")),
    "a stale handle": (
        ValueError("FAILED_PRECONDITION: Error reading [os_error_code='116']"),
        (TransientError, "Stale file handle.*see whether its disk is there"),
    ),
    "too many files": (OSError(errno.EMFILE, "Too many open files"), (MachineError, "raise the limit of open files")),
    "a timeout": (TimeoutError(), (TransientError, "run the command again")),
    "a bug": (ValueError("Destination exists already."), None),
    "a bug in a program": (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Executable expected parameter 0"), None),
    "another bug": (RuntimeError("deque mutated during iteration"), None),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "as a cause"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", ["save", "wait_until_finished", "close"])
def test_what_fails_a_save_is_told_apart(tmp_path, monkeypatch, method, failure, wrapped):
    error, expected = FAILURES[failure]
    if wrapped and (expected is None or isinstance(error, FileNotFoundError)):
        return
    checkpoints = Checkpoints(tmp_path)

    def fail(*_, **__):
        if wrapped:
            raise ValueError("A save failed.") from error
        raise error

    monkeypatch.setattr(checkpoints._manager, method, fail)
    calls = {
        "save": lambda: checkpoints.save(4, state(4), data(4), CONFIG),
        "wait_until_finished": checkpoints.wait,
        "close": checkpoints.close,
    }
    if expected is None:
        with pytest.raises(type(error)) as caught:
            calls[method]()
        assert caught.value is error
        return
    with pytest.raises(expected[0], match=expected[1]) as caught:
        calls[method]()
    assert type(caught.value) is expected[0]
    assert "\n" not in str(caught.value)
    assert "checkpoints/" in str(caught.value)


@pytest.mark.parametrize(
    "failure", ["a disk that fails", "a stale handle", "a barrier that times out", "a device that is full"]
)
def test_what_fails_a_restore_is_not_called_damage(two_saved, monkeypatch, failure):
    error, (kind, expected) = FAILURES[failure]
    checkpoints = Checkpoints(two_saved)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    with pytest.raises(kind, match=f"checkpoints/4 could not be read .*{expected}"):
        checkpoints.restore(describe(state(0)))


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (*FAILURES["a device that is full"][:1], 2, "hmar-jax train: Training in .*tells what fits."),
        (MemoryError(), 2, "this machine has too little memory; lower batch_size"),
        (*FAILURES["a peer that died in a collective"][:1], 1, "another process of the job has gone or is late"),
        (*FAILURES["a bug in a program"][:1], 70, "Traceback(.*\n)*.*this is a bug of hmar-jax .*; please report it"),
    ],
    ids=["device memory", "memory", "a peer", "a bug"],
)
def test_what_fails_a_step_is_told_apart_by_sentence_and_exit_code(
    starts, tmp_path, monkeypatch, capsys, error, code, expected
):
    def fail(*_):
        raise error

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to have it back
    monkeypatch.setattr(loop, "jit_train_step", lambda *_: fail)
    monkeypatch.setattr(train, "load", lambda *_: next_scale_config(starts))
    assert main(["train", "--config=x", f"--workdir={tmp_path}", "--no-distributed"]) == code
    said = capsys.readouterr().err
    assert re.search(expected, said)
    assert ("Traceback" in said) == (code == 70)
    assert said.splitlines()[-1].startswith("hmar-jax train: ")


def test_the_only_checkpoint_being_damaged_means_to_start_anew(tmp_path):
    fill(tmp_path, [4])
    truncate(tmp_path / "checkpoints" / "4")
    with pytest.raises(InputError, match="remove that folder to start anew"):
        Checkpoints(tmp_path).restore(describe(state(0)))


@pytest.mark.parametrize(
    "other",
    [state(0, size=32), dataclasses.replace(state(0), ema={}), dataclasses.replace(state(0), params={"net": {}})],
    ids=["other shapes", "no averages", "fewer parameters"],
)
def test_a_state_of_another_config_is_refused_without_advice_to_remove_it(tmp_path, other):
    fill(tmp_path, [4])
    with pytest.raises(InputError, match="checkpoints/4 was saved under a config with other parameters") as caught:
        Checkpoints(tmp_path).restore(describe(other))
    assert "remove" not in str(caught.value)


def test_training_and_export_say_that_a_checkpoint_is_damaged(starts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "make_train_step", idle_steps())
    file = tmp_path / "config.py"
    file.write_text(
        "from pathlib import Path\nfrom tiny_training import next_scale_config\n"
        "from hmar_jax.config import to_config_dict\n"
        f"def get_config():\n    return to_config_dict(next_scale_config(Path({str(starts)!r}), steps=4))\n"
    )
    workdir = tmp_path / "run"
    assert main(["train", f"--config={file}", f"--workdir={workdir}"]) == 0
    model = (workdir / "model" / "model.safetensors").read_bytes()
    truncate(workdir / "checkpoints" / "4")
    capsys.readouterr()
    for command in (
        ["train", f"--config={file}", f"--workdir={workdir}", "--config.steps=6"],
        ["export", "model", f"--workdir={workdir}", f"--output={tmp_path / 'out'}"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"hmar-jax {command[0]}: Checkpoint {workdir / 'checkpoints' / '4'} cannot be read")
        assert said.endswith("remove that folder to resume from step 2.")
    assert not (tmp_path / "out").exists()
    assert steps_on_disk(workdir) == {"2", "4"}
    assert (workdir / "model" / "model.safetensors").read_bytes() == model


def test_a_full_disk_stops_training_with_a_sentence_and_keeps_what_was_saved(starts, tmp_path, monkeypatch):
    died = python(
        """
        import asyncio, resource
        from pathlib import Path
        from tiny_training import idle_steps, next_scale_config
        from hmar_jax.commands import main, train
        from hmar_jax.training import digests, loop
        from hmar_jax.training.checkpoint import Checkpoints

        save = Checkpoints.save
        def save_on_a_full_disk(self, step, *rest):
            if step == 4:
                self.wait()
                unheard = [asyncio.sleep(0)]  # as Orbax leaves them, depending on which of its threads is first
                unheard.append(unheard)
                resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            save(self, step, *rest)

        Checkpoints.save = save_on_a_full_disk
        loop.make_train_step = idle_steps()
        train.load = lambda *_: next_scale_config(Path(sys.argv[1]), steps=6)
        sys.exit(main.main(["train", "--config=x", "--workdir=" + sys.argv[2]]))
        """,
        starts,
        tmp_path,
    )
    assert died.returncode == 2, died.stderr
    (said,) = (line for line in died.stderr.splitlines() if line.startswith("hmar-jax train: "))
    assert said.startswith(f"hmar-jax train: Could not save checkpoint {tmp_path / 'checkpoints' / '4'} (")
    assert "File too large); make room on that disk and run the command again." in said
    assert "Traceback" not in died.stderr
    assert "'sleep' was never awaited" not in died.stderr
    assert Checkpoints(tmp_path).latest() == 2
    assert not (tmp_path / "model").exists()

    monkeypatch.setattr(loop, "make_train_step", idle_steps())
    loop.train(next_scale_config(starts, steps=6), tmp_path)
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert steps_on_disk(tmp_path) == {"4", "6"}


def spoil(name, at):
    return lambda step, metrics: metrics | {name: jnp.where(step == at, jnp.nan, metrics[name])}


NUMBERS = r"\(numbers (\d+, ){7}\d+ of its source\)"


@pytest.mark.parametrize(
    ("name", "at", "expected"),
    [
        (
            "loss",
            4,
            rf"The loss is nan at step 4, examples 24 to 31 of the data {NUMBERS}; .*checkpoints/2\.",
        ),
        (
            "gradient_norm",
            4,
            rf"The gradient is nan at step 4, examples 24 to 31 of the data {NUMBERS}; .*checkpoints/2\.",
        ),
        (
            "loss",
            1,
            rf"The loss is nan at step 1, examples 0 to 7 of the data {NUMBERS}; none is saved yet\.",
        ),
        ("loss", 5, r"The loss is nan at step 5, .*checkpoints/4\."),  # the last step
    ],
)
def test_what_is_not_finite_stops_the_run_before_it_is_saved(starts, tmp_path, monkeypatch, name, at, expected):
    monkeypatch.setattr(loop, "make_train_step", idle_steps(spoil(name, at)))
    config = next_scale_config(starts)
    with pytest.raises(DivergedError, match=expected):
        loop.train(config, tmp_path)
    assert Checkpoints(tmp_path).latest() == (None if at == 1 else at - 2 + at % 2)
    assert not (tmp_path / "model").exists()

    monkeypatch.setattr(loop, "make_train_step", idle_steps())  # the fault is gone: the last good one serves
    loop.train(config, tmp_path)
    assert (tmp_path / "model").exists()


def test_what_is_not_finite_is_found_in_the_data_after_another_batch_size_too(starts, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", idle_steps(spoil("loss", 4)))
    loop.train(next_scale_config(starts, steps=2), tmp_path)
    with pytest.raises(DivergedError, match="The loss is nan at step 4, examples 32 to 47 of the data"):
        loop.train(next_scale_config(starts, batch_size=16), tmp_path)


def test_a_step_is_saved_whatever_becomes_of_its_samples(starts, tmp_path, monkeypatch):
    def full(step, params):
        raise InputError("no room for samples")

    monkeypatch.setattr(loop, "make_train_step", idle_steps())
    monkeypatch.setattr(loop, "SampleWriter", lambda *_: full)
    with pytest.raises(InputError, match="no room for samples"):
        loop.train(next_scale_config(starts, sample_every=2, sample_labels=(0,)), tmp_path)
    assert Checkpoints(tmp_path).latest() == 2


def test_a_parameter_that_is_not_finite_stops_the_run(starts, tmp_path, monkeypatch):
    config = next_scale_config(starts)
    make = loop.make_objective

    def poisoned(*arguments):
        objective = make(*arguments)
        init = objective.init

        def init_with_nan(start, first):
            parts = init(start, first)
            word = parts.trained["transformer"]["word_bias"]
            parts.trained["transformer"]["word_bias"] = word.at[0].set(jnp.nan)
            return parts

        objective.init = init_with_nan
        return objective

    monkeypatch.setattr(loop, "make_objective", poisoned)
    with pytest.raises(DivergedError, match="The loss is nan at step 1"):
        loop.train(config, tmp_path)
    assert steps_on_disk(tmp_path) == set()


def test_the_parameters_are_listed_at_the_start_and_a_resumed_run_says_so(starts, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "make_train_step", idle_steps())
    caplog.set_level(logging.INFO, "hmar_jax")
    loop.train(next_scale_config(starts, steps=2), tmp_path)
    assert "transformer/next_scale/head/linear/kernel" in caplog.text
    assert all(map(str.isprintable, caplog.messages))
    assert "Resuming" not in caplog.text
    caplog.clear()
    loop.train(next_scale_config(starts, steps=3), tmp_path)
    assert "Resuming from step 2" in caplog.text
