"""The launchers in launch/: what they print, what they run, and what they leave behind when something fails.

Nothing here reaches a network: `launch_machine.py` stands in for gcloud, xpk and sbatch.
"""

import re
import shlex
import signal
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from launch_machine import CONFIG, OVERRIDES, STAND_IN, Machine, end, wait_for

TRAINING = {
    "repository": "https://example.org/r.git",
    "revision": "0123abc",
    "config": CONFIG,
    "workdir": "runs/my run's",
}
TPU = {"project": "a-project", "zone": "a-zone", "name": "a-name"}
REQUIRED = {
    "tpu_vm.sh": TPU | {"bucket": "a-bucket"} | TRAINING,
    "queued_resource.sh": TPU
    | {"bucket": "a-bucket", "accelerator-type": "v5litepod-256", "runtime-version": "a-version"}
    | TRAINING,
    "xpk.sh": TPU | {"cluster": "a-cluster", "tpu-type": "v5litepod-256", "root": "/data"} | TRAINING,
    "slurm_gpu.sh": {"root": "ROOT", "name": "a-name", "nodes": "4", "gpus-per-node": "8"} | TRAINING,
}
OPTIONAL = {
    "tpu_vm.sh": {"setup": "install 'a tool'"},
    "queued_resource.sh": {"provisioning": "spot", "setup": "install 'a tool'"},
    "xpk.sh": {"slices": "2", "image": "an-image"},
    "slurm_gpu.sh": {
        "accelerator": "cuda,triton",
        "cpus-per-task": "12",
        "partition": "a-partition",
        "account": "an-account",
        "qos": "a-qos",
        "constraint": "a100|h100&nvlink",
        "reservation": "a-reservation",
        "nodelist": "node[1-4]",
        "exclude": "node7",
        "mem": "0",
        "time": "1-00:00:00",
        "gres": "gpu:h100:8",
        "sbatch": "--exclusive",
    },
}
LAUNCHERS = pytest.mark.parametrize("launcher", REQUIRED)
EXPORT = ["export", "tokens", "--config=configs/a.py", "--model=runs/a model", "--output=runs/tokens", "--crops=8"]


