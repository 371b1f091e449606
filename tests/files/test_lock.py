"""One process at a time writes a folder; the lock of one that is gone is taken over, whatever numbers repeat."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from hmar_jax.errors import InputError
from hmar_jax.files import lock
from hmar_jax.files.lock import STALE, Lock, locked

HOLD = """
import sys, time
from pathlib import Path
from hmar_jax.files.lock import locked
with locked(Path(sys.argv[1]), "trains"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def held_by(folder, **changes):
    """Writes the lock of a process that is not this one."""
    me = Lock(folder)._me
    (folder / ".lock").write_text(json.dumps(me | {"token": "other"} | changes))


def aged(folder, seconds):
    then = time.time() - seconds
    os.utime(folder / ".lock", (then, then))


def test_the_folder_is_made_held_and_given_back(tmp_path):
    with locked(tmp_path / "a" / "run") as held:
        held.check()
        assert json.loads((tmp_path / "a" / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert list((tmp_path / "a" / "run").iterdir()) == []


def test_it_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert Lock(tmp_path).take()


def test_a_second_process_is_refused_while_the_first_lives_and_takes_over_when_it_was_killed(tmp_path, holder):
    expected = rf"Another process trains in {tmp_path}: PID {holder.pid} on .*, since \d{{4}}-\d\d-\d\d .*; wait for it"
    with pytest.raises(InputError, match=expected) as caught, locked(tmp_path, "trains"):
        pass
    assert "\n" not in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path, "trains"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    "changes",
    [
        {"started": 1},
        {"pid": 2**22 + 1, "started": 1},
        {"pid": "x"},
        {"pid": -1},
        {"pid": 0, "started": None},
        {"pid": 2**63, "started": None},
        {"pid": [1], "started": None},
    ],
    ids=["a number that repeats", "no such process", "no number", "a group", "all", "a huge number", "a list"],
)
def test_on_the_same_boot_the_process_itself_is_looked_up(tmp_path, changes):
    held_by(tmp_path, **changes)
    assert Lock(tmp_path).take()


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"namespace": "pid:[1]"}], ids=["boot", "container"])
def test_elsewhere_it_is_gone_after_five_minutes_without_renewal(tmp_path, changes):
    held_by(tmp_path, pid=1, started=1, **changes)
    second = Lock(tmp_path)
    assert not second.take()
    aged(tmp_path, STALE - 20)
    assert not second.take()
    aged(tmp_path, STALE + 20)
    assert second.take()
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_elsewhere_it_lives_when_it_is_renewed(tmp_path):
    held_by(tmp_path, boot="another", host="tpu-3", pid=17)
    aged(tmp_path, 100)
    second = Lock(tmp_path, "trains")
    assert not second.take()
    aged(tmp_path, 70)
    with pytest.raises(InputError, match=r"trains in .*: PID 17 on tpu-3"):
        second.take()


def test_elsewhere_it_is_gone_after_five_minutes_whatever_its_time_is(tmp_path, monkeypatch):
    held_by(tmp_path, boot="another")
    aged(tmp_path, -10 * STALE)
    (tmp_path / ".lock-taken-over").touch()
    os.utime(tmp_path / ".lock-taken-over", (2**32, 2**32))
    second = Lock(tmp_path)
    assert not second.take()
    start = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: start + STALE - 20)
    assert not second.take()
    monkeypatch.setattr(time, "monotonic", lambda: start + STALE + 20)
    assert not second.take()  # but removes what another one that took over left
    assert second.take()
    second.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff", b'{"pid": null}', b"[" * 9999])
def test_a_file_that_is_not_whole_is_taken_over_when_it_is_old(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    second = Lock(tmp_path)
    assert not second.take()
    aged(tmp_path, STALE + 20)
    assert second.take()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "is a named pipe"),
        (os.mkdir, "is a folder"),
        (lambda p: p.symlink_to(p), "link leads to itself"),
        (lambda p: p.symlink_to("no"), "link that leads nowhere"),
    ],
)
def test_a_lock_that_is_no_file_is_refused_and_stays(tmp_path, make, kind):
    make(tmp_path / ".lock")
    with pytest.raises(InputError, match=kind), locked(tmp_path):
        pass
    assert os.path.lexists(tmp_path / ".lock")


def test_what_a_lock_says_is_shown_in_one_short_line(tmp_path, holder):
    held = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(held | {"host": "\x1b[2J" * 1000, "since": ["\n" * 5000]}))
    with pytest.raises(InputError, match=f"PID {holder.pid} on ") as caught, locked(tmp_path, "trains"):
        pass
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_the_holder_renews_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEWED", 0.01)
    with locked(tmp_path):
        aged(tmp_path, 100)
        deadline = time.monotonic() + 30
        while time.time() - (tmp_path / ".lock").stat().st_mtime > 50:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_holder_that_was_held_up_finds_that_another_has_taken_over_and_leaves_its_lock(tmp_path):
    first = Lock(tmp_path, "trains")
    assert first.take()
    held_by(tmp_path, boot="another")
    with pytest.raises(InputError, match=r"Another process trains in .* by now"):
        first.check()
    first.close()
    assert json.loads((tmp_path / ".lock").read_text())["token"] == "other"


@pytest.mark.parametrize("left", ["none", "of one that is gone"])
def test_of_many_that_start_at_a_time_one_wins(tmp_path, left):
    if left != "none":
        held_by(tmp_path, started=1)
    code = """
    import sys, time
    from pathlib import Path
    from hmar_jax.errors import InputError
    from hmar_jax.files.lock import Lock
    time.sleep(max(0, float(sys.argv[2]) - time.time()))
    held, deadline = Lock(Path(sys.argv[1])), time.time() + 20
    try:
        while not held.take() and time.time() < deadline:
            time.sleep(0.02)
        print("won", flush=True)
        sys.stdin.read()
    except InputError:
        print("refused", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(time.time() + 3)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(6)]
    said = [process.stdout.readline().strip() for process in started]
    for process in started:
        process.communicate()
    assert sorted(said) == ["refused"] * 5 + ["won"]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(InputError, match=r"Could not write .*file/run/\.lock .*; check the path"),
        locked(tmp_path / "file" / "run"),
    ):
        pass
