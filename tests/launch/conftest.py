"""Where launchers are run, and what they run."""

import subprocess
from pathlib import Path

import pytest
from launch_desk import Desk
from launch_machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


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
