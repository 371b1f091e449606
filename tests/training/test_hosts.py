"""Several processes train as one: two of four simulated devices each, over loopback, against one of one device."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh
from tiny_training import CLASSES, LOSS, next_scale_config, once, shared_folder, tokenizer_config

from hmar_jax import images as pictures
from hmar_jax import plots
from hmar_jax.arrays import on_host
from hmar_jax.bulk import token_caches
from hmar_jax.commands.main import main
from hmar_jax.config import DataConfig, MeshConfig, ModelConfig, TokenizerConfig
from hmar_jax.errors import BUG, InputError, TransientError
from hmar_jax.files import lock
from hmar_jax.model import tokenizer
from hmar_jax.parallel import cluster, processes, sharding
from hmar_jax.scales import ScaleLadder
from hmar_jax.training import loop
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.metrics import read_metrics

HERE = Path(__file__).parent
MESH = MeshConfig(data=-1, fsdp=2)
ACROSS = MeshConfig(data=1, fsdp=8)  # parameters in parts on both processes
STEPS = 6
START = """
import json, os, signal, sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore it
from hmar_jax.parallel import processes
process, port, starts, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
processes.join("127.0.0.1:" + port, 2, process, patience=120, heartbeat=4)
import jax
from test_hosts import ACROSS, MESH, STEPS, export, moved_config, one_step, take_arrays_in_parts
from tiny_training import quick_compilation
from hmar_jax.bulk import token_caches
from hmar_jax.data import pipeline
from hmar_jax.training import loop
assert (jax.device_count(), jax.local_device_count()) == (8, 4)
quick_compilation(starts.parent / "compiled").__enter__()
steps, put = iter(range(100)), loop.sharding.put_batch

def at_step(number, act):
    \"\"\"Calls `act` when the batch of that step is made ready.\"\"\"
    global steps
    steps = iter(range(1, 100))

    def counted(batch, mesh):
        if next(steps) == number:
            act()
        return put(batch, mesh)

    loop.sharding.put_batch = counted
"""
# Batches on meshes as TPU pods have them; a tokenizer with sample pictures and its model; a token cache; then a run in
# which process 1 dies with checkpoint 4 on disk.
FIRST = """
import numpy as np
from jax.sharding import Mesh
from hmar_jax.arrays import on_host
devices, placed = np.asarray(jax.devices()).reshape(2, 4), {}
for name, order in {"in turn": devices.T.reshape(8, 1, 1), "tensor over both": devices.T.reshape(4, 1, 2)}.items():
    mesh = Mesh(order, loop.sharding.AXES)
    rows = loop.sharding.host_rows(mesh, 16)
    batch = loop.sharding.put_batch({"row": np.array(rows)}, mesh)
    placed[name] = [rows, on_host(batch["row"]).tolist()]
(out / f"placed{process}.json").write_text(json.dumps(placed))
take_arrays_in_parts(devices.reshape(8, 1, 1))
read, rows = pipeline.batches, []
def recorded(*args, **kwargs):
    rows.append(kwargs.get("rows") and list(kwargs["rows"]))
    return read(*args, **kwargs)
pipeline.batches = recorded
loop.train(one_step(mesh=ACROSS), out / "tokenizer")
(out / f"rows{process}.json").write_text(json.dumps(rows))
coded, encoded = [], token_caches._encoded
token_caches._encoded = lambda *arguments: coded.extend(arguments[-1]) or encoded(*arguments)
export(starts, out / "tokens")
(out / f"coded{process}.json").write_text(json.dumps(coded))

def die():
    while not (out / "moved" / "checkpoints" / "4").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

at_step(STEPS, die if process == 1 else lambda: None)
loop.train(moved_config(starts, mesh=MESH), out / "moved")
"""
# A callback of process 1 alone asks to stop. Then the run of before goes on, and process 1 alone gets Ctrl-C, which it
# sends itself on as SIGTERM.
SECOND = """
callbacks = [lambda step, metrics: step == 2] if process == 1 else []
assert loop.train(moved_config(starts, mesh=MESH, checkpoint_every=100), out / "asked", callbacks) is None
at_step(1, (lambda: os.kill(os.getpid(), signal.SIGINT)) if process == 1 else lambda: None)
try:
    assert loop.train(moved_config(starts, mesh=MESH, steps=100_000, checkpoint_every=100_000), out / "told") is None
    assert process == 0
