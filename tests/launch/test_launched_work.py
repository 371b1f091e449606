"""The line of shell that launchers hand to the workers, run in a home of its own."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launch_desk import EXPORT, LAUNCHERS, TRAINING, Desk, dry_run, work_of
from launch_machine import OVERRIDES


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
