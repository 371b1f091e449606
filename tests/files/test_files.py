"""Files appear whole or not at all, and a disk that refuses gets one sentence with the remedy."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hmar_jax.config import load
from hmar_jax.data.folder import decode
from hmar_jax.data.tokens import TokenSource
from hmar_jax.errors import HmarError, InputError, MachineError, TransientError
from hmar_jax.files import (
    check_files,
    check_folder,
    check_pictures,
    check_refusal,
    is_there,
    local_path,
    put_back,
    reading,
    same_file,
    swap_in,
    whole_files,
    write_whole,
    writing,
)
from hmar_jax.formats import pytorch_files, safetensors_files
from hmar_jax.formats.lpips_files import load_perceptual
from hmar_jax.formats.model_directory import read_config
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder


def fail_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def half_written(number):
    """A stand-in for `Path.write_bytes` that stops in the middle."""

    def write(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        fail_with(number)()

    return write


def test_a_file_is_written_in_a_folder_made_for_it(tmp_path):
    file = tmp_path / "a" / "b" / "file.bin"
    assert write_whole(file, b"\x00new") == file
    assert file.read_bytes() == b"\x00new"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("other")], ids=["pipe", "folder", "link"]
)
def test_what_stands_where_a_file_is_written_first_is_replaced(tmp_path, make):
    """A link would have what it leads to overwritten, a pipe would be waited for."""
    file, other = tmp_path / "file", tmp_path / "other"
    other.write_bytes(b"kept")
    make(tmp_path / ".file.partial")
    write_whole(file, b"new")
    assert (file.read_bytes(), other.read_bytes()) == (b"new", b"kept")
    assert not file.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_the_old_file_stands_until_the_new_one_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    file, replace, sync, seen = tmp_path / "file", os.replace, os.fsync, []
    file.write_bytes(b"old")

    def watched_sync(descriptor):
        sync(descriptor)
        seen.append(os.fstat(descriptor).st_ino)

    def watched_replace(source, target):
        assert seen == [os.stat(source).st_ino]
        seen.append((Path(source).read_bytes(), Path(target).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_whole(file, b"the new one")
    assert seen[1:] == [(b"the new one", b"old")]
    assert file.read_bytes() == b"the new one"


@pytest.mark.parametrize("there", [True, False], ids=["over a file", "anew"])
@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, at, there):
    file = tmp_path / "file"
    if there:
        file.write_bytes(b"old")
    with monkeypatch.context() as patch:
        if at == "write":
            patch.setattr(Path, "write_bytes", half_written(errno.ENOSPC))
        else:
            patch.setattr(os, at, fail_with(errno.ENOSPC))
        with pytest.raises(MachineError, match=r"Could not write .*/file \(.*No space left on device\); make room"):
            write_whole(file, b"the new one")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == ({"file": b"old"} if there else {})


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"the new one")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("taken", ["a file for a folder", "a folder for a file"])
def test_a_path_that_is_something_else_is_named(tmp_path, taken):
    if taken == "a file for a folder":
        (tmp_path / "run").write_bytes(b"mine")
        file = tmp_path / "run" / "file"
    else:
        file = tmp_path / "run"
        file.mkdir()
    before = list(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        write_whole(file, b"new")
    assert str(error.value).startswith(f"Could not write {file} (")
    assert str(error.value).endswith("; check the path and its permissions.")
    assert list(tmp_path.rglob("*")) == before


ROOM = MachineError, "make room on that disk and run the command again."
PATH = InputError, "check the path and its permissions."
AWAY = TransientError, "see whether its disk is there, and run the command again."


@pytest.mark.parametrize(("block", "verb"), [(writing, "write"), (reading, "read")])
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, ROOM),
        (errno.EDQUOT, ROOM),
        (errno.EFBIG, ROOM),
        (errno.EACCES, PATH),
        (errno.EROFS, PATH),
        (errno.EISDIR, PATH),
        (errno.EIO, AWAY),
        (errno.ESTALE, AWAY),
        (errno.ENOTCONN, AWAY),
    ],
    ids=lambda value: errno.errorcode.get(value) if isinstance(value, int) else "",
)
def test_a_refusal_names_path_reason_and_remedy(number, expected, block, verb):
    with pytest.raises(HmarError) as error, block(Path("some/file")):
        fail_with(number)()
    reason = f"[Errno {number}] {os.strerror(number)}"
    assert type(error.value) is expected[0]
    assert str(error.value) == f"Could not {verb} some/file ({reason}); {expected[1]}"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_what_is_no_refusal_of_the_disk_passes_through(kind):
    with pytest.raises(kind, match=r"a fault of ours\(\) failed"), writing(Path("file")):
        raise kind("a fault of ours() failed: it is")


# --- paths as users write them


@pytest.mark.parametrize("url", ["gs://b/x", "s3://b", "http://h/x", "file:///x", "hdfs://n:9000/x", "GS://b/x"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_no_path(url, kind):
    with pytest.raises(InputError, match=r"--output is '.*', a URL; expected a path on this machine, so mount"):
        local_path(kind(url), "--output")


def test_a_tilde_is_a_home_and_other_paths_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~", "x") == tmp_path
    assert local_path(Path("~/a"), "x") == tmp_path / "a"
    for same in ("a/~", "a:b", "./a", "/a//b", "c.py:masked"):
        assert local_path(same, "x") == Path(same)
    with pytest.raises(InputError, match=r"x is '~no-such-user/a', and there is no such user here; write the whole"):
        local_path("~no-such-user/a", "x")


def test_nothing_is_no_path():
    with pytest.raises(InputError, match=r"^--output is 'a\\ud800', which has half a character; expected a path\.$"):
        local_path("a\ud800", "--output")
    with pytest.raises(InputError, match=r"^--output is empty; expected a path\.$"):
        local_path("", "--output")


@pytest.mark.parametrize("below", ["", "sub", "a/b/c"])
def test_a_folder_below_a_file_or_behind_a_lock_is_refused_before_anything_is_written(tmp_path, monkeypatch, below):
    check_folder("--output", tmp_path / "new" / below)
    assert list(tmp_path.iterdir()) == []
    (file := tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"^--output is {file / below}, but {file} is a file; choose another folder"):
        check_folder("--output", file / below)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=rf"but {tmp_path} may not be written; check its permissions\.$"):
        check_folder("--output", tmp_path / "new" / below)
    with pytest.raises(InputError, match=r"^--output .*File name too long.*; check the path, which is too long\.$"):
        check_folder("--output", tmp_path / ("x" * 300) / below)


def test_a_file_to_be_written_is_no_folder(tmp_path):
    check_files("--output", [tmp_path / "a.png"])
    with pytest.raises(InputError, match=rf"^--json names {tmp_path}, which is a folder; give a file\.$"):
        check_files("--json", [tmp_path])


def test_two_paths_of_one_file_are_known_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("a")
    (tmp_path / "soft").symlink_to("a")
    os.link(tmp_path / "a", tmp_path / "hard")
    (tmp_path / "folder").mkdir()
    for other in ("a", "./a", "folder/../a", "soft", "hard", tmp_path / "a"):
        assert same_file(tmp_path / "a", other)
    assert same_file("new", tmp_path / "folder" / ".." / "new")  # not there yet
    (tmp_path / "b").write_text("a")
    assert not same_file("a", "b")
    assert not same_file("a", "none")


def test_what_may_not_be_looked_at_is_not_called_absent(tmp_path, monkeypatch):
    assert not is_there(tmp_path / "none", "File")
    (tmp_path / "file").write_text("")
    assert is_there(tmp_path / "file", "File")
    assert not is_there(tmp_path / "file" / "x", "File")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"File .*loop could not be read .*; a symbolic link leads to itself"):
        is_there(tmp_path / "loop", "File")
    with pytest.raises(InputError, match="check the path, which is too long"):
        is_there(tmp_path / ("x" * 300), "File")
    monkeypatch.setattr(Path, "stat", fail_with(errno.EACCES))
    with pytest.raises(
        InputError, match=r"File .*/file may not be read \(.*Permission denied\); check its permissions"
    ):
        is_there(tmp_path / "file", "File")


READERS = {
    "safetensors": lambda file: safetensors_files.File(file),
    "PyTorch": lambda file: pytorch_files.File(file),
    "perceptual weights": lambda file: load_perceptual(file),
    "a picture": lambda file: decode(file, f"Picture {file}"),
    "a token cache": lambda file: TokenSource(file.parent),
    "a schedule": lambda file: Schedule.parse(str(file), ScaleLadder((1, 2))),
    "a config": lambda file: load(str(file)),
    "a model": lambda file: read_config(file.parent),
}
NAMES = {"a schedule": "s.json", "a token cache": "cache.json", "a model": "config.json", "a config": "c.py"}


@pytest.mark.parametrize("how", ["closed", "refused"])  # root may read closed files
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_may_not_be_read_is_not_called_absent(tmp_path, monkeypatch, reader, how):
    if how == "closed" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    if reader == "PyTorch":
        pytest.importorskip("torch")
    file = tmp_path / NAMES.get(reader, "file.safetensors")
    file.write_bytes(b"x")
    file.chmod(0)
    opened = io.open

    def refuse(path, *arguments, **options):
        if str(path).startswith(str(tmp_path)):
            fail_with(errno.EACCES)()
        return opened(path, *arguments, **options)

    opened_number = os.open

    def refuse_number(path, *arguments, **options):
        if str(path).startswith(str(tmp_path)):
            fail_with(errno.EACCES)()
        return opened_number(path, *arguments, **options)

    if how == "refused":
        monkeypatch.setattr(io, "open", refuse)
        monkeypatch.setattr("builtins.open", refuse)
        monkeypatch.setattr(os, "open", refuse_number)
    with pytest.raises(InputError) as error:
        READERS[reader](file)
    assert "Permission denied" in str(error.value)
    assert "does not exist" not in str(error.value)


@pytest.mark.parametrize(
    ("number", "kind", "expected"),
    [
        (
            errno.EISDIR,
            InputError,
            r"It could not be read \(Is a directory\); give a file, not a folder\.",
        ),
        (errno.ELOOP, InputError, "a symbolic link leads to itself, so make it anew"),
        (errno.ENAMETOOLONG, InputError, "check the path, which is too long"),
        (errno.EACCES, InputError, "It may not be read"),
        (errno.EIO, TransientError, "It could not be read"),
        (errno.ESTALE, TransientError, "It could not be read"),
    ],
)
def test_a_wrong_path_does_not_pass_by_itself(number, kind, expected):
    with pytest.raises(kind, match=expected):
        check_refusal("It", OSError(number, os.strerror(number)))


# --- folders that take another's place

_SWAP = """
import os, sys
from pathlib import Path
from hmar_jax.files import swap_in, whole_files
new, path, step, exchanges = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
if not exchanges:
    whole_files._exchange = lambda one, other: False