class Desk(Machine):
    """Where the launchers are run."""

    def launch(self, launcher: str, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(launcher, *self.arguments(launcher), *more, **variables)

    def arguments(self, launcher: str, without: Collection[str] = ()) -> list[str]:
        given = {name: value for name, value in REQUIRED[launcher].items() if name not in without}
        if given.get("root") == "ROOT":
            given["root"] = str(self.data)
        return [f"--{name}={value}" for name, value in given.items()]

    @property
    def verbs(self) -> list[str]:
        """What gcloud was asked to do: create, describe, ssh, delete."""
        return [call[4] for call in self.calls]


@pytest.fixture
def machine(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def dry_run(machine: Desk, launcher: str, *more: str) -> list[list[str]]:
    """The commands that a dry run prints, read as a shell reads them."""
    done = machine.launch(launcher, *more, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert machine.calls == []
    return [shlex.split(line) for line in done.stdout.splitlines()]


def work_of(commands: Sequence[Sequence[str]]) -> str:
    """The line of shell that the commands hand to the workers."""
    (work,) = [w for c in commands for w in c if w.startswith(("--command=", "--wrap="))]
    return work.split("=", 1)[1]


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(".\n")
    assert len(done.stderr) < 700
    for part in parts:
        assert part in done.stderr


class TestArguments:
    @LAUNCHERS
    def test_a_missing_one_is_named(self, machine, launcher):
        for name in REQUIRED[launcher]:
            done = machine.run(launcher, *machine.arguments(launcher, without=[name]))
            assert_one_sentence(done, launcher, f"--{name}=…")
        assert_one_sentence(machine.launch(launcher, "--"), launcher, "after --")
        assert machine.calls == []

    @LAUNCHERS
    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            ("--speed=3", "--speed"),
            ("--nodes", "--nodes"),
            ("fast", "fast"),
            ("--name nodes=3", "has no argument --name nodes"),
            ("\x1b[2J\n", "cannot read the argument ?[2J?"),
            ("--" + 5000 * "x" + "=1", f"{200 * 'x'} … {200 * 'x'}"),
            ("--workdir=gs://bucket/run", "gs://bucket/run is a URL"),
            ("--workdir=gs:/bucket/run", "gs:/bucket/run is a URL"),
            ("--config=https://example.org/c.py", "https://example.org/c.py is a URL"),
            ("--config.data.path=s3://bucket/x", "s3://bucket/x is a URL"),
            ("--config.init_from=hdfs://x", "hdfs://x is a URL"),
            ("--workdir=~no-such-user/x", "no-such-user/x begins with the home of a user who does not exist"),
        ],
    )
    def test_a_wrong_one_is_named(self, machine, launcher, wrong, named):
        assert_one_sentence(machine.launch(launcher, wrong), named)
        assert machine.calls == []

    @pytest.mark.parametrize("launcher", ["tpu_vm.sh", "queued_resource.sh"])
    def test_a_bucket_is_no_url(self, machine, launcher):
        assert_one_sentence(
            machine.launch(launcher, "--bucket=gs://bucket"), "gs://bucket is a URL", "name of a bucket"
        )

    @pytest.mark.parametrize("launcher", ["xpk.sh", "slurm_gpu.sh"])
    def test_a_root_is_no_url(self, machine, launcher):
        assert_one_sentence(machine.launch(launcher, "--root=gs://bucket"), "gs://bucket is a URL")

    @LAUNCHERS
    @pytest.mark.parametrize(
        "words", [["--output=gs://b/x"], ["--output", "gs://b/x"], ["--config.data.path=gs://b/x"]]
    )
    def test_nor_are_paths_of_the_command(self, machine, launcher, words):
        given = machine.arguments(launcher, without=("config", "workdir"))
        assert_one_sentence(machine.run(launcher, *given, "--", "export", "tokens", *words), "gs://b/x is a URL")
        assert machine.calls == []

    @LAUNCHERS
    @pytest.mark.parametrize("wrong", ["--config=c.py", "--workdir=w", "--config.steps=3"])
    def test_arguments_of_a_training_do_not_go_with_another_command(self, machine, launcher, wrong):
        given = machine.arguments(launcher, without=("config", "workdir"))
        assert_one_sentence(machine.run(launcher, *given, wrong, "--", *EXPORT), "for the command after --")

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            ("--gpus-per-node=many", "with many GPUs each"),
            ("--nodes=0", "--nodes=0"),
            ("--gres=nvme:1", "names no gpu"),
        ],
    )
    def test_numbers_for_slurm_are_numbers(self, machine, wrong, named):
        given = machine.arguments("slurm_gpu.sh", without=("gpus-per-node",) if "gres" in wrong else ())
        assert_one_sentence(machine.run("slurm_gpu.sh", *given, wrong), named)

    def test_slurm_needs_the_number_of_gpus(self, machine):
        given = machine.arguments("slurm_gpu.sh", without=("gpus-per-node",))
        assert_one_sentence(machine.run("slurm_gpu.sh", *given), "--gpus-per-node=… or --gres=…")

    def test_a_provisioning_that_is_none_is_named(self, machine):
        assert_one_sentence(machine.launch("queued_resource.sh", "--provisioning=cheap"), "cheap", "spot or reserved")

    @LAUNCHERS
    def test_help_names_all(self, machine, launcher):
        done = machine.run(launcher, "--help")
        assert (done.returncode, done.stderr, machine.calls) == (0, "", [])
        first, example, _ = done.stdout.split("\n\n", 2)
        assert first.endswith(".") and f"bash launch/{launcher}" in example
        for name in (*REQUIRED[launcher], *OPTIONAL[launcher], "config.FIELD", "dry-run"):
            assert f"--{name}" in done.stdout
        assert "shellcheck" not in done.stdout


