"""Files as they come: with more than a state dict, of PyTorch, large; refused and killed in the middle."""

import argparse
import errno
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import types

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
    refusal,
    stored,
)

from hmar_jax import InputError, from_pretrained, tensors
from hmar_jax.convert import convert, export_torch

BUFFERS = {
    "lvl_1L": np.zeros((1, 30), np.int64),
    "attn_bias_for_masking": np.full((1, 1, 30, 30), -np.inf, np.float32),
    "blocks.0.attn.zero_k_bias": np.zeros(8, np.float32),
    "blocks.3.attn.zero_k_bias": np.zeros(8, np.float32),
    "quantize.ema_vocab_hit_SV": np.ones((4, 64), np.float32),
}


@pytest.fixture
def refused(tmp_path):
    """Runs what is to be refused and leaves nothing; its sentence, `tmp_path/` left out."""
    return lambda work, *args: refusal(tmp_path, lambda: work(*args))


@pytest.fixture
def refused_file(refused, tmp_path):
    return lambda file: refused(convert, "vae", file, LADDER, tmp_path / "out")


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


# --- files of PyTorch


class Tensor:
    """What is asked of a torch.Tensor; it gives its values as NumPy's only when detached and float32."""

    def __init__(self, array, detached=False):
        self._array, self.shape, self._detached = array, array.shape, detached

    def detach(self):
        return Tensor(self._array, True)

    def is_floating_point(self):
        return self._array.dtype.kind == "f"

    def float(self):
        return Tensor(self._array.astype(np.float32), self._detached)

    def numpy(self):
        assert self._detached
        assert self._array.dtype == np.float32
        return self._array


def from_numpy(array):
    assert array.flags.writeable  # PyTorch warns of others
    return Tensor(array)


@pytest.fixture
def torch(monkeypatch):
    """Stands for PyTorch; `calls` are what `load` was asked for."""
    module = types.ModuleType("torch")
    module.Tensor, module.from_numpy, module.calls = Tensor, from_numpy, []

    def load(path, **options):
        module.calls.append(options)
        content = path.read_bytes()
        if content.startswith(b"old") and options.get("mmap"):
            raise RuntimeError("mmap can only be used with files saved with `torch.save(_use_new_zipfile_serialization")
        return pickle.loads(content.removeprefix(b"old"))

    module.load, module.save = load, lambda state, path: path.write_bytes(pickle.dumps(state))
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def as_tensors(state, dtype=np.float32):
    return {name: Tensor(array.astype(dtype)) for name, array in state.items()}


SAFE, MAPPED = {"map_location": "cpu", "weights_only": True}, {"mmap": True}


@pytest.mark.parametrize("ending", ["pth", "pt", "ckpt", "bin"])
@pytest.mark.parametrize(("start", "asked"), [(b"", [SAFE | MAPPED]), (b"old", [SAFE | MAPPED, SAFE])], ids=["", "old"])
def test_a_torch_file_is_read_safely_and_mapped(torch, tmp_path, small_tokenizer, start, asked, ending):
    content = {"epoch": 3, "optimizer": {0: Tensor(np.ones(2))}, "model": {"ema": as_tensors(random_state("vae"))}}
    file = tmp_path / f"vae.{ending}"
    file.write_bytes(start + pickle.dumps(content))
    assert_bit_equal(stored(convert("vae", file, LADDER, tmp_path / "vae")), stored(small_tokenizer))
    assert torch.calls == asked


def test_a_quantised_torch_file_is_refused(torch, refused_file, tmp_path):
    zeros = {name: np.zeros(shape) for name, shape in official_shapes("vae").items()}
    (tmp_path / "vae.pth").write_bytes(pickle.dumps(as_tensors(zeros, np.int8)))
    assert refused_file(tmp_path / "vae.pth").startswith("vae.pth has decoder.conv_in.bias in whole numbers; ")


def test_a_torch_file_comes_back_bit_for_bit(torch, tmp_path, small_tokenizer):
    assert export_torch(small_tokenizer, tmp_path / "vae.pth") == "vae"
    assert_bit_equal(stored(convert("vae", tmp_path / "vae.pth", LADDER, tmp_path / "vae")), stored(small_tokenizer))


