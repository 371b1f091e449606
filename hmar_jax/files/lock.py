"""A folder that one process at a time may write: the file `.lock` in it names that process.

Whoever comes second is refused while the first lives, and takes its place when it is gone. On the same boot of the
same machine, the process is looked up. Elsewhere it lives as long as the file's time of modification moves: the holder
renews it every 30 s, and is gone when it has not for 5 minutes. Both times compared are the file system's, because the
clocks of machines differ.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hmar_jax.errors import HmarError, InputError, printable
from hmar_jax.files import json_files
from hmar_jax.files.paths import check_regular, read_bytes
from hmar_jax.files.refusals import writing

RENEWED, STALE = 30.0, 300.0  # seconds between renewals; without one, until the holder is taken for gone
POLL = 5.0
_LARGEST = 2**16  # bytes of the file, which has some 300
NAME = ".lock"  # of the file; others that are there for moments begin with it

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path, doing: str = "writes") -> Iterator[Lock]:
    """Holds a folder for the block, making it; waits up to 5 minutes where another machine may hold it.

    Args:
      doing: what the sentence says that the other process does, e.g. "trains".

    Raises:
      InputError: another process holds it, or it cannot be written.
    """
    lock = Lock(folder, doing)
    while not lock.take():
        time.sleep(POLL)
    with contextlib.closing(lock):
        yield lock


class Lock:
    """The lock of a folder, which `take` takes and `close` gives back; `locked` does both."""

    def __init__(self, folder: Path, doing: str = "writes"):
        self._folder, self._doing, self._file = folder, doing, folder / NAME
        self._me = {**_this_process(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), "token": uuid.uuid4().hex}
        # Token and time of a lock of another machine as first seen, and when that was by our own clock.
        self._seen: tuple[str, float, float] | None = None
        self._done = threading.Event()
        self._held = False

    def take(self) -> bool:
        """Takes the lock. False where its holder, on another machine, may live or not: ask again in some seconds.

        Raises:
          InputError: another process holds it, or the folder cannot be written.
        """
        with writing(self._file):
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._create():
                holder, modified = self._read()
                lives = self._lives(holder, modified)
                if lives:
                    raise InputError(
                        f"Another process {self._doing} in {self._folder}: {_named(holder)}, since "
                        f"{printable(str(holder.get('since', 'an unknown time')), 60)}; wait for it, end it, or choose "
                        "another folder."
                    )
                if lives is None or not self._take_over(holder):
                    return False
        self._held = True
        threading.Thread(target=self._renew, daemon=True, name="lock").start()
        return True

    def check(self) -> None:
        """Raises InputError where another process has taken the lock over, as after this one was held up for long."""
        holder, _ = self._read()
        if holder.get("token") != self._me["token"]:
            raise InputError(
                f"Another process {self._doing} in {self._folder} by now, as this one was not heard of for "
                f"{STALE / 60:.0f} minutes; let that one go on."
            )

    def close(self) -> None:
        """Gives the lock back, if it is still this process's."""
        self._done.set()
        with contextlib.suppress(OSError, HmarError):
            if self._held and self._read()[0].get("token") == self._me["token"]:
                self._file.unlink()
        self._held = False

    def _create(self) -> bool:
        """Makes the file; False where it is there. Of two that try at a time, one succeeds."""
        try:
            descriptor = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(json.dumps(self._me).encode() + b"\n")
        return True

    def _read(self) -> tuple[dict[str, Any], float | None]:
        """What the file says, {} where it is not whole, and when it was modified, None where it is not there.

        Raises:
          InputError: something else than a file is there.
        """
        try:
            check_regular(self._file, "Lock")
            modified = self._file.stat().st_mtime
            content = read_bytes(self._file, "Lock", _LARGEST)
        except FileNotFoundError:
            if self._file.is_symlink():
                raise InputError(f"Lock {self._file} is a link that leads nowhere; remove it.") from None
            return {}, None
        try:
            holder = json_files.parse(content, "Lock", "remove it")
        except InputError:
            return {}, modified
        return holder if isinstance(holder, dict) else {}, modified

    def _lives(self, holder: dict[str, Any], modified: float | None) -> bool | None:
        """Whether the holder of the lock lives; None where that is not known yet."""
        if modified is None:  # given back meanwhile
            return None
        if _here(holder, self._me):
            started = _started(holder.get("pid"))
            return started is not None and started == holder.get("started")
        token = holder.get("token", "")
        if self._seen is not None and self._seen[0] == token and modified > self._seen[1]:
            return True
        waited = time.monotonic() - self._seen[2] if self._seen is not None and self._seen[0] == token else 0.0
        if self._now() - modified > STALE or waited > STALE:  # its time may lie in the future
            return False
        if self._seen is None:
            wait = f"waiting up to {STALE:.0f} s to see whether that process still lives"
            logger.info("%s is held by %s; %s.", self._folder, _named(holder), wait)
        if self._seen is None or self._seen[0] != token:
            self._seen = token, modified, time.monotonic()
        return None

    def _now(self) -> float:
        """The file system's time."""
        probe = self._folder / f"{NAME}-{self._me['token']}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _take_over(self, holder: dict[str, Any]) -> bool:
        """Replaces the lock of a holder that is gone; False where another process is about to, or has."""
        guard = self._folder / f"{NAME}-taken-over"
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if abs(self._now() - guard.lstat().st_mtime) > STALE:  # whoever made it was killed
                    guard.unlink()
            return False
        try:
            if self._read()[0].get("token") == holder.get("token"):
                self._file.unlink(missing_ok=True)
            return self._create()
        finally:
            guard.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._done.wait(RENEWED):
            with contextlib.suppress(OSError, HmarError):  # the disk may come back
                if self._read()[0].get("token") == self._me["token"]:
                    os.utime(self._file)


def _named(holder: dict[str, Any]) -> str:
    """Which process holds a lock, as far as its file says so."""
    pid, host = holder.get("pid", "unknown"), holder.get("host", "an unknown host")
    return f"PID {printable(str(pid), 60)} on {printable(str(host), 60)}"


def _this_process() -> dict[str, Any]:
    """Host, boot, namespace of process numbers, number and start: no two processes agree in all of them."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")  # containers of one machine number their own
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace, "pid": pid, "started": _started(pid)}


def _here(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the holder's number can be looked up here."""
    names = ("boot", "namespace") if me["boot"] else ("host", "boot")
    return all(holder.get(name) == me[name] for name in names)


def is_running(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    return _started(pid) is not None


def _started(pid: Any) -> int | None:
    """When a process began, in ticks since the boot; 0 where the system does not say; None where there is none."""
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:  # it is another user's
        pass
    return 0
