"""Files as they come: with more than a state dict, large; refused and killed in the middle.

PyTorch's own format: test_torch_files.py.
"""

import errno
import math
import os
import re
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from official_files import (
    KINDS,
    LADDER,
    assert_bit_equal,
    file_of,
    file_of_zeros,
    official_shapes,
    random_state,
    stored,
)

from hmar_jax import InputError, from_pretrained
from hmar_jax.errors import MachineError
from hmar_jax.formats import safetensors_files
from hmar_jax.formats.convert import convert, export_torch

BUFFERS = {
    "lvl_1L": np.zeros((1, 30), np.int64),
    "attn_bias_for_masking": np.full((1, 1, 30, 30), -np.inf, np.float32),
    "blocks.0.attn.zero_k_bias": np.zeros(8, np.float32),
    "blocks.3.attn.zero_k_bias": np.zeros(8, np.float32),
    "quantize.ema_vocab_hit_SV": np.ones((4, 64), np.float32),
}


# --- what is in a file beside the parameters


@pytest.fixture
def converted(small_tokenizer, tmp_path):
    """(kind, all arrays of a file, **options) → the arrays of its model directory."""

    def run(kind, arrays, **options):
        tokenizer = None if kind == "vae" else small_tokenizer
        out = tmp_path / f"{len(os.listdir(tmp_path))}"
        file = file_of(tmp_path / f"{out.name}.safetensors", arrays)
        return stored(convert(kind, file, LADDER, out, tokenizer=tokenizer, **options))

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_are_ignored(converted, kind):
    state = random_state(kind)
    assert_bit_equal(converted(kind, state | BUFFERS), converted(kind, state))


# (where the state dict is, where another one is, --key)
KEYS = [("model", None, None), ("trainer.ema", None, None), ("ema", "model", "ema"), ("", "ema", "")]


def nested(state, key):
    return {f"{key}.{name}" if key else name: array for name, array in state.items()}


@pytest.mark.parametrize(("key", "other", "chosen"), KEYS)
def test_a_state_dict_is_found_in_a_training_checkpoint(converted, key, other, chosen):
    state = random_state("var")
    beside = {} if other is None else nested(random_state("var", seed=1), other)
    if key:
        beside |= {f"optimizer.state.{name}.exp_avg": np.ones(3, np.float32) for name in range(3)}
    assert_bit_equal(converted("var", beside | nested(state | BUFFERS, key), key=chosen), converted("var", state))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64], ids=["bfloat16", "float16", "float64"])
def test_files_of_other_types_become_float32(converted, dtype):
    state = random_state("vae")
    found = converted("vae", {name: array.astype(dtype) for name, array in state.items()})
    expected = {name: array.astype(dtype).astype(np.float32) for name, array in converted("vae", state).items()}
    assert_bit_equal(found, expected)


@pytest.mark.parametrize("name", ["\udc80", "a\n## b\n", "\x1b[2J", "ö"], ids=ascii)
def test_a_file_and_a_folder_may_have_any_name(tmp_path, name):
    """A name of bytes that are no UTF-8 has half surrogate pairs in Python, which no UTF-8 file can hold."""
    source = file_of(tmp_path / f"x{name}.safetensors", random_state("vae"))
    out = convert("vae", source, LADDER, tmp_path / f"y{name}")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "converted by hmar-jax from x" in card
    assert not {"\x1b", "## b"} & {*card, *card.splitlines()}
    export_torch(out, tmp_path / f"z{name}.safetensors")
    assert (tmp_path / f"z{name}.safetensors").stat().st_size == source.stat().st_size


# --- refused writes, memory, death


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Interrupted()], ids=["full", "interrupted"])
@pytest.mark.parametrize("command", [convert, export_torch])
def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch, small_tokenizer, command, error):
    source = file_of(tmp_path / "vae.safetensors", random_state("vae"))
    arrays = []

    def fail(array):
        arrays.append(array)
        if len(arrays) == 9:
            raise error
        return memoryview(array.tobytes())

    monkeypatch.setattr(safetensors_files, "_bytes", fail)
    output = tmp_path / "out.safetensors"
    arguments = ("vae", source, LADDER, output) if command is convert else (small_tokenizer, output)
    with pytest.raises(MachineError if isinstance(error, OSError) else Interrupted) as raised:
        command(*arguments)
    assert os.listdir(tmp_path) == ["vae.safetensors"]
    if isinstance(error, OSError):
        assert re.fullmatch(r"Could not write .*No space left\); make room on that disk .*\.", str(raised.value))


