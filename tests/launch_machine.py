"""A machine for the batteries of launch/: stand-ins for what the scripts call come first on its PATH.

A stand-in records its arguments, and runs the line of bash in the variable DO_NAME, if there is one.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASH = shutil.which("bash") or "bash"
CONFIG = "configs/imagenet256_d16.py:masked"
OVERRIDES = ("--config.accumulate=2", "--config.sample_labels=(1, 2)")
STAND_INS = ("gcloud", "xpk", "sbatch", "srun", "scontrol", "gcsfuse", "mountpoint", "python3", "uv", "sleep")
STAND_IN = """#!/bin/bash
IFS=$'\\037'; printf '%s\\n' "${0##*/}${1+$IFS$*}" >> "$CALLS"; unset IFS
line="DO_${0##*/}"; eval "${!line-}"
"""
# Undoes what a test run in the background inherits: bash cannot trap a signal that was ignored when it started.
HEED_SIGNALS = """
import os, signal, sys
for name in ("INT", "HUP", "TERM", "PIPE"):
    signal.signal(getattr(signal, "SIG" + name), signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Machine:
    """A home and a PATH on which the stand-ins come first."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin, self.home, self.data = folder / "bin", folder / "a home", folder / "data"
        for path in (self.bin, self.home, self.data):
            path.mkdir()
        for name in STAND_INS:
            self.executable(self.bin / name, STAND_IN)
        self.variables = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "CALLS": str(folder / "calls"),
            "DO_gcloud": 'case "$*" in *" describe "*) echo ACTIVE ;; esac',
            "DO_mountpoint": "exit 1",
            "A_TOKEN": "sesame",
        }

    @staticmethod
    def executable(path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, script: Path | str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-ISc", HEED_SIGNALS, BASH, str(ROOT / "launch" / script), *arguments],
            cwd=self.folder,
            env=self.variables | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: Path | str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def calls(self) -> list[list[str]]:
        """What the stand-ins were called with; without the pauses."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in (line.split("\x1f") for line in lines) if call[0] != "sleep"]


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Returns when the process has made the file."""
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def end(process: subprocess.Popen[str]) -> None:
    """Returns when the process has exited; what it started and left is killed."""
    try:
        process.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
