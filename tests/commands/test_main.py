"""The console script: what it does before any command runs."""

import errno
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hmar_jax.commands import main as script
from hmar_jax.commands import schedule, terminal
from hmar_jax.errors import DivergedError, InputError, MachineError, TransientError

NAMES = ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE")


@pytest.mark.parametrize(
    ("devices", "quiet"), [(set(), True), ({"/dev/accel*"}, False), ({"/dev/vfio/[0-9]*"}, False)], ids=str
)
def test_libtpu_is_kept_from_looking_for_a_tpu_only_where_there_is_none(monkeypatch, tmp_path, devices, quiet):
    monkeypatch.setattr(script.glob, "glob", lambda pattern: ["0"] if pattern in devices else [])
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in NAMES})
    assert script.main(["sample", f"--model={tmp_path}", "--labels=0", f"--output={tmp_path / 'out'}"]) == 2
    assert [name in os.environ for name in NAMES] == [quiet] * 3


@pytest.mark.parametrize("command", script.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"hmar-jax {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"), [(InputError, 2), (MachineError, 2), (DivergedError, 2), (TransientError, 1)]
)
def test_launchers_can_tell_what_may_pass_from_bad_input(monkeypatch, capsys, error, code):
    def run(argv):
        raise error("Something is amiss.")

    monkeypatch.setattr(schedule, "run", run)
    assert script.main(["schedule"]) == code
    assert capsys.readouterr().err == "hmar-jax schedule: Something is amiss.\n"


@pytest.mark.parametrize(("cause", "quiet"), [(OSError("full"), True), (None, False)])
def test_what_tensorstores_threads_say_after_a_failed_save_is_not_shown(monkeypatch, cause, quiet):
    def run(argv):
        raise InputError("Could not save.") from cause

    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    monkeypatch.setattr(schedule, "run", run)
    script.main(["schedule"])
    closed, other = (SimpleNamespace(exc_value=RuntimeError(said)) for said in ("Event loop is closed", "other"))
    sys.unraisablehook(closed)
    sys.unraisablehook(other)
    assert shown == ([other] if quiet else [closed, other])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left"),
            2,
            "It could not go on ([Errno 28] No space left); make room on that disk",
        ),
        (MemoryError(), 2, "It could not go on: this machine has too little memory; ask for less at a time."),
        (
            OSError(errno.EIO, "Input/output error"),
            1,
            "Input/output error); see whether its disk is there, and run the",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("a name"), 70, "this is a bug of hmar-jax 0.1.0; please report it, with the lines above."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_bug_shows_its_traceback_and_has_an_exit_code_of_its_own(monkeypatch, capsys, error, code, said):
    def run(argv):
        raise error

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to have it back
    monkeypatch.setattr(schedule, "run", run)
    assert script.main(["schedule"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("hmar-jax schedule: ")
    assert said in lines[-1]
    assert (lines[0] == "Traceback (most recent call last):") == (code == 70)
    assert len(lines) == 1 or code == 70


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("schedule list > /dev/full", 2, "No space left on device); make room"),
        ("--help > /dev/full", 2, "No space left on device); make room"),
        ("bench attention --help > /dev/full", 2, "No space left on device); make room"),
        ("--help > /dev/null", 0, ""),
        ("schedule list >&-", 0, ""),
        ("schedule list <&- >&- 2>&-", 0, ""),
        ("schedule show nothing 2>&-", 2, ""),
        ("schedule show nothing 2> /dev/full", 2, ""),
    ],
)
def test_an_output_that_cannot_be_written_is_a_sentence(command, code, said):
    done = subprocess.run(
        f"{sys.executable} -m hmar_jax {command}", shell=True, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)


@pytest.mark.parametrize("command", ["schedule list", "--help"])
def test_a_reader_that_has_gone_is_no_fault(command):
    pipe = f"({sys.executable} -m hmar_jax {command}; echo $? >&2) | true"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True, timeout=100, check=False)
    assert done.stderr == "141\n"


@pytest.mark.parametrize(("command", "code"), [("schedule list", 2), ("--help", 0)])
def test_a_current_folder_that_is_deleted_is_a_sentence(tmp_path, command, code):
    """Where libtpu is installed it would abort the process."""
    gone = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m hmar_jax {command}"
    path = os.pathsep.join(map(os.path.abspath, [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]))
    done = subprocess.run(
        gone, shell=True, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == code
    assert ("hmar-jax schedule: The current folder has been deleted; change to one" in done.stderr) == bool(code)
    assert "Traceback" not in done.stderr


def test_arguments_are_shown_cut_and_escaped(capsys):
    for argv in (["\x1b[2J\n" * 500], ["schedule", "\x1b[2J\n" * 500], ["sample", "--seed=" + "\n9" * 3000]):
        with pytest.raises(SystemExit) as stopped:
            script.main(argv)
        assert stopped.value.code == 2
        said = capsys.readouterr().err.removesuffix("\n").split("\n")
        assert all(line.isprintable() for line in said)
        assert len(said[-1]) < 400


def test_a_value_of_two_dashes_is_missed_by_name(capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["sample", "--model=m", "--labels=0", "--output=--"])
    assert stopped.value.code == 2
    assert "argument --output: expected a value, not --" in capsys.readouterr().err


def test_what_is_printed_and_logged_has_no_control_characters(capsys):
    terminal.say("one\x1b[2J\r\ntwo")
    assert capsys.readouterr().out == "one\\x1b[2J\\r\ntwo\n"
    record = logging.LogRecord("hmar_jax", logging.INFO, "", 0, "Replacing %s.", ("\x1b[2J\n" * 1000,), None)
    said = terminal.OneLine("%(message)s").format(record)
    assert said.isprintable()
    assert len(said) < 5000