calls = 0
def stop(function):
    def call(*arguments, **options):
        global calls
        if calls == step:
            os._exit(9)
        calls += 1
        result = function(*arguments, **options)
        if calls == step:
            os._exit(9)
        return result
    return call
os.rename, os.mkdir, os.unlink, os.rmdir = map(stop, (os.rename, os.mkdir, os.unlink, os.rmdir))
whole_files._exchange = stop(whole_files._exchange)
swap_in(new, path)
"""


@pytest.mark.parametrize("exchanges", [True, False], ids=["in one step", "in two"])
@pytest.mark.parametrize("step", range(7))
def test_a_folder_is_there_whole_wherever_its_replacement_is_killed(tmp_path, step, exchanges):
    path, new = tmp_path / "model", tmp_path / ".model.partial"
    for folder, content in ((path, "old"), (new, "new")):
        folder.mkdir()
        for name in ("a", "b"):
            (folder / name).write_text(content)
    command = [sys.executable, "-c", _SWAP, new, path, str(step), str(exchanges)]
    assert subprocess.run(command, timeout=60, check=False).returncode in (0, 9)
    if exchanges:
        assert path.is_dir()
    put_back(path)  # what every reader and writer does first
    contents = {(path / name).read_text() for name in ("a", "b")}
    assert contents in ({"old"}, {"new"})
    again = tmp_path / ".model.partial"
    if not again.exists():
        again.mkdir()
        (again / "a").write_text("newer")
    swap_in(again, path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_link_gives_way_to_a_folder_and_what_it_led_to_stays(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(whole_files, "_exchange", lambda one, other: False)
    for name in ("elsewhere", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    (tmp_path / "model").symlink_to("elsewhere")
    swap_in(tmp_path / "new", tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == "new"
    assert (tmp_path / "elsewhere" / "a").read_text() == "elsewhere"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["elsewhere", "model"]


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, os.mkdir, lambda path: path.symlink_to(path)])
def test_whatever_is_in_the_place_of_a_folder_is_replaced_by_it(tmp_path, make):
    make(tmp_path / "model")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    swap_in(tmp_path / "new", tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["file"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "kind", ["a pipe", "a folder", "a device", "a link to itself", "other content", "a name too long"]
)
def test_what_is_of_another_kind_is_not_replaced_nor_waited_for(tmp_path, kind):
    file = tmp_path / "x.png"
    match kind:
        case "a pipe":
            os.mkfifo(file)
        case "a folder":
            file.mkdir()
        case "a device":
            file.symlink_to("/dev/zero")
        case "a link to itself":
            file.symlink_to(file)
        case "other content":
            file.write_bytes(b"mine")
        case "a name too long":
            file = tmp_path / ("A" * 249 + ".png")  # with the name that it is written by
    with pytest.raises(InputError):
        check_files("--output", [file])
        check_pictures("--output", [file])


def test_a_picture_is_replaced_by_a_picture(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    check_pictures("--output", [tmp_path / "x.png", tmp_path / "new.png"])
