"""What a run reports: JSON lines, the bar, TensorBoard where it is installed, sample pictures."""

import errno
import gzip
import importlib.util
import io
import json
import logging
import os
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_training import LADDER, SIZE, idle_steps, next_scale_config

from hmar_jax import plots
from hmar_jax.errors import DivergedError, InputError, MachineError
from hmar_jax.training import loop, metrics
from hmar_jax.training.metrics import Goodput, MetricsWriter, Profiler, read_metrics


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", idle_steps())


def test_a_line_has_losses_by_scale_speed_and_learning_rate(starts, tmp_path, idle):
    loop.train(next_scale_config(starts, steps=7, log_every=3, batch_size=4), tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 6, 7]
    for line in lines:
        assert len(line["scale_loss"]) == LADDER.num_scales
        assert line["loss"] == pytest.approx(1 / line["step"], abs=1e-6)
        assert line["learning_rate"] > 0
    assert "step_seconds" not in lines[0]  # it compiled
    for line in lines[1:]:
        assert line["step_seconds"] > 0
        assert line["images_per_second"] == pytest.approx(4 / line["step_seconds"], rel=1e-2)


def test_the_time_of_a_run_is_told_apart_in_a_line_of_its_own(starts, tmp_path, idle, caplog):
    caplog.set_level(logging.INFO, "hmar_jax")
    loop.train(next_scale_config(starts, steps=4), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    spent = lines[-1]["goodput"]
    assert list(spent) == ["compile", "data_wait", "step", "checkpoint", "other", "total"]
    total = spent.pop("total")
    assert sum(spent.values()) == pytest.approx(total, abs=5e-3)
    assert min(spent.values()) >= 0
    assert spent["compile"] > 0
    assert spent["checkpoint"] > 0
    assert "Time spent: compile " in caplog.text
    assert "data_wait_share" not in lines[0]
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines[1:-1])
    loop.train(next_scale_config(starts, steps=4), tmp_path)  # nothing is left to do
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(lines)


def test_goodput_counts_each_kind_and_speeds_those_since_the_last_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    goodput = Goodput(start=10)

    def spend(kind, seconds):
        with goodput.spent(kind):
            now[0] += seconds

    spend("compile", 8)
    goodput.speed(11, batch_size=4)
    for _ in range(3):
        spend("data_wait", 0.5)
        spend("step", 1.5)
    spend("checkpoint", 3)
    now[0] += 1
    speed = goodput.speed(14, batch_size=4)
    assert speed == pytest.approx({"step_seconds": 2, "images_per_second": 2, "data_wait_share": 0.25})
    expected = {"compile": 8, "data_wait": 1.5, "step": 4.5, "checkpoint": 3, "other": 1, "total": 18}
    assert goodput.summary() == pytest.approx(expected)


@pytest.mark.parametrize(("window", "traced"), [(range(2, 4), {2, 3}), (range(4, 9), {4, 5}), (range(7, 9), set())])
def test_the_chosen_steps_are_traced(starts, tmp_path, idle, window, traced, caplog):
    caplog.set_level(logging.INFO, "hmar_jax")
    loop.train(next_scale_config(starts, checkpoint_every=5), tmp_path, profile=window)
    traces = list((tmp_path / "profile").rglob("*.trace.json.gz"))
    assert len(traces) == bool(traced)
    steps = set()
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        steps |= {int(event["args"]["step_num"]) for event in events if event.get("name") == "train"}
    assert steps == traced
    told = "A trace of steps {} to {} is in" if traced else "names steps 7 to 8, and this run has 1 to 5 to do"
    assert told.format(min(traced, default=0), max(traced, default=0)) in caplog.text


def test_a_resumed_run_says_that_the_steps_to_trace_are_done(tmp_path, caplog):
    profiler = Profiler(range(2, 4), range(4, 9), tmp_path)
    with profiler(4):
        assert not profiler.ends(4)
    profiler.close()
    assert "Nothing is traced: --profile names steps 2 to 3, and this run has 4 to 8 to do." in caplog.text