except KeyboardInterrupt:
    assert process == 1
"""


# A work directory that another process holds, then one of their own, in which process 1 dies in its second save.
THIRD = """
from tiny_training import idle_steps
from hmar_jax.commands import main, options, train
from hmar_jax.errors import HmarError
from hmar_jax.training.checkpoint import Checkpoints
loop.make_train_step = idle_steps()
config = moved_config(starts, mesh=MESH)
try:
    loop.train(config, out / "held")
except HmarError as error:
    (out / f"refused{process}.txt").write_text(f"{type(error).__name__}: {error}")
save = Checkpoints.save

def die(self, step, *rest):
    if step == 4 and process == 1:
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, step, *rest)

Checkpoints.save = die
train.load = lambda *_: config
options.join_processes = lambda args: None  # they have
sys.exit(main.main(["train", "--config=x", f"--workdir={out / 'dying'}"]))
"""


def moved_config(starts, **changes):
    return next_scale_config(starts, **({"steps": STEPS} | changes))


def take_arrays_in_parts(devices):
    """What a process makes of tokens and pictures of which it holds a half is what it makes of the whole."""
    mesh, rng = Mesh(devices, sharding.AXES), np.random.default_rng(0)

    def in_parts(whole):
        whole = np.asarray(whole)
        split = jax.make_array_from_callback(whole.shape, sharding.batch_sharding(mesh), lambda index: whole[index])
        assert not split.is_fully_addressable
        return split

    config = ModelConfig(ScaleLadder((1, 2)), TokenizerConfig())
    tokens, images = rng.integers(0, 4096, (16, 5)), rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(tokenizer.check_tokens(config, in_parts(tokens)), tokens)
    ends = on_host(tokenizer._range(in_parts(pictures.to_signed(images))))
    np.testing.assert_array_equal(ends, tokenizer._range(pictures.to_signed(images)))
    drawn = [
        plots.reconstructions(types.SimpleNamespace(encode=jnp.asarray, decode=decode), images)
        for decode in (in_parts, jnp.asarray)
    ]
    assert drawn[0].tobytes() == drawn[1].tobytes()


def one_step(**changes):
    loss = dataclasses.replace(LOSS, adversarial=0.0)  # the discriminator and more scales take long to compile
    return tokenizer_config(steps=1, sample_every=1, sides=(1, 8), tokenizer_loss=loss, **changes)


def export(starts, path):
    glyphs = DataConfig("glyphs", classes="".join(CLASSES))
    token_caches.export_tokens(starts / "tokenizer", glyphs, path, crops=2, count=40, batch_size=1)


def pair(script, *arguments):
    """Runs a script in two processes; their exit codes and what they wrote to standard error."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code = START.format(here=str(HERE)) + textwrap.dedent(script)
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", code]
    options = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(i), str(port), *map(str, arguments)], **options) for i in range(2)]
    said = [process.communicate(timeout=400)[1] for process in both]
    return [process.returncode for process in both], said


@pytest.fixture(scope="module")
def hosts(starts, tmp_path_factory):
    """Work directories of two processes: `tokenizer`, done; `killed`, in which one died; `told`, which was to stop."""

    def run(out):
        codes, said = pair(FIRST, starts, out)
        (out / "codes.json").write_text(json.dumps(codes))
        assert codes[1] == -signal.SIGKILL, said[1][-3000:]
        assert (out / "rows0.json").exists(), said[0][-3000:]
        shutil.copytree(out / "moved", out / "told")
        codes, said = pair(SECOND, starts, out)
        assert codes == [0, 0], "\n".join(text[-3000:] for text in said)

    return once(shared_folder(tmp_path_factory) / "hosts", run)


@pytest.fixture(scope="module")
def straight(starts, tmp_path_factory):
    """Work directory of the same run on one device, which nothing stopped."""
    workdir = tmp_path_factory.mktemp("straight")
    loop.train(moved_config(starts), workdir)
    return workdir


