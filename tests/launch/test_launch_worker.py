"""launch/worker.sh, which the launchers run on every machine: what it prepares, and when it goes on."""

import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from launch_machine import CONFIG, OVERRIDES, ROOT, Machine, end, wait_for

# A trainer whose run number N does what the variable RUN_N says; later ones finish.
TRAINER = """#!/bin/bash
IFS=$'\\037'; printf '%s\\n' "hmar-jax$IFS$*" >> "$CALLS"; unset IFS
for word in "$@"; do [[ "$word" != --workdir=* ]] || workdir="${word#*=}"; done
saves() { mkdir -p "$workdir/checkpoints/$1"; }
finishes() { mkdir -p "$workdir/model"; }
n=$(cat "$CALLS.trainer" 2>/dev/null || echo 0); echo $((n + 1)) > "$CALLS.trainer"
run="RUN_$n"; eval "${!run-finishes}"
"""

# Answers environment.sh's questions; records what pip is told to install.
PYTHON = """#!/bin/bash
case "$1 $2" in
"-I -c") (($# == 3)) || echo sum ;;
"-m pip") printf 'pip\\037%s\\n' "${@: -1}" >> "$CALLS" ;;
esac
"""


class Worker(Machine):
    """A machine with a checkout that has an environment, for one accelerator."""

    def __init__(self, folder: Path, accelerator: str = "cuda"):
        super().__init__(folder)
        self.checkout = folder / "code"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        self.environment = self.checkout / ".venv"
        self.executable(self.environment / "bin/python", PYTHON)
        self.executable(self.environment / "bin/hmar-jax", TRAINER)
        (self.environment / "hmar-installed").write_text(f"sum {accelerator}\n")

        settings = [f"--config={CONFIG}", "--workdir=runs/a run", *OVERRIDES]
        self.arguments = [f"--accelerator={accelerator}", f"--root={self.data}", *settings]

    def train(self, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(self.checkout / "launch/worker.sh", *self.arguments, *more, **variables)

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    @property
    def finished(self) -> bool:
        return (self.data / "runs/a run/model").is_dir()


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


class TestWorker:
    def test_trains_in_the_shared_folder_with_the_config_of_its_checkout(self, worker):
        done = worker.train()
        assert done.returncode == 0, done.stderr
        assert worker.finished and done.stdout == f"Trained. The model is in {worker.data}/runs/a run/model\n"
        config = f"--config={worker.checkout}/{CONFIG}"
        assert worker.calls == [["hmar-jax", "train", config, "--workdir=runs/a run", *OVERRIDES]]

    def test_a_finished_training_is_left_alone(self, worker):
        worker.train()
        assert worker.train().returncode == 0
        assert worker.names == ["hmar-jax"]

    def test_goes_on_while_there_are_new_checkpoints(self, worker):
        runs = {f"RUN_{n}": f"saves {n}00; exit {n % 2}" for n in range(6)}
        assert worker.train(**runs).returncode == 0
        assert worker.names == ["hmar-jax"] * 7

    @pytest.mark.parametrize("fails", ["exit 1", "exit 0", "kill -KILL $$", "saves 100.orbax-checkpoint-tmp; exit 1"])
    def test_three_failures_without_a_checkpoint_are_enough(self, worker, fails):
        done = worker.train(RUN_0="exit 1", RUN_1="saves 7; exit 1", RUN_2=fails, RUN_3=fails, RUN_4=fails)
        assert done.returncode == 1 and "Three trainers in a row saved no checkpoint" in done.stderr
        assert worker.names == ["hmar-jax"] * 5

    @pytest.mark.parametrize("saved", [[], ["saves 200; exit 2"], ["saves 200; exit 2", "saves 400; exit 2"]], ids=len)
    def test_bad_input_ends_it_when_a_second_trainer_meets_it_without_a_checkpoint(self, worker, saved):
        runs = [*saved, "exit 2", "exit 2"]
        assert worker.train(**{f"RUN_{n}": run for n, run in enumerate(runs)}).returncode == 2
        assert worker.names == ["hmar-jax"] * len(runs)

    @pytest.mark.parametrize("once", ["exit 2", "saves 200; exit 2"])
    def test_what_looked_like_bad_input_once_is_trained_past(self, worker, once):
        assert worker.train(RUN_0=once).returncode == 0
        assert worker.finished and worker.names == ["hmar-jax"] * 2

    @pytest.mark.parametrize("runs", [["exit 70", "exit 70"], ["exit 2", "exit 70"], ["exit 1", "exit 70", "exit 70"]])
    def test_so_does_a_fault_of_ours(self, worker, runs):
        assert worker.train(**{f"RUN_{n}": run for n, run in enumerate(runs)}).returncode == 70
        assert worker.names == ["hmar-jax"] * len(runs)

    @pytest.mark.parametrize("runs", [["exit 1", "exit 2", "exit 1"], ["exit 70", "exit 1", "exit 2"]])
    def test_what_changes_from_run_to_run_is_tried_three_times(self, worker, runs):
        assert worker.train(**{f"RUN_{n}": run for n, run in enumerate(runs)}).returncode == 1
        assert worker.names == ["hmar-jax"] * 3

    def test_a_machine_that_goes_away_lets_the_trainer_save(self, worker):
        saves = f"trap 'saves 5; exit 0' TERM; echo > '{worker.folder}/started'; while :; do /bin/sleep 0.05; done"
        process = worker.start(worker.checkout / "launch/worker.sh", *worker.arguments, RUN_0=saves)
        wait_for(worker.folder / "started", process)
        process.send_signal(signal.SIGHUP)  # a lost connection is nothing
        process.send_signal(signal.SIGTERM)
        end(process)
        assert process.returncode == 143
        assert (worker.data / "runs/a run/checkpoints/5").is_dir()
        assert worker.names == ["hmar-jax"]

    def test_one_that_goes_away_while_it_is_prepared_trains_no_more(self, worker):
        done = worker.train(
            "--bucket=a-bucket", DO_gcsfuse="kill -TERM $PPID", RUN_0="while :; do /bin/sleep 0.05; done"
        )
        assert done.returncode == 143
        assert not worker.finished

    @pytest.mark.parametrize("accelerator", ["tpu", "cuda", "cuda,triton"])
    def test_installs_for_its_accelerator(self, tmp_path, accelerator):
        worker = Worker(tmp_path, accelerator)
        (worker.environment / "hmar-installed").unlink()
        done = worker.train()
        assert done.returncode == 0, done.stderr
        assert [call for call in worker.calls if call[0] == "pip"] == [["pip", f".[{accelerator}]"]]

    def test_gets_a_python_where_there_is_none_that_fits(self, worker):
        shutil.rmtree(worker.environment)
        (worker.bin / "system").mkdir()
        for name in ("bash", "cat", "cp", "dirname", "env", "ls", "mkdir", "mv", "rm", "sed", "tail"):
            (worker.bin / "system" / name).symlink_to(shutil.which(name) or name)
        good, trainer = worker.folder / "good", worker.folder / "trainer"
        makes = f'mkdir -p "$3/bin"; : > "$3/pyvenv.cfg"; cp "{good}" "$3/bin/python"; cp "{trainer}" "$3/bin/hmar-jax"'
        worker.executable(good, PYTHON.replace("esac", f'"-m venv") {makes} ;;\nesac'))
        worker.executable(trainer, TRAINER)
        uv = f'case "$*" in "python install 3.12") : > "$0.done" ;; *) [[ ! -f "$0.done" ]] || echo "{good}" ;; esac'
        worker.executable(worker.folder / "uv", f"#!/bin/bash\n{uv}\n")
        old = f'mkdir -p "$HOME/.local/bin"; cp "{worker.folder}/uv" "$HOME/.local/bin/uv"'
        worker.executable(
            worker.bin / "python3", f'#!/bin/bash\n[[ "$*" == "-m pip install --quiet --user uv" ]] || exit 1\n{old}\n'
        )
        done = worker.train(PATH=f"{worker.bin}:{worker.bin}/system")
        assert done.returncode == 0, done.stderr
        assert worker.finished

    def test_mounts_the_bucket_once(self, worker):
        assert worker.train("--bucket=a-bucket", "--root=data").returncode == 0
        assert worker.train("--bucket=a-bucket", DO_mountpoint="exit 0").returncode == 0
        (mount,) = [call for call in worker.calls if call[0] == "gcsfuse"]
        assert mount[-2:] == ["a-bucket", str(worker.data)]

    def test_without_what_mounts_buckets_the_sentence_says_how_to_get_it(self, worker):
        (worker.bin / "gcsfuse").unlink()
        done = worker.train("--bucket=a-bucket")
        assert (done.returncode, "--setup=" in done.stderr) == (2, True)
        assert "hmar-jax" not in worker.names

    def test_a_bucket_that_cannot_be_mounted_trains_nothing(self, worker):
        assert worker.train("--bucket=a-bucket", DO_gcsfuse="exit 3").returncode == 3
        assert "hmar-jax" not in worker.names

    def test_the_mount_does_not_hold_the_lock_of_a_launch(self, worker):
        script = shlex.join([str(worker.checkout / "launch/worker.sh"), *worker.arguments, "--bucket=a-bucket"])
        held = '[[ ! -e /proc/$$/fd/9 ]] || echo held >> "$HOME/held"'
        variables = worker.variables | {"DO_gcsfuse": held}
        line = f"exec 9>lock; bash {script}"
        assert subprocess.run(["bash", "-c", line], cwd=worker.folder, env=variables).returncode == 0
        assert "gcsfuse" in worker.names and not (worker.home / "held").exists()


EXPORT = ["export", "tokens", "--config=configs/a.py", "--model=a model", "--output=runs/tokens"]
WRITES = "mkdir -p runs/.tokens.partial; echo > runs/.tokens.partial/{}"


class TestAnotherCommand:
    def run(self, worker: Worker, *words: str, more: tuple[str, ...] = (), **variables: str):
        script = worker.checkout / "launch/worker.sh"
        return worker.run(script, *worker.arguments[:2], *more, "--", *words, **({"RUN_0": "exit 0"} | variables))

    def test_is_run_in_the_shared_folder_with_the_config_of_the_checkout(self, worker):
        done = self.run(worker, *EXPORT)
        assert (done.returncode, done.stdout) == (0, "")
        config = f"--config={worker.checkout}/configs/a.py"
        assert worker.calls == [["hmar-jax", "export", "tokens", config, *EXPORT[3:]]]

    def test_finds_its_config_in_either_spelling(self, worker):
        self.run(worker, "sample", "--config", "configs/a.py", "--config=/b.py")
        assert worker.calls == [["hmar-jax", "sample", "--config", f"{worker.checkout}/configs/a.py", "--config=/b.py"]]

    def test_leaves_the_name_of_an_installed_config_as_it_is(self, worker):
        (worker.checkout / "mine.py").touch()
        self.run(worker, "sample", "--config=imagenet256_d16:masked", "--config", "mine.py:masked")
        there = f"{worker.checkout}/mine.py:masked"
        assert worker.calls == [["hmar-jax", "sample", "--config=imagenet256_d16:masked", "--config", there]]

    @pytest.mark.parametrize(
        ("words", "takes"),
        [
            (["train", "--config=c", "--workdir=w"], True),
            (EXPORT, True),
            (["sample", "--model=m", "--classes=all", "--output=o"], True),
            (["sample", "--model=m", "--labels=1", "--output=o"], False),
            (["export", "model", "--workdir=w", "--output=o"], False),
        ],
        ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
    )
    def test_is_told_how_many_processes_there_are_if_they_work_together(self, worker, words, takes):
        self.run(worker, *words, more=("--processes=4",), RUN_0="exit 0", RUN_1="mkdir -p w/model")
        assert ("--processes=4" in worker.calls[0]) == takes

    def test_a_training_is_one_however_it_is_written(self, worker):
        done = self.run(worker, "train", "--config=c.py", "--workdir=w", RUN_0="exit 0", RUN_1="mkdir -p w/model")
        assert done.returncode == 0 and done.stdout.startswith("Trained.")
        assert worker.names == ["hmar-jax"] * 2

    def test_goes_on_while_it_writes(self, worker):
        runs = {f"RUN_{n}": f"{WRITES.format(n)}; exit {(1, 2, 70)[n % 3]}" for n in range(6)}
        assert self.run(worker, *EXPORT, **runs, RUN_6="exit 0").returncode == 0
        assert worker.names == ["hmar-jax"] * 7

    @pytest.mark.parametrize(("status", "code", "runs"), [(1, 1, 3), (143, 1, 3), (2, 2, 2), (70, 70, 2)])
    def test_that_gets_no_further_ends(self, worker, status, code, runs):
        fails = f"mkdir -p runs/.tokens.partial; echo > runs/.tokens.partial/.half; exit {status}"
        first = {"RUN_0": f"{WRITES.format(1)}; exit 1"}
        done = self.run(worker, *EXPORT, **first, **{f"RUN_{n}": fails for n in range(1, 5)})
        assert done.returncode == code
        assert worker.names == ["hmar-jax"] * (runs + 1)
        assert code != 1 or done.stderr == f"Three runs in a row got no further; the last one exited with {status}.\n"

    def test_that_is_stopped_is_queued_again_in_slurm(self, worker):
        done = self.run(worker, *EXPORT, RUN_0="kill -TERM $$", **JOB)
        assert done.returncode == 0
        assert worker.calls[2:] == [["scontrol", "requeue", "41"]]


JOB = {"SLURM_JOB_ID": "41", "SLURM_CPUS_PER_TASK": "12", "DO_srun": '"${@:3}"'}


class TestWorkerInSlurm:
    def test_runs_all_processes(self, worker):
        assert worker.train(**JOB).returncode == 0
        assert worker.names == ["srun", "hmar-jax"]
        assert worker.calls[0][1:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=12"]
        assert worker.calls[0][4:] == worker.calls[1][1:]

    def test_a_trainer_that_was_told_to_stop_queues_the_job_again(self, worker):
        assert worker.train(RUN_0="saves 100; exit 0", **JOB).returncode == 0
        assert worker.calls[2:] == [["scontrol", "requeue", "41"]]
        assert not worker.finished

    def test_one_that_failed_is_started_again_in_the_same_job(self, worker):
        assert worker.train(RUN_0="saves 100; exit 1", **JOB).returncode == 0
        assert worker.names == ["srun", "hmar-jax"] * 2