def test_a_step_that_was_written_again_counts_once_with_its_later_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "loss": 2.0}, {"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0}, {"step": 2, "loss": 9.0}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(line["step"], line["loss"]) for line in read_metrics(file)] == [(1, 1.0), (2, 9.0), (3, 3.0)]


def write(workdir, steps=3):
    writer = MetricsWriter(workdir, steps=steps, start=0, name="masked")
    for step in range(1, steps + 1):
        writer.advance()
        writer.write(step, {"loss": np.float32(step / 2), "scale_loss": np.arange(2, dtype=np.float32)})
    writer.close()


def test_small_numbers_keep_their_digits(tmp_path):
    writer = MetricsWriter(tmp_path, steps=1, start=0, name="masked")
    writer.write(1, {"learning_rate": 3.125e-8, "scale_loss": np.array([1 / 3, 2e-9], np.float32)})
    writer.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line == {"step": 1, "learning_rate": 3.125e-8, "scale_loss": [0.33333334, 2e-9]}


def test_a_resumed_run_appends(tmp_path):
    write(tmp_path)
    write(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3] * 2


@pytest.mark.parametrize("cut", [1, 2, 20, 48])  # bytes of the last line that are missing; 1 is its newline
def test_half_a_line_of_a_killed_run_is_left_behind_and_nothing_else(tmp_path, cut):
    write(tmp_path)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    assert len(whole.splitlines()[-1]) == 50
    file.write_bytes(whole[:-cut])
    kept = [1, 2, 3] if cut == 1 else [1, 2]
    assert [line["step"] for line in read_metrics(file)] == kept
    writer = MetricsWriter(tmp_path, steps=5, start=3, name="masked")
    writer.write(4, {"loss": np.float32(0.5)})
    writer.write(5, {"loss": np.float32(0.25)})
    writer.close()
    lines = read_metrics(file)
    assert [line["step"] for line in lines] == [*kept, 4, 5]
    assert lines[-2:] == [{"step": 4, "loss": 0.5}, {"step": 5, "loss": 0.25}]
    assert file.read_bytes().startswith(whole[:-cut] + b"\n")


def test_a_full_disk_is_a_sentence_that_names_the_file(tmp_path, monkeypatch):
    file, opened = tmp_path / "metrics.jsonl", Path.open

    def full(self, *mode, **options):
        if self == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, *mode, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MachineError) as error:
        write(tmp_path)
    assert str(error.value) == (
        f"Could not write {file} ([Errno {errno.ENOSPC}] No space left on device); make room on that disk and run the "
        "command again."
    )


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_step_that_is_not_finite_has_no_line(starts, tmp_path, monkeypatch, name):
    def spoil(step, metrics):
        return metrics | {name: jnp.where(step == 3, jnp.nan, metrics[name])}

    monkeypatch.setattr(loop, "make_train_step", idle_steps(spoil))
    with pytest.raises(DivergedError, match="is nan at step 3"):
        loop.train(next_scale_config(starts, checkpoint_every=5), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_the_bar_is_quiet_where_there_is_no_terminal_and_the_log_speaks(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "hmar_jax")
    write(tmp_path)
    assert capsys.readouterr().err == ""
    assert "Step 2: loss 1" in caplog.text


def test_the_bar_shows_on_a_terminal(tmp_path, monkeypatch, caplog):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    caplog.set_level(logging.INFO, "hmar_jax")
    write(tmp_path)
    shown = sys.stderr.getvalue()
    assert "masked: 100%" in shown
    assert "loss=1.5" in shown
    assert "Step" not in caplog.text


class Board:
    """Stands in for `clu.metric_writers.SummaryWriter`."""

    def __init__(self, logdir):
        self.logdir, self.written, self.open = logdir, [], True
        self.all.append(self)

    def write_scalars(self, step, scalars):
        self.written.append((step, scalars))

    def close(self):
        self.open = False


@pytest.mark.parametrize(
    ("installed", "used"),
    [({"tensorflow", "tensorboard"}, True), ({"tensorflow"}, False), ({"tensorboard"}, False), (set(), False)],
)
def test_tensorboard_is_written_where_its_extra_is_installed(tmp_path, monkeypatch, installed, used):
    find = importlib.util.find_spec

    def found(name, *rest):
        return (name in installed or None) if name in ("tensorflow", "tensorboard") else find(name, *rest)

    Board.all = []
    monkeypatch.setattr(importlib.util, "find_spec", found)
    module = types.ModuleType("clu.metric_writers")
    module.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "clu.metric_writers", module)
    write(tmp_path)
    assert len(Board.all) == used
    if used:
        (board,) = Board.all
        assert board.logdir == str(tmp_path / "tensorboard")
        assert board.written[1] == (2, {"loss": 1.0, "scale_loss/01": 0.0, "scale_loss/02": 1.0})
        assert not board.open


