"""Damaged and hostile input of each family gives a result or an InputError, within bounds of time and memory.

A family is a file `family_X.py` here: hypothesis tests that pytest collects in a child process under limits. `--full`
tries many more examples, with new seeds at each run.
"""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MEMORY = 12 * 2**30  # addresses, of which JAX and its threads take some 4 GiB from the start
SECONDS = 240


def limit():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@pytest.mark.parametrize("family", sorted(file.stem for file in HERE.glob("family_*.py")))
def test_hostile_input_is_refused_or_right_within_bounds(family, request):
    full = request.config.getoption("--full")
    options = ["-p", "no:cacheprovider", "-q", "-x", "-o", f"faulthandler_timeout={SECONDS}", *(["--full"] * full)]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, HERE / f"{family}.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=3600 if full else SECONDS,
        preexec_fn=limit,
    )
    assert child.returncode == 0, child.stdout[-20_000:]