# As PyTorch 2.13 raises them.
ADVICE = (
    "Weights only load failed. This file can still be loaded, to do so you have two options, \x1b[1mdo those steps "
    "only if you trust the source of the checkpoint\x1b[0m. \n\t(1) Re-running `torch.load` with `weights_only` set to "
    "`False` will likely succeed\n\tWeightsUnpickler error: Unsupported global: GLOBAL argparse.Namespace"
)
UNREADABLE = {
    "not allowed": pickle.UnpicklingError(ADVICE),
    "cut": RuntimeError(
        "PytorchStreamReader failed reading zip archive: failed finding central directory. Is it whole?"
    ),
    "empty": EOFError(),
    "a folder": IsADirectoryError(errno.EISDIR, "Is a directory"),
    "a text": KeyError(101),
    "bytes": UnicodeDecodeError("utf-8", b"\x80", 0, 1, "invalid start byte"),
    "cut in a number": struct.error("unpack requires a buffer of 2 bytes"),
    "stack": IndexError("pop from empty list"),
    "reference": AssertionError("storage key '1' not found in deserialized_objects"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_torch_file_that_cannot_be_read_is_named(torch, refused_file, tmp_path, monkeypatch, case):
    def fail(*_, **__):
        raise UNREADABLE[case]

    monkeypatch.setattr(torch, "load", fail)
    said = refused_file(tmp_path / "vae.pth")
    assert re.match(r"vae\.pth is (damaged, or holds|no whole PyTorch file \(.+\); )", said), said
    assert "weights_only" not in said  # no advice to read it unsafely


def test_a_torch_file_that_does_not_exist_is_named(torch, refused_file, tmp_path):
    expected = "vae.pth does not exist; give a .safetensors or .pth file."
    assert refused_file(tmp_path / "vae.pth") == expected


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("[enforce fail] unexpected pos")]
)
def test_a_torch_file_that_cannot_be_written_leaves_nothing(
    torch, refused, tmp_path, monkeypatch, small_tokenizer, error
):
    def fail(state, path):
        path.write_bytes(b"some")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    said = refused(export_torch, small_tokenizer, tmp_path / "vae.pth")
    assert said.startswith("Could not write vae.pth (")


def test_without_torch_a_torch_file_says_what_to_install(refused, refused_file, tmp_path, monkeypatch, small_tokenizer):
    monkeypatch.setitem(sys.modules, "torch", None)
    said = [refused_file(tmp_path / "vae.pth")]
    said.append(refused(export_torch, small_tokenizer, tmp_path / "vae.pth"))
    what = "vae.pth is a PyTorch file, which takes PyTorch: `pip install torch`, or use a .safetensors file."
    assert said == [what, what]


def test_a_safetensors_file_takes_no_torch(tmp_path, monkeypatch, small_tokenizer):
    monkeypatch.setitem(sys.modules, "torch", None)
    export_torch(small_tokenizer, tmp_path / "vae.safetensors")
    convert("vae", tmp_path / "vae.safetensors", LADDER, tmp_path / "vae")


@pytest.fixture
def real_torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_torch_file_is_read(real_torch, tmp_path, old, dtype):
    state = {name: real_torch.tensor(a).to(getattr(real_torch, dtype)) for name, a in random_state("vae").items()}
    parameters = {name: real_torch.nn.Parameter(tensor) for name, tensor in state.items()}
    content = {"model": parameters | {"quantize.ema_vocab_hit_SV": real_torch.ones(4, 16)}, "step": 3}
    real_torch.save(content, tmp_path / "vae.pth", _use_new_zipfile_serialization=not old)
    wide = file_of(tmp_path / "vae.safetensors", {name: tensor.float().numpy() for name, tensor in state.items()})
    found = [
        stored(convert("vae", tmp_path / file, LADDER, tmp_path / f"of {file}")) for file in ("vae.pth", wide.name)
    ]
    assert_bit_equal(*found)


def test_a_real_torch_file_is_written(real_torch, tmp_path, small_tokenizer):
    export_torch(small_tokenizer, tmp_path / "vae.pth")
    found = {name: tensor.numpy() for name, tensor in real_torch.load(tmp_path / "vae.pth").items()}
    assert_bit_equal(found, random_state("vae"))


@pytest.mark.parametrize("content", [b"hello world\n", b"", b"PK\x03\x04", argparse.Namespace(x=1)], ids=repr)
def test_a_real_file_that_torch_refuses_is_named(real_torch, refused_file, tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "vae.pth").write_bytes(content)
    else:
        real_torch.save({"args": content}, tmp_path / "vae.pth")
    assert re.match(r"vae\.pth is (damaged|no whole PyTorch file)", refused_file(tmp_path / "vae.pth"))


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

    monkeypatch.setattr(tensors, "_bytes", fail)
    output = tmp_path / "out.safetensors"
    arguments = ("vae", source, LADDER, output) if command is convert else (small_tokenizer, output)
    with pytest.raises(InputError if isinstance(error, OSError) else Interrupted) as raised:
        command(*arguments)
    assert os.listdir(tmp_path) == ["vae.safetensors"]
    if isinstance(error, OSError):
        assert re.fullmatch(r"Could not write .*No space left\); make room on that disk .*\.", str(raised.value))


_MEASURED = """
import sys
from pathlib import Path
from hmar_jax.convert import convert, export_torch
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
from hmar_jax import convert, model_card, pretrained, tensors
from hmar_jax.scales import ScaleLadder

folder, point = Path(sys.argv[1]), sys.argv[2]
module, name, calls = {
    "among the arrays": (tensors, "_bytes", 20),
    "before the model card": (model_card, "write", 1),
    "in the config": (Path, "write_text", 2),
    "before the renaming": (pretrained, "swap_in", 1),
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
        with pytest.raises(InputError, match=r"is not a model directory|is damaged"):
            from_pretrained(left)
    again = convert("vae", killed[point] / "vae.safetensors", LADDER, folder / "model")
    assert not any(array.any() for array in stored(again).values())
    assert os.listdir(folder) == ["model"]
