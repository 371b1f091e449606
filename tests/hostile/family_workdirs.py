"""Work directories: a damaged one gives back what the undamaged one does, or a sentence refuses it."""

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import ODD_JSON, ODD_VALUES, damaged, odd_json

from hmar_jax.config import DataConfig, TokenizerConfig, TrainConfig
from hmar_jax.errors import HmarError, InputError
from hmar_jax.files.lock import NAME, Lock
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.metrics import read_metrics
from hmar_jax.training.state import TrainState

# Of a read that failed, TensorStore and Orbax leave coroutines and futures behind that nobody waits for.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. (None|<coroutine):pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)
CONFIG = TrainConfig(stage="tokenizer", sides=(1, 2), tokenizer=TokenizerConfig(), data=DataConfig("glyphs"))
DATA = {"examples": 80, "class_names": ["A", "é"], "start": ""}


def state(step):
    weights = jnp.asarray(np.random.default_rng(step).normal(size=(100, 8)), jnp.float32)
    key = jax.random.key_data(jax.random.key(step))
    small = {"w": weights.astype(jnp.bfloat16), "b": jnp.arange(3) + step}
    return TrainState(jnp.int32(step), key, {"net": {"w": weights}}, {}, {"mu": 2 * weights}, small)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder)
    for step in (2, 4):
        checkpoints.save(step, state(step), DATA | {"examples": 20 * step}, CONFIG)
    checkpoints.close()
    return folder


def bits(tree):
    return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def read(workdir):
    """All that a resumed run reads of the newest checkpoint, or None where a sentence refuses it."""
    checkpoints = None
    try:
        checkpoints = Checkpoints(workdir)
        config = checkpoints.config()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
        restored, position = checkpoints.restore(like)
        return checkpoints.latest(), config, position, bits(restored)
    except HmarError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 600
        assert error.exit_code == 2
        return None
    finally:
        if checkpoints is not None:
            checkpoints.close()


EXPECTED = (4, CONFIG, DATA, bits(state(4)))


def files(workdir):
    return sorted(str(f.relative_to(workdir)) for f in (workdir / "checkpoints" / "4").rglob("*") if f.is_file())


@contextlib.contextmanager
def changed(workdir):
    """A copy of the work directory, to be changed."""
    copy = workdir.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(workdir, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


def test_an_undamaged_checkpoint_is_read(workdir):
    assert read(workdir) == EXPECTED


@given(st.data())
def test_a_damaged_file_of_a_checkpoint_gives_the_same_or_is_refused(workdir, data):
    file = data.draw(st.sampled_from(files(workdir)))
    content = (workdir / file).read_bytes()
    odd = st.sampled_from(ODD_JSON) | damaged(content)
    if content[:1] == b"{":
        odd |= odd_json(json.loads(content))
    with changed(workdir) as copy:
        (copy / file).write_bytes(data.draw(odd))
        assert read(copy) in (None, EXPECTED)


@given(st.data())
def test_a_flipped_bit_gives_the_same_or_is_refused(workdir, data):
    file = data.draw(st.sampled_from(files(workdir)))
    content = bytearray((workdir / file).read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=2)) if content else ():
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    with changed(workdir) as copy:
        (copy / file).write_bytes(content)
        assert read(copy) in (None, EXPECTED)


def replace(make):
    def apply(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return apply


KINDS = {
    "removed": lambda path: None,
    "a folder": Path.mkdir,
    "a named pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty file": Path.touch,
}


@given(st.data(), st.sampled_from(sorted(KINDS)))
def test_a_file_or_folder_that_is_something_else_is_refused_or_of_no_use(workdir, data, kind):
    parts = sorted({str(p.relative_to(workdir)) for p in (workdir / "checkpoints" / "4").rglob("*")})
    part = data.draw(st.sampled_from(parts))
    with changed(workdir) as copy:
        replace(KINDS[kind])(copy / part)
        assert read(copy) in (None, EXPECTED)


NAMES = [
    "-1",
    "0",
    "007",
    "1e9",
    "０",
    "²",
    "9" * 30,
    "9" * 200,
    "4.orbax-checkpoint-tmp-1",
    "nan",
    " 5",
    "5",
    "x\n",
]


@given(st.sampled_from(NAMES), st.sampled_from(["a folder", "an empty file", "a named pipe", "copy"]))
def test_a_checkpoint_with_an_odd_name_is_passed_over_or_refused(workdir, name, kind):
    with changed(workdir) as copy:
        path = copy / "checkpoints" / name
        shutil.copytree(copy / "checkpoints" / "4", path) if kind == "copy" else KINDS[kind](path)
        assert read(copy) in (None, EXPECTED)


LOCK = {"host": "h", "boot": "b", "namespace": "n", "pid": 1, "started": 2, "since": "now", "token": "t"}


@given(odd_json(LOCK) | damaged(json.dumps(LOCK).encode()), st.booleans())
def test_any_lock_is_waited_for_taken_over_or_refused(tmp_path_factory, content, here):
    folder = tmp_path_factory.mktemp("locked")
    lock = Lock(folder)
    if here:  # of this boot, so that its process is looked up
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            content = json.dumps(json.loads(content) | {n: lock._me[n] for n in ("boot", "namespace", "host")}).encode()
    (folder / NAME).write_bytes(content)
    with contextlib.closing(lock):
        try:
            assert lock.take() in (True, False)
        except InputError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 500


@given(st.lists(st.sampled_from(ODD_VALUES) | st.integers(), max_size=3), st.data())
def test_lines_of_metrics_are_read_or_passed_over(tmp_path_factory, steps, data):
    file = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    good = json.dumps({"step": 7, "loss": 1.5, "scale_loss": [1.0, None]}).encode()
    odd = [json.dumps({"step": step, "loss": data.draw(st.sampled_from(ODD_VALUES))}).encode() for step in steps]
    odd += data.draw(st.lists(damaged(good) | st.sampled_from(ODD_JSON), max_size=3))
    file.write_bytes(b"\n".join(line.replace(b"\n", b"") for line in odd) + b"\n" + good + b"\n" + good[:20])
    lines = read_metrics(file)
    assert all(type(line["step"]) is int for line in lines)
    (last,) = (line for line in lines if line["step"] == 7)
    assert last["loss"] == 1.5