class TestDryRun:
    @LAUNCHERS
    @pytest.mark.parametrize("optional", [False, True])
    def test_prints_what_a_run_runs(self, machine, launcher, optional):
        more = [f"--{name}={value}" for name, value in OPTIONAL[launcher].items()] if optional else []
        printed = dry_run(machine, launcher, *OVERRIDES, *more)
        for name in ("mkdir", "bash"):  # what the launcher for Slurm runs besides
            machine.executable(machine.bin / name, STAND_IN)
        done = machine.launch(launcher, *OVERRIDES, *more, DO_mkdir='/bin/mkdir "$@"')
        assert done.returncode == 0, done.stderr
        assert machine.calls == [command for command in printed if command[0] != "cd"]
        for value in (*OPTIONAL[launcher].values(),) if optional else ():
            assert any(value in word for command in printed for word in command)

    @LAUNCHERS
    def test_shows_nothing_of_the_environment(self, machine, launcher):
        assert "sesame" not in str(dry_run(machine, launcher))


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> tuple[str, str]:
    """A repository with a worker.sh that records what it gets; and a revision of it that is not the newest."""
    folder = tmp_path_factory.mktemp("repository")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    revisions = []
    for version in ("first", "second"):
        worker = f"""printf '%s\\n' {version} "$PWD" "$@" >> "$HOME/worker"
{{ flock -n ~/hmar/lock true && echo free || echo locked; }} >> "$HOME/lock"
echo some output
exit "${{WORKER_STATUS:-0}}"
"""
        Machine.executable(folder / "launch/worker.sh", worker)
        Machine.executable(
            folder / "launch/environment.sh", 'prepare_environment() { echo "$1" >> "$HOME/prepared"; }\n'
        )
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", version], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        revisions.append(head.stdout.strip())
    return str(folder), revisions[0]


def sbatch(machine: Desk, *more: str, without: Collection[str] = ()) -> list[str]:
    """What a dry run prints for sbatch."""
    done = machine.run("slurm_gpu.sh", *machine.arguments("slurm_gpu.sh", without), *more, "--dry-run")
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


class TestPathsAtHome:
    """bash leaves the ~ of --root=~/x as it is."""

    @LAUNCHERS
    @pytest.mark.parametrize("name", ["config", "workdir", "repository", "root"])
    def test_are_expanded(self, machine, launcher, name):
        if name not in REQUIRED[launcher]:
            return
        printed = dry_run(machine, launcher, f"--{name}=~/a place")
        words = [word for command in printed for word in command]
        assert not any("~/a place" in word for word in words)
        assert any(f"{machine.home}/a place" in word for word in words)

    @LAUNCHERS
    def test_are_expanded_in_other_arguments_too(self, machine, launcher):
        work = work_of(dry_run(machine, launcher, "--config.init_from=~/m"))
        assert f"'--config.init_from={machine.home}/m'" in work
        given = machine.arguments(launcher, without=("config", "workdir"))
        done = machine.run(launcher, *given, "--dry-run", "--", "export", "tokens", "--model=~", "--output", "~/o")
        work = work_of([shlex.split(line) for line in done.stdout.splitlines()])
        assert f"'--model={machine.home}' --output '{machine.home}/o'" in work

    def test_of_other_users_are_expanded_and_a_tilde_elsewhere_is_not(self, machine):
        root = Path("~root").expanduser()
        assert f"--workdir={root}/x" in work_of(dry_run(machine, "xpk.sh", "--workdir=~root/x"))
        assert "'--workdir=a~/x'" in work_of(dry_run(machine, "xpk.sh", "--workdir=a~/x"))


class TestSlurmOptions:
    def test_further_ones_reach_sbatch_after_all_others(self, machine):
        job = sbatch(machine, "--qos=x", "--constraint=a&b", "--sbatch=--exclusive  --gpu-bind=none", "--mem=0")
        assert {"--qos=x", "--constraint=a&b", "--mem=0", "--gpus-per-node=8"} <= set(job)
        assert job[-3:-1] == ["--exclusive", "--gpu-bind=none"]

    @pytest.mark.parametrize(
        ("given", "tasks", "asked"),
        [
            ("--gres=gpu:8", 8, "--gres=gpu:8"),
            ("--gres=gpu:h100:4", 4, "--gres=gpu:h100:4"),
            ("--gres=nvme:2,gpu:a100:2(S:0-1)", 2, "--gres=nvme:2,gpu:a100:2(S:0-1)"),
            ("--gres=gpu", 1, "--gres=gpu"),
            ("--gres=gpu:h100", 1, "--gres=gpu:h100"),
            ("--gpus-per-node=a100:4", 4, "--gpus-per-node=a100:4"),
        ],
    )
    def test_gpus_are_asked_for_in_either_way_one_process_each(self, machine, given, tasks, asked):
        job = sbatch(machine, given, without=("gpus-per-node",))
        assert f"--ntasks-per-node={tasks}" in job
        assert [word for word in job if word.startswith(("--gres", "--gpus"))] == [asked]
        assert f"--processes={4 * tasks} " in work_of([job])


