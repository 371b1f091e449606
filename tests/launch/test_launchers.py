"""The launchers in launch/: their arguments, what they print and run, and which failures they pass on."""

import shlex
from collections.abc import Collection
from pathlib import Path

import pytest
from launch_desk import EXPORT, LAUNCHERS, OPTIONAL, REQUIRED, Desk, assert_one_sentence, dry_run, work_of
from launch_machine import OVERRIDES, STAND_IN


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
