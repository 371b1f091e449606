"""The desk from which launchers are run, their arguments, and what they print.

Nothing here reaches a network: `launch_machine.py` stands in for gcloud, xpk and sbatch.
"""

import shlex
import subprocess
from collections.abc import Collection, Sequence

import pytest
from launch_machine import CONFIG, Machine

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