def assert_close(ours, theirs):
    """Losses and models of two work directories, within the bound of float32 sums in another order."""
    for a, b in zip(read_metrics(ours / "metrics.jsonl"), read_metrics(theirs / "metrics.jsonl"), strict=True):
        assert a["step"] == b["step"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    a, b = (safetensors.numpy.load_file(folder / "model" / "model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_allclose(value, b[name], atol=2e-5, err_msg=name)


def test_every_process_reads_its_own_part_of_the_data(hosts):
    parts = [json.loads((hosts / f"rows{i}.json").read_text()) for i in range(2)]
    for rows in zip(*parts, strict=True):
        if rows[0] is None:  # the pictures held out for samples, which are the same for all
            assert rows[1] is None
        else:
            assert sorted(rows[0] + rows[1]) == list(range(8))
            assert len(rows[0]) == len(rows[1]) == 4


def test_rows_find_their_places_however_the_devices_of_a_process_lie_in_the_mesh(hosts):
    placed = [json.loads((hosts / f"placed{i}.json").read_text()) for i in range(2)]
    assert placed[0]["in turn"][0] == [0, 1, 4, 5, 8, 9, 12, 13]
    assert placed[1]["in turn"][0] == [2, 3, 6, 7, 10, 11, 14, 15]
    assert placed[0]["tensor over both"][0] == placed[1]["tensor over both"][0] == list(range(16))
    for of_process in placed:
        for _, whole in of_process.values():
            assert whole == list(range(16))


def test_what_two_processes_write_is_there_once_and_whole(hosts, starts, tmp_path):
    workdir = hosts / "tokenizer"
    assert {path.name for path in workdir.iterdir()} >= {"config.json", "metrics.jsonl", "samples", "model"}
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl")] == [1]
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2  # the step, and the goodput of process 0
    assert [path.name for path in (workdir / "samples").iterdir()] == ["00000001.png"]
    loop.train(one_step(), tmp_path)
    assert_close(workdir, tmp_path)


def test_two_processes_code_each_picture_once_and_one_goes_on_with_what_they_leave(hosts, starts, tmp_path):
    coded = [json.loads((hosts / f"coded{i}.json").read_text()) for i in range(2)]
    assert coded == [[*range(16), *range(32, 40)], list(range(16, 32))]
    shutil.copytree(hosts / "tokens", tmp_path / ".left.partial")
    (tmp_path / ".left.partial/cache.json").unlink()
    (tmp_path / ".left.partial/tokens-00001-of-00003.array_record").unlink()
    for name in ("alone", "left"):
        export(starts, tmp_path / name)
        files = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        assert files == {file.name: file.read_bytes() for file in (hosts / "tokens").iterdir()}


def test_a_process_that_dies_ends_the_other_and_what_was_saved_goes_on_elsewhere(hosts, straight, starts, tmp_path):
    survivor, dead = json.loads((hosts / "codes.json").read_text())
    assert dead == -signal.SIGKILL
    assert survivor != 0
    shutil.copytree(hosts / "moved", tmp_path / "run")
    assert Checkpoints(tmp_path / "run").latest() == 4
    loop.train(moved_config(starts), tmp_path / "run")
    assert_close(tmp_path / "run", straight)


def test_all_processes_stop_at_the_same_step_when_one_is_told_to(hosts):
    checkpoints = Checkpoints(hosts / "told")
    step, position = checkpoints.latest(), checkpoints.position()
    checkpoints.close()
    assert 4 < step < 100_000
    assert position["examples"] == 8 * step
    assert not (hosts / "told" / "model").exists()


def test_a_callback_of_one_process_stops_all_at_its_step(hosts):
    checkpoints = Checkpoints(hosts / "asked")
    assert (checkpoints.latest(), checkpoints.position()["examples"]) == (2, 16)
    checkpoints.close()
    assert not (hosts / "asked" / "model").exists()


def test_a_peer_that_dies_in_a_save_is_no_fault_of_the_user_nor_of_ours_and_all_get_the_same_refusal(starts, tmp_path):
    with lock.locked(tmp_path / "held"):
        codes, said = pair(THIRD, starts, tmp_path)
    refused = [(tmp_path / f"refused{i}.txt").read_text() for i in range(2)]
    assert refused[0] == refused[1]
    assert refused[0].startswith(f"InputError: Another process trains in {tmp_path / 'held'}: PID {os.getpid()} on ")
    assert codes[1] == -signal.SIGKILL, said[1][-3000:]
    assert codes[0] not in (0, 2, BUG), said[0][-3000:]  # 1, or what JAX ends it with when the heartbeat stops
    assert Checkpoints(tmp_path / "dying").latest() == 2


# --- a job that does not come together


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


NO_ADDRESSES = [
    "", ":1", "a:", "a:0", "127.0.0.1:70000", "a:²", "a:٣", "a: 1", "a b:1", "é:1", "\0:1", "\udcff:1", "a\x1b[2J\n:1",
    f"a:{'9' * 5000}", f"{'a' * 64}.b:1", f"{'a.' * 3000}b:1", "gs://bucket:1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"coordinator": "127.0.0.1:99"}, "give all three"),
        ({"coordinator": "127.0.0.1:99", "processes": 2, "process": 2}, "counted from 0"),
        ({"coordinator": "nowhere", "processes": 2, "process": 1}, "expected HOST:PORT"),
        *[({"coordinator": address, "processes": 2, "process": 1}, "expected HOST:PORT") for address in NO_ADDRESSES],
        ({"processes": 0}, "--processes is 0; expected 1 to 65536"),
        ({"coordinator": "a:1", "processes": 10**5000, "process": 1}, r"--processes is \(int\); expected 1 to 65536"),
        ({"coordinator": "a:1", "processes": 2, "process": -(10**30)}, "counted from 0"),
        ({"coordinator": "no.such.host.invalid:99", "processes": 2, "process": 1}, "invalid:99 is not reachable"),
        ({"coordinator": f"127.0.0.1:{free_port()}", "processes": 2, "process": 1}, "is not reachable .*refused"),
    ],
)
def test_a_coordinator_that_is_none_is_a_sentence(arguments, expected):
    with pytest.raises(TransientError if "reachable" in expected else InputError, match=expected) as caught:
        processes.join(**arguments, patience=0.2)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_port_in_use_is_a_sentence():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on port {port} .*choose another"):
            processes.join(f"127.0.0.1:{port}", 2, 0, patience=0.2)


def test_a_process_whose_peers_do_not_come_says_so_and_ends():
    code = f"""
    from hmar_jax.parallel import processes
    processes.join("127.0.0.1:{free_port()}", 2, 0, patience=1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "TransientError: Process 0 of 2 met not all others" in done.stderr


def test_without_a_cluster_a_process_is_alone_and_told_by_a_signal():
    processes.join()
    assert processes.is_first()
    with processes.preemption() as asked:
        assert not asked(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked(2)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_slurm_step_is_recognised():
    code = """
    from hmar_jax.parallel import processes
    processes.join(patience=60)
    import jax
    print(jax.distributed.is_initialized(), jax.process_index(), jax.process_count(), processes.is_first())
    """
    names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    values = (str(os.getpid()), "localhost", "1", "0", "0")  # JAX makes the port of the job's number
    env = os.environ | {f"SLURM_{name}": value for name, value in zip(names, values, strict=True)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.stdout.split() == ["True", "0", "1", "True"], done.stderr[-2000:]


NO_CLUSTER = ValueError("coordinator_address should be defined.")  # as jax 0.11.2 says it
HALF = ValueError("Number of processes must be defined.")


@pytest.mark.parametrize(
    ("given", "failure", "environment", "count", "expected"),
    [
        (None, NO_CLUSTER, {}, 1, None),
        (1, NO_CLUSTER, {}, 1, None),
        (4, NO_CLUSTER, {}, 1, (InputError, "--processes=4, and JAX recognises no cluster here")),
        (0, None, {}, 1, (InputError, "--processes is 0; expected 1 to 65536")),
        (None, HALF, {}, 1, (TransientError, "This process could not join its job .Number of processes must be")),
        (None, ValueError("invalid literal for int"), {}, 1, (TransientError, "could not join its job")),
        (None, ConnectionError("metadata.google"), {}, 1, (TransientError, "could not join its job")),
        (None, NO_CLUSTER, {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 1, (TransientError, "names 4 hosts, but JAX does not")),
        (4, NO_CLUSTER, {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 1, (TransientError, "names 4 hosts, but JAX does not")),
        (None, NO_CLUSTER, {"MEGASCALE_NUM_SLICES": "2"}, 1, (TransientError, "MEGASCALE_NUM_SLICES is 2, but JAX")),
        (None, NO_CLUSTER, {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8"}, 1, (TransientError, "SLURM_NTASKS is 8, but")),
        (None, NO_CLUSTER, {"SLURM_NTASKS": "8"}, 1, None),  # a batch script that runs no srun
        (None, None, {}, 2, None),
        (2, None, {}, 2, None),
        (4, None, {}, 2, (TransientError, "--processes=4, and 2 joined; see whether all have been started")),
        (4, None, {}, 1, (TransientError, "--processes=4, and 1 joined")),
    ],
)
def test_a_cluster_that_is_half_there_is_told_from_none(monkeypatch, given, failure, environment, count, expected):
    def initialize(**options):
        assert not {"num_processes", "process_id"} & options.keys()
        if failure is not None:
            raise failure

    for name in ("TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes.jax, "process_count", lambda: count)
    monkeypatch.setattr(processes, "leave_compilation_cache", lambda: None)
    if expected is None:
        processes.join(processes=given)
        return
    with pytest.raises(expected[0], match=expected[1]) as caught:
        processes.join(processes=given)
    assert type(caught.value) is expected[0]
    assert "\n" not in str(caught.value)


SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_LOCALID": "0", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "gpus", "ids", "warned"),
    [
        (SLURM | {"SLURM_NTASKS": "1"}, 4, [0, 1, 2, 3], False),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 4, [0, 1, 2, 3], False),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, 4, [0, 1, 2, 3], False),
        (
            SLURM | {"SLURM_NTASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "4,1", "SLURM_NODEID": "1"},
            4,
            [0, 1, 2, 3],
            False,
        ),
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"}, 4, None, False),
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}, 4, None, False),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}, 4, None, True),
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "3"}, 1, [0], False),
        (SLURM | {"SLURM_NTASKS": "1", "JAX_LOCAL_DEVICE_IDS": "2"}, 4, None, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 2, [0, 1], False),
        (SLURM | {"SLURM_NTASKS": "1"}, 0, None, False),
        ({}, 4, None, False),
    ],
)
@pytest.mark.parametrize("seen", ["by variable", "by device file"])
def test_a_process_alone_on_its_machine_takes_all_gpus_it_sees(
    monkeypatch, caplog, environment, gpus, ids, warned, seen
):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "CUDA_VISIBLE", "JAX_LOCAL"))]:
        monkeypatch.delenv(name)
    if seen == "by variable":
        environment = environment | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    files = [f"/dev/nvidia{i}" for i in range(gpus)]
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: files if "nvidia" in pattern else [])
    given = {}
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **options: given.update(options))
    processes.join()
    assert given.get("local_device_ids") == ids
    expected = "processes on this machine uses 1 of 4 GPUs here; start one process a GPU."
    assert (expected in caplog.text) == warned


@pytest.fixture
def command(tmp_path):
    """Of a training whose work directory cannot be made."""
    file = tmp_path / "config.py"
    file.write_text(
        "from hmar_jax.config import TrainConfig, to_config_dict\n"
        "def get_config():\n    return to_config_dict(TrainConfig(stage='tokenizer'))\n"
    )
    return ["train", f"--config={file}", f"--workdir={file}/run"]


def test_the_command_joins_the_job_unless_told_not_to(command, capsys, monkeypatch):
    assert main([*command, "--coordinator=x", "--processes=2"]) == 2
    assert "--coordinator='x', --processes=2, --process=None: give all three" in capsys.readouterr().err
    joined = []
    monkeypatch.setattr(processes, "join", lambda *arguments: joined.append(arguments))
    for arguments in ([], ["--coordinator=h:1", "--processes=3", "--process=2"], ["--no-distributed"]):
        assert main([*command, *arguments]) == 2
        assert "Could not write" in capsys.readouterr().err
    assert joined == [(None, None, None), ("h:1", 3, 2)]


@pytest.mark.parametrize("steps", ["3", "3:2", "0:2", "a:b", "1:2:3"])
def test_steps_to_trace_that_are_none_are_refused(command, steps, capsys):
    with pytest.raises(SystemExit) as left:
        main([*command, f"--profile={steps}"])
    assert left.value.code == 2
    assert f"'{steps}' is not FIRST:LAST, such as 100:110" in capsys.readouterr().err