_MEASURED = """
import sys
from pathlib import Path
from hmar_jax.formats.convert import convert, export_torch
from hmar_jax.scales import ScaleLadder

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

def growth(work):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = status("VmRSS")
    work()
    print(status("VmHWM") - before)

folder, ladder = Path(sys.argv[1]), ScaleLadder((1, 2, 3, 4))
convert("vae", folder / "vae.safetensors", ladder, folder / "vae")
arguments = ["hmar", folder / "hmar.safetensors", ladder]
convert("hmar", folder / "small.safetensors", ladder, folder / "small", tokenizer=folder / "vae")  # warm
growth(lambda: convert(*arguments, folder / "hmar", tokenizer=folder / "vae"))
growth(lambda: export_torch(folder / "hmar", folder / "back.safetensors"))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is measured as Linux has it")
def test_a_large_file_passes_through_little_memory(tmp_path):
    shapes = official_shapes("hmar", width=384, heads=6, depth=8)
    file_of_zeros(tmp_path / "vae.safetensors", official_shapes("vae"))
    file_of_zeros(tmp_path / "small.safetensors", official_shapes("hmar"))
    size = file_of_zeros(tmp_path / "hmar.safetensors", shapes).stat().st_size / 2**20
    largest = max(map(math.prod, shapes.values())) * 4 / 2**20
    command = [sys.executable, "-c", _MEASURED, tmp_path]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    growths = [float(line) for line in finished.stdout.split()]
    assert len(growths) == 2
    assert size > 100
    assert max(growths) < 4 * largest + 8 < size / 4


_KILLED = """
import os, signal, sys
from pathlib import Path
from hmar_jax.formats import convert, model_card, model_directory, safetensors_files
from hmar_jax.scales import ScaleLadder

folder, point = Path(sys.argv[1]), sys.argv[2]
module, name, calls = {
    "among the arrays": (safetensors_files, "_bytes", 20),
    "before the model card": (model_card, "write", 1),
    "in the config": (Path, "write_text", 2),
    "before the renaming": (model_directory, "swap_in", 1),
}[point]
original = getattr(module, name)

def die(*args, **options):
    global calls
    calls -= 1
    if calls:
        return original(*args, **options)
    if point == "in the config":
        original(args[0], args[1][:100])
    os.kill(os.getpid(), signal.SIGKILL)

setattr(module, name, die)
convert.convert("vae", folder / "vae.safetensors", ScaleLadder((1, 2, 3, 4)), folder / "out" / "model")
"""
_POINTS = re.findall(r'"([\w ]+)": \(', _KILLED)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """point → the folder of a conversion that was killed there; all at once, for time."""
    folders = {point: tmp_path_factory.mktemp("killed") for point in _POINTS}
    running = []
    for point, folder in folders.items():
        file_of_zeros(folder / "vae.safetensors", official_shapes("vae"))
        running.append(subprocess.Popen([sys.executable, "-c", _KILLED, folder, point]))
    assert [process.wait(timeout=300) for process in running] == [-signal.SIGKILL] * len(_POINTS)
    return folders


@pytest.mark.parametrize("point", _POINTS)
def test_a_killed_conversion_leaves_nothing_that_looks_whole(killed, point):
    folder = killed[point] / "out"
    assert not (folder / "model").exists()
    (left,) = folder.iterdir()
    assert left.name == ".model.partial"
    if point != "before the renaming":  # where all is there but the name
        with pytest.raises(InputError, match=r"is not a model directory|is not JSON"):
            from_pretrained(left)
    again = convert("vae", killed[point] / "vae.safetensors", LADDER, folder / "model")
    assert not any(array.any() for array in stored(again).values())
    assert os.listdir(folder) == ["model"]
