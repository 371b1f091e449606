"""Damaged and hostile input of each family gives a result or an InputError, within bounds of time and memory.

A family is a file `family_X.py` here: hypothesis tests that pytest collects in a child process under limits. `--full`
tries many more examples, with new seeds at each run.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# 12 GiB of addresses, of which JAX and its threads take some 4 from the start. The shell sets it, because a
# `preexec_fn` would fork this process, in which JAX may have threads.
LIMITED = f'ulimit -v {12 * 2**20} -c 0 && exec "$@"'
SECONDS = 240


@pytest.mark.parametrize("family", sorted(file.stem for file in HERE.glob("family_*.py")))
def test_hostile_input_is_refused_or_right_within_bounds(family, request):
    full = request.config.getoption("--full")
    options = ["-p", "no:cacheprovider", "-q", "-x", "-o", f"faulthandler_timeout={SECONDS}", *(["--full"] * full)]
    child = subprocess.run(
        ["bash", "-c", LIMITED, "bash", sys.executable, "-m", "pytest", *options, HERE / f"{family}.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=3600 if full else SECONDS,
    )
    assert child.returncode == 0, child.stdout[-20_000:]