class TestWhatTheWorkersGet:
    """The printed line itself, run in a home of its own."""

    def work(self, machine: Desk, launcher: str, repository: tuple[str, str]) -> str:
        where = [f"--repository={repository[0]}", f"--revision={repository[1]}"]
        return work_of(dry_run(machine, launcher, *OVERRIDES, *where))

    def on_worker(
        self, machine: Desk, work: str, folder: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        where, environment = folder or machine.home, machine.variables | variables
        return subprocess.run(["bash", "-c", work], cwd=where, env=environment, capture_output=True, text=True)

    @pytest.mark.parametrize("launcher", ["tpu_vm.sh", "queued_resource.sh", "xpk.sh"])
    def test_the_code_at_the_revision_and_the_arguments_as_given(self, machine, launcher, repository):
        work = self.work(machine, launcher, repository)
        for _ in range(2):  # a machine that was used before
            done = self.on_worker(machine, work)
            assert done.returncode == 0, done.stderr
        where = machine.home if launcher == "xpk.sh" else machine.home / "hmar"
        storage = ["--root=/data"] if launcher == "xpk.sh" else ["--root=bucket", "--bucket=a-bucket"]
        processes = [] if launcher == "tpu_vm.sh" else ["--processes=64"]
        settings = [f"--config={TRAINING['config']}", f"--workdir={TRAINING['workdir']}", *OVERRIDES]
        got = (machine.home / "worker").read_text().splitlines()
        assert got == ["first", str(where), "--accelerator=tpu", *storage, *processes, *settings] * 2

    @LAUNCHERS
    def test_another_command_with_its_arguments(self, machine, launcher, repository):
        given = machine.arguments(launcher, without=("config", "workdir"))
        where = [f"--{k}={v}" for k, v in zip(("repository", "revision"), repository, strict=True)]
        done = machine.run(launcher, *given, *where, "--dry-run", "--", *EXPORT)
        assert (done.returncode, done.stderr) == (0, "")
        lines = [shlex.split(line) for line in done.stdout.splitlines()]
        folder = machine.home
        if launcher == "slurm_gpu.sh":  # the code is put into the job's folder here
            folder = Path(lines[0][-1])
            folder.mkdir(parents=True)
            subprocess.run(["bash", "-c", lines[2][-1]], cwd=folder, check=True)
        assert self.on_worker(machine, work_of(lines), folder).returncode == 0
        got = (machine.home / "worker").read_text().splitlines()
        assert got[got.index("--") + 1 :] == EXPORT

    @pytest.mark.parametrize(
        ("kind", "hosts"),
        [
            ("v5litepod-256", 64),
            ("v5litepod-16", 4),
            ("v5litepod-4", 1),
            ("v5litepod-8", None),
            ("v6e-64", 16),
            ("v5p-128", 16),
            ("v5p-8", 1),
            ("v4-16", 2),
            ("tpu7x-128", None),
            ("ACTIVE", None),
        ],
    )
    @pytest.mark.parametrize("launcher", ["tpu_vm.sh", "queued_resource.sh", "xpk.sh"])
    def test_the_number_of_processes_where_the_type_tells(self, machine, launcher, kind, hosts):
        if launcher == "tpu_vm.sh":
            assert machine.launch(launcher, DO_gcloud=f'[[ "$4" != describe ]] || echo {kind}').returncode == 0
            work = work_of(machine.calls)
        else:
            option = {"queued_resource.sh": "accelerator-type", "xpk.sh": "tpu-type"}[launcher]
            work = work_of(dry_run(machine, launcher, f"--{option}={kind}"))
        assert re.findall(r"--processes=(\d+) ", work) == ([] if hosts is None else [str(hosts)])

    def test_several_slices_are_one_job(self, machine):
        assert "--processes=128 " in work_of(dry_run(machine, "xpk.sh", "--slices=2"))

    def test_xpk_can_put_it_into_yaml_and_kubernetes_expands_nothing_in_it(self, machine, repository):
        work = self.work(machine, "xpk.sh", repository)
        assert not set("\n{}") & set(work) and "$(" not in work

    def test_a_tpu_vm_logs_and_shows_the_end_of_the_log_of_a_failure(self, machine, repository):
        work = self.work(machine, "tpu_vm.sh", repository)
        assert self.on_worker(machine, work).stdout == ""
        failed = self.on_worker(machine, work, WORKER_STATUS="7")
        assert failed.returncode == 7
        assert failed.stdout == (machine.home / "hmar/train.log").read_text() == "some output\n" * 2

    @pytest.mark.parametrize("setup", ["echo done > setup", "exit 5"])
    def test_a_tpu_vm_is_set_up_first(self, machine, repository, setup):
        printed = dry_run(
            machine,
            "tpu_vm.sh",
            f"--setup={setup}",
            *(f"--{k}={v}" for k, v in zip(("repository", "revision"), repository, strict=True)),
        )
        done = self.on_worker(machine, work_of(printed))
        assert done.returncode == (5 if "exit" in setup else 0)
        assert (machine.home / "worker").exists() == (machine.home / "hmar/setup").exists() == (done.returncode == 0)

    def test_a_second_launch_waits_for_the_first(self, machine, repository):
        self.on_worker(machine, self.work(machine, "tpu_vm.sh", repository))
        assert (machine.home / "lock").read_text() == "locked\n"

    def test_code_that_is_not_to_be_had_is_a_failure(self, machine):
        done = self.on_worker(machine, self.work(machine, "tpu_vm.sh", ("/nowhere", "main")))
        assert done.returncode != 0 and "/nowhere" in done.stdout

    @pytest.mark.parametrize("accelerator", ["cuda", "cuda,triton"])
    def test_slurm_prepares_here_and_runs_there(self, machine, repository, accelerator):
        where = [f"--repository={repository[0]}", f"--revision={repository[1]}"]
        more = [f"--accelerator={accelerator}"] * ("triton" in accelerator)
        done = machine.launch("slurm_gpu.sh", *OVERRIDES, *where, *more)
        assert done.returncode == 0, done.stderr
        folder = machine.data / "jobs/a-name"
        assert (machine.home / "prepared").read_text() == f"{accelerator}\n"
        (job,) = machine.calls
        assert job[0] == "sbatch" and f"--chdir={folder}" in job
        assert {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue"} <= set(job)
        assert subprocess.run(["bash", "-c", work_of([job])], cwd=folder, env=machine.variables).returncode == 0
        got = (machine.home / "worker").read_text().splitlines()
        root = f"--root={machine.data}"
        assert got[:5] == ["first", str(folder), f"--accelerator={accelerator}", root, "--processes=32"]


class TestFailures:
    def test_of_the_training_on_a_tpu_vm_is_passed_on(self, machine):
        assert machine.launch("tpu_vm.sh", DO_gcloud="exit 7").returncode == 7

    def test_of_xpk_is_passed_on(self, machine):
        assert machine.launch("xpk.sh", DO_xpk="exit 7").returncode == 7

    def test_of_sbatch_is_passed_on(self, machine, repository):
        where = [f"--repository={repository[0]}", f"--revision={repository[1]}"]
        assert machine.launch("slurm_gpu.sh", *where, DO_sbatch="exit 7").returncode == 7

    def test_of_the_preparation_submits_nothing(self, machine):
        done = machine.launch("slurm_gpu.sh", "--repository=/nowhere")
        assert done.returncode != 0 and machine.calls == []


# A stand-in for gcloud with a memory: `on VERB` is "0" the first time it is asked to VERB, then "1" and so on.
REMEMBERING = """
count() { local n; n=$(cat "$CALLS.$1" 2>/dev/null || echo 0); echo $((n + 1)) > "$CALLS.$1"; echo "$n"; }
verb="$4"; n=$(count "$verb"); case "$verb $n" in
"""


def gcloud(*answers: str) -> str:
    """A gcloud that finds the TPU active and all well, but for what `answers`, cases of "VERB N", say."""
    return REMEMBERING + "\n".join(f"{answer} ;;" for answer in answers) + "\n describe\\ *) echo ACTIVE ;; esac"


class TestQueuedResource:
    """Whatever happens, a TPU that was made is deleted."""

    def launch(self, machine: Desk, *answers: str) -> subprocess.CompletedProcess[str]:
        return machine.launch("queued_resource.sh", DO_gcloud=gcloud(*answers))

    def test_waits_until_it_is_there(self, machine):
        done = self.launch(machine, '"describe 0") echo WAITING_FOR_RESOURCES', '"describe 1") echo PROVISIONING')
        assert done.returncode == 0, done.stderr
        assert machine.verbs == ["create", "describe", "describe", "describe", "ssh", "delete"]

    def test_one_that_cannot_be_made_is_not_deleted(self, machine):
        assert self.launch(machine, '"create 0") exit 9').returncode == 9  # it may be another's, of the same name
        assert machine.verbs == ["create"]

    @pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
    def test_a_request_that_fails(self, machine, state):
        done = self.launch(machine, f'"describe 0") echo {state}')
        assert (done.returncode, done.stderr) == (1, f"The request for a-name is {state}; the console says why.\n")
        assert machine.verbs == ["create", "describe", "delete"]

    def test_a_failure_to_ask_is_forgiven(self, machine):
        assert self.launch(machine, '"describe "[0123]) exit 1').returncode == 0
        assert machine.verbs[-2:] == ["ssh", "delete"]

    def test_five_failures_to_ask_are_not(self, machine):
        assert self.launch(machine, '"describe "*) exit 1').returncode == 1
        assert machine.verbs == ["create", *["describe"] * 5, "delete"]

    @pytest.mark.parametrize("status", [2, 7])
    def test_a_training_that_fails(self, machine, status):
        assert self.launch(machine, f'"ssh 0") exit {status}').returncode == status
        assert machine.verbs == ["create", "describe", "ssh", "describe", "delete"]

    @pytest.mark.parametrize("status", [255, 143, 1])
    def test_a_preempted_one_is_queued_for_again(self, machine, status):
        done = self.launch(machine, f'"ssh 0") exit {status}', '"describe 1") echo SUSPENDING')
        assert done.returncode == 0, done.stderr
        assert done.stdout == "a-name is SUSPENDING: queueing again.\n"
        attempt = ["create", "describe", "ssh"]
        assert machine.verbs == [*attempt, "describe", "delete", *attempt, "delete"]
        assert machine.calls[0] == machine.calls[5]

    def test_one_that_cannot_be_had_again(self, machine):
        done = self.launch(machine, '"ssh 0") exit 255', '"describe 1") echo SUSPENDED', '"create 1") exit 9')
        assert done.returncode == 9
        assert machine.verbs[-2:] == ["delete", "create"]

    def test_a_lost_connection_is_made_again(self, machine):
        assert self.launch(machine, '"ssh "[01]) exit 255').returncode == 0
        assert machine.verbs == ["create", *["describe", "ssh"] * 3, "delete"]

    def test_one_that_is_never_reached_is_given_up(self, machine):
        done = self.launch(machine, '"ssh "*) exit 255')
        assert done.returncode == 1 and "ten times" in done.stderr
        assert machine.verbs.count("ssh") == 10 and machine.verbs[-1] == "delete"

    def test_one_that_cannot_be_deleted_is_reported(self, machine):
        done = self.launch(machine, '"delete 0") exit 9')
        assert done.returncode == 1 and "a-name could not be deleted" in done.stderr

    @pytest.mark.parametrize(("sent", "status"), [("TERM", 143), ("INT", 130), ("HUP", 143)])
    def test_an_interruption(self, machine, sent, status):
        answer = f'"ssh 0") echo > "{machine.folder}/started"; exec /bin/sleep 600'
        process = machine.start(
            "queued_resource.sh", *machine.arguments("queued_resource.sh"), DO_gcloud=gcloud(answer)
        )
        wait_for(machine.folder / "started", process)
        process.send_signal(getattr(signal, f"SIG{sent}"))
        end(process)
        assert process.returncode == status
        assert machine.verbs == ["create", "describe", "ssh", "delete"]