def test_sample_grids_are_of_fixed_labels_and_seeds(starts, tmp_path, idle):
    config = next_scale_config(starts, steps=4, sample_every=2, sample_labels=(0, 1, 2), log_every=2)
    loop.train(config, tmp_path)
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["00000002.png", "00000004.png"]
    pictures = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(np.asarray(picture))
    enlarge = 96 // SIZE
    assert pictures[0].shape == ((SIZE + 4) * enlarge, (8 * (SIZE + 2) + 2) * enlarge, 3)
    np.testing.assert_array_equal(pictures[0], pictures[1])  # the model stood still, and so did labels and seed
    assert len(np.unique(pictures[0].reshape(-1, 3), axis=0)) > 50


class Inverter:
    """Stands in for a tokenizer; what it makes of a picture is its negative."""

    def encode(self, images):
        assert -1 <= images.min() < images.max() <= 1
        return images

    def decode(self, tokens):
        return -tokens


@pytest.mark.parametrize(("number", "rows"), [(3, 1), (4, 1), (6, 2), (9, 3)])
def test_every_original_stands_right_above_its_own_reconstruction(number, rows):
    columns, side, enlarge = 4, 5, 2
    images = np.random.default_rng(number).integers(0, 256, (number, side, side, 3), np.uint8)
    shown = np.asarray(plots.reconstructions(Inverter(), images, columns, enlarge))[::enlarge, ::enlarge]
    pitch = side + 2
    assert shown.shape == (2 * rows * pitch + 2, columns * pitch + 2, 3)

    def cell(row, column):
        return shown[2 + row * pitch :, 2 + column * pitch :][:side, :side]

    for i in range(rows * columns):
        above, below = (cell(i // columns * 2 + half, i % columns) for half in (0, 1))
        if i < number:
            np.testing.assert_array_equal(above, images[i])
            np.testing.assert_allclose(below, 255.0 - images[i], atol=1)
        else:  # blank, above and below
            assert above.min() == below.min() == 255


def test_nan_as_earlier_versions_wrote_it_is_read_and_no_file_has_no_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 3, "loss": NaN, "scale_loss": [Infinity, 1]}\n')
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert np.isnan(line["loss"])
    assert line["scale_loss"] == [np.inf, 1]
    assert read_metrics(tmp_path / "nowhere.jsonl") == []


def test_metrics_that_are_no_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"Metrics file .* is a named pipe"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_curves_are_drawn_of_lines_that_lack_what_the_first_has():
    lines = [{"step": 1, "scale_loss": [1.0, 2.0]}, {"step": 2}, {"step": 3, "scale_loss": 7.0}, {"step": 4, "vq": 1.0}]
    terms = [{"step": 1, "vq": 1.0}, {"step": 2}]
    assert plots.loss_curves([("a", lines), ("b", terms)], (1, 2)).size[0] > 0


def test_what_is_not_finite_is_null_and_comes_back_as_nan(tmp_path):
    writer = MetricsWriter(tmp_path, steps=2, start=0, name="masked")
    values = {"loss": np.float32("nan"), "weight": np.float32("-inf"), "scale_loss": np.float32([1, np.inf])}
    writer.write(1, values | {"accuracy": 0.5})
    writer.close()
    file = tmp_path / "metrics.jsonl"

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(file.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "weight": None, "scale_loss": [1.0, None], "accuracy": 0.5}
    (read,) = read_metrics(file)
    np.testing.assert_equal([read["loss"], read["scale_loss"], read["accuracy"]], [np.nan, [1, np.nan], 0.5])


@pytest.mark.parametrize(
    "line",
    [
        b"7",
        b"\xff",
        b"[1]",
        b'{"step": "a"}',
        b'{"step": true}',
        b'{"step": 1.0}',
        b"null",
        b"[" * 100_000,
        b'{"step": 1',
        b'{"step": 1, "loss": "\xff"}',
        b'{"step": 1, "loss": {}}',
        b'{"step": 1, "scale_loss": [1, "x"]}',
        b'{"step": 1, "loss": ' + b"1" * 5000 + b"}",
        b'{"step": 1, "loss": 1%s}' % (b"0" * 400),
        b'{"step": 1, "loss": "%s"}' % (b"x" * 10_000_000),
    ],
    ids=lambda line: line[:24].decode(errors="replace"),
)
def test_a_line_that_is_no_steps_is_passed_over(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(line + b'\n{"step": 2, "loss": 1.0}\n')
    assert read_metrics(file) == [{"step": 2, "loss": 1.0}]
