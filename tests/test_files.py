"""Files appear whole or not at all, and a disk that refuses gets one sentence with the remedy."""

import errno
import os
from pathlib import Path

import pytest

from hmar_jax.errors import InputError
from hmar_jax.files import write_whole, writing


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
        with pytest.raises(InputError, match=r"Could not write .*/file \(.*No space left on device\); make room"):
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


ROOM = "make room on that disk and run the command again."
PATH = "check the path and its permissions."


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, ROOM),
        (errno.EDQUOT, ROOM),
        (errno.EFBIG, ROOM),
        (errno.EACCES, PATH),
        (errno.EROFS, PATH),
        (errno.EISDIR, PATH),
    ],
    ids=lambda value: errno.errorcode.get(value) if isinstance(value, int) else "",
)
def test_a_refusal_names_path_reason_and_remedy(number, expected):
    with pytest.raises(InputError) as error, writing(Path("some/file")):
        fail_with(number)()
    reason = f"[Errno {number}] {os.strerror(number)}"
    assert str(error.value) == f"Could not write some/file ({reason}); {expected}"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_what_is_no_refusal_of_the_disk_passes_through(kind):
    with pytest.raises(kind, match=r"a fault of ours\(\) failed"), writing(Path("file")):
        raise kind("a fault of ours() failed: it is")
