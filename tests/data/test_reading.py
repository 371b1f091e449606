"""What worker processes promise: they end with their parent, however it ends, and say what the machine lacks."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from hmar_jax.data.reading import Reader
from hmar_jax.errors import MachineError

# Workers import the script too, so that all of a test's shared memory has a name of its own.
_SCRIPT = """
import multiprocessing, os, resource, signal, sys, time
from multiprocessing import shared_memory
from grain._src.python.ipc import shared_memory_array
from hmar_jax.config import DataConfig
from hmar_jax.data.pipeline import batches
from hmar_jax.errors import MachineError

shared_memory._SHM_NAME_PREFIX = "/OWN"
if __name__ == "__mp_main__":
    IN_WORKERS
if __name__ == "__main__":
    data = batches(DataConfig(workers=2), batch_size=64, image_size=32, seed=0)
    try:
        next(data)
    except MachineError as error:
        sys.exit(f"{error.exit_code} {error}")
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


def started(tmp_path, in_workers="pass"):
    name = f"h{os.getpid()}_"  # Python's names have 14 letters in all
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.replace("OWN", name).replace("IN_WORKERS", in_workers))
    return name, subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def becomes_true(condition, seconds):
    """Whether the condition is met within so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_and_their_shared_memory_are_gone_after_their_parent_was_killed(tmp_path):
    name, parent = started(tmp_path)

    def shared():
        return [entry for entry in os.listdir("/dev/shm") if entry.startswith(name)]

    try:
        workers = [int(number) for number in parent.stdout.readline().split()]
        assert len(workers) == 2
        assert all(is_running(worker) for worker in workers)
        assert becomes_true(shared, 20)  # batches that were read ahead
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert becomes_true(lambda: not any(is_running(worker) for worker in workers), 20)
        assert becomes_true(lambda: not shared(), 20)
    finally:
        parent.kill()
        parent.communicate()


@pytest.mark.parametrize(
    ("in_workers", "said"),
    [
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))", r"shared memory \(\[Errno 27\]"),
        (
            "shared_memory_array.copy_to_shm = lambda *_, **__: os.kill(os.getpid(), signal.SIGBUS)",
            r"shared memory \(bus",
        ),
        ("shared_memory_array.copy_to_shm = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)", "want of memory"),
    ],
    ids=["refused", "bus-error", "killed"],
)
def test_a_machine_without_room_for_workers_is_one_sentence(tmp_path, in_workers, said):
    _, parent = started(tmp_path, in_workers)
    _, errors = parent.communicate(timeout=120)
    sentence = errors.splitlines()[-1] if errors else ""
    assert parent.returncode == 1
    assert re.search(rf"^2 .*{said}.*data\.workers", sentence), errors


def test_other_errors_of_a_source_stay_what_they_are():
    class Source:
        def __iter__(self):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as caught:
        Reader(Source())
    assert not isinstance(caught.value, MachineError)


_PASS = """
import time
from hmar_jax.config import DataConfig
from hmar_jax.data.pipeline import examples

if __name__ == "__main__":
    print(sum(len(labels) for _, labels in examples(DataConfig(workers=2), 32, batch_size=4, count=20)))
    time.sleep(1)  # a thread of grain's frees shared memory
"""


def test_a_pass_with_workers_ends_without_a_warning(tmp_path):
    (script := tmp_path / "script.py").write_text(_PASS)
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)
    assert (ran.stdout, ran.stderr) == ("20\n", "")
