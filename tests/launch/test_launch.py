"""launch/*.sh on machines made of a few links and fake Pythons: no network, nothing outside the test's own folder."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci/run"])
TOOLS = ["bash", "cat", "chmod", "cp", "dirname", "env", "ls", "mkdir", "mv", "rm", "tail"]

# Answers the scripts' small programs (-I -c …) with the Python that runs the tests, after lying about its version;
# "makes" an environment by linking itself into it; records every call, and what pip was told by the variables.
FAKE_PYTHON = """#!{bash}
printf '%s\\n' "$*" >> "{calls}"
case "$1 $2" in
"-I -c")
    program="import sys; sys.version_info = ({version}, 'final', 0); sys.version = '{version}'; sys.modules['pip'] = sys
$3"
    exec "{real}" -I -c "${{program}}" "${{@:4}}" ;;
"-m venv")
    for folder; do :; done
    [[ "$3" != --clear ]] || rm -r "$folder"
    mkdir -p "$folder/bin"
    : > "$folder/pyvenv.cfg"
    cp "$0" "$folder/bin/python" ;;
"-m pip")
    printf '%s\\n' "constraints: $PIP_CONSTRAINT in $PWD" >> "{calls}"
    [[ -z "${{FAIL_PIP:-}}" ]] || {{ echo "no such wheel"; exit 1; }}
    [[ -z "${{KILL_GROUP:-}}" ]] || kill -KILL 0
    printf '#!{bash}\\nprintf "<%%s>" hmar-jax "$@"\\n' > "${{0%/*}}/hmar-jax"
    chmod +x "${{0%/*}}/hmar-jax" ;;
"-m ${{FAIL_MODULE:-none}}")
    exit 7 ;;
esac
"""


class Machine:
    """A checkout and a PATH, both in a folder with spaces in its name."""

    def __init__(self, folder: Path):
        self.folder = folder / "a machine"
        self.checkout = self.folder / "my checkout"
        self.bin = self.folder / "bin"
        self.home = self.folder / "home"
        self.elsewhere = self.folder / "elsewhere"
        self.calls_file = self.folder / "calls"
        for path in (self.checkout, self.bin, self.home, self.elsewhere):
            path.mkdir(parents=True)
        shutil.copytree(
            ROOT / "launch", self.checkout / "launch", ignore=lambda _, names: {n for n in names if n[-3:] != ".sh"}
        )
        for name in ("setup.py", "constraints.txt"):
            (self.checkout / name).write_text(f"# {name}\n")
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name) or name)

    def executable(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def add_python(self, name: str = "python3", version: str = "3, 12, 1", folder: Path | None = None) -> Path:
        text = FAKE_PYTHON.format(
            bash=self.bin / "bash",
            calls=self.calls_file,
            real=getattr(sys, "_base_executable", sys.executable),
            version=version,
        )
        # The kernel splits the first line at the space, so it cannot name a bash in a folder with spaces.
        text = text.replace(f"#!{self.bin / 'bash'}", f"#!{shutil.which('bash')}")
        return self.executable((folder or self.bin) / name, text)

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.checkout / "launch" / script), *arguments],
            cwd=self.elsewhere,
            env={"PATH": str(self.bin), "HOME": str(self.home), "LC_ALL": "C.UTF-8", **variables},
            capture_output=True,
            text=True,
            timeout=30,
            start_new_session=True,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    @property
    def installs(self) -> int:
        return sum(call.startswith("-m pip install") for call in self.calls)

    @property
    def stamp(self) -> Path:
        return self.checkout / ".venv/hmar-installed"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(".\n")
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("script", "version"), [("demo.sh", "3, 11, 7"), ("test.sh", "3, 11, 7"), ("demo.sh", "3, 15, 0")]
)
def test_without_a_fitting_python(machine: Machine, script: str, version: str) -> None:
    machine.add_python("python3", version)
    assert_one_sentence(machine.run(script), "Python 3.12, 3.13 or 3.14", "install")
    assert not (machine.checkout / ".venv").exists()


def test_without_any_python(machine: Machine) -> None:
    assert_one_sentence(machine.run("demo.sh"), "Python 3.12, 3.13 or 3.14")


def test_python_that_cannot_make_environments(machine: Machine) -> None:
    machine.executable(machine.bin / "python3", "#!/bin/sh\nexit 3\n")
    assert_one_sentence(machine.run("demo.sh"), str(machine.bin / "python3"), "python3-venv")


def test_broken_shims_and_old_pythons_are_skipped(machine: Machine) -> None:
    machine.executable(
        machine.bin / "python3.12", "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"
    )
    machine.executable(machine.bin / "python3.13", "#!/nowhere/python3.13\n")
    machine.add_python("python3", "3, 9, 18")
    machine.add_python("python", "3, 14, 0")
    done = machine.run("demo.sh")
    assert (done.returncode, done.stderr) == (0, "")
    assert machine.stamp.exists()


@pytest.mark.parametrize("variable", [True, False])
def test_pyenv_versions_are_found(machine: Machine, variable: bool) -> None:
    root = machine.home / (".pyenv" if not variable else "other root")
    machine.add_python("python", "2, 7, 18", root / "versions/2.7.18/bin")
    machine.add_python("python", "3, 12, 1", root / "versions/3.12.1/bin")
    done = machine.run("demo.sh", **({"PYENV_ROOT": str(root)} if variable else {}))
    assert done.returncode == 0, done.stderr


def test_uv_is_asked(machine: Machine) -> None:
    hidden = machine.add_python("python3.12", folder=machine.folder / "uv pythons")
    machine.executable(
        machine.bin / "uv", f'#!/bin/sh\n[ "$*" = "python find --system >=3.12,<3.15" ] && echo \'{hidden}\'\n'
    )
    done = machine.run("demo.sh")
    assert done.returncode == 0, done.stderr


def test_installs_once_and_passes_arguments_on(machine: Machine) -> None:
    machine.add_python()
    first = machine.run("demo.sh", "--quick", "two words")
    assert first.returncode == 0, first.stderr
    announcement, rest = first.stdout.split("\n", 1)
    assert announcement.startswith("Installing") and "once" in announcement
    assert rest == "<hmar-jax><demo><--quick><two words>"
    assert "-m pip install --disable-pip-version-check --no-input -e .[demo]" in machine.calls
    assert f"constraints: constraints.txt in {machine.checkout}" in machine.calls

    second = machine.run("demo.sh")
    assert (second.returncode, second.stdout) == (0, "<hmar-jax><demo>")
    assert machine.installs == 1


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt"])
def test_installs_again_when_a_pin_changes(machine: Machine, name: str) -> None:
    machine.add_python()
    machine.run("demo.sh")
    (machine.checkout / name).write_text("# changed\n")
    assert "Installing" in machine.run("demo.sh").stdout
    assert machine.installs == 2


def test_test_covers_demo_but_not_the_reverse(machine: Machine) -> None:
    machine.add_python()
    for script, installs in [("demo.sh", 1), ("test.sh", 2), ("demo.sh", 2), ("test.sh", 2)]:
        assert machine.run(script).returncode == 0
        assert machine.installs == installs


def test_failed_install_leaves_no_stamp(machine: Machine) -> None:
    machine.add_python()
    machine.run("demo.sh")
    (machine.checkout / "setup.py").write_text("# changed\n")
    failed = machine.run("demo.sh", FAIL_PIP="1")
    assert failed.returncode == 1
    assert "no such wheel" in failed.stderr and "install.log" in failed.stderr
    assert not machine.stamp.exists()


def test_interrupted_install_leaves_no_stamp(machine: Machine) -> None:
    machine.add_python()
    machine.run("demo.sh")
    (machine.checkout / "setup.py").write_text("# changed\n")
    assert machine.run("demo.sh", KILL_GROUP="1").returncode == -signal.SIGKILL
    assert not machine.stamp.exists()
    assert machine.run("demo.sh").returncode == 0
    assert machine.installs == 3


@pytest.mark.parametrize("fault", ["missing", "old"])
def test_broken_environment_is_replaced(machine: Machine, fault: str) -> None:
    machine.add_python()
    machine.run("demo.sh")
    leftover = machine.checkout / ".venv/leftover"
    leftover.touch()
    if fault == "missing":
        (machine.checkout / ".venv/bin/python").unlink()
    else:
        machine.add_python("python", "3, 11, 7", machine.checkout / ".venv/bin")
    done = machine.run("demo.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Replacing ")
    assert not leftover.exists() and machine.stamp.exists()


def test_environment_elsewhere(machine: Machine) -> None:
    machine.add_python()
    done = machine.run("demo.sh", HMAR_VENV="relative place")
    assert done.returncode == 0, done.stderr
    assert (machine.elsewhere / "relative place/hmar-installed").exists()
    assert not (machine.checkout / ".venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(machine: Machine) -> None:
    machine.add_python()
    treasure = machine.home / "treasure"
    treasure.touch()
    assert_one_sentence(machine.run("demo.sh", HMAR_VENV=str(machine.home)), "HMAR_VENV")
    assert treasure.exists()


def test_stages_in_order_and_arguments_for_pytest(machine: Machine) -> None:
    machine.add_python()
    done = machine.run("test.sh", "-k", "glyphs")
    assert done.returncode == 0, done.stderr
    modules = [
        call.split()[1] for call in machine.calls if call.startswith("-m") and call.split()[1] not in ("venv", "pip")
    ]
    assert modules == ["ruff", "ruff", "mypy", "pytest"]
    assert machine.calls[-1].endswith("-k glyphs")


@pytest.mark.parametrize(("module", "stage"), [("ruff", "lint"), ("mypy", "types"), ("pytest", "tests")])
def test_failing_stage_is_named(machine: Machine, module: str, stage: str) -> None:
    machine.add_python()
    done = machine.run("test.sh", FAIL_MODULE=module)
    assert done.returncode == 7
    assert done.stderr == f"launch/test.sh failed: {stage}\n"
    assert machine.calls[-1].startswith(f"-m {module}")


@pytest.mark.parametrize(("argument", "version"), [("--newest", "3.13"), ("--newest=python3.12", "3.12")])
def test_newest_tests_without_the_pins_in_an_environment_of_its_own(
    machine: Machine, argument: str, version: str
) -> None:
    machine.add_python("python3.12", "3, 12, 9")
    machine.add_python("python", "3, 13, 0", machine.home / ".pyenv/versions/3.13.0/bin")
    assert machine.run("test.sh").returncode == 0
    for _ in range(2):  # what is newest is looked for every time
        before = len(machine.calls)
        done = machine.run("test.sh", argument, "-k", "glyphs")
        assert (done.returncode, done.stderr) == (0, "")
        calls = machine.calls[before:]
        upgrade = "--upgrade --upgrade-strategy=eager -e .[demo,test]"
        assert f"-m pip install --disable-pip-version-check --no-input {upgrade}" in calls
        assert f"constraints:  in {machine.checkout}" in calls
        assert not any(call.startswith(("-m ruff", "-m mypy")) for call in calls)
        assert calls[-1].startswith("-m pytest") and calls[-1].endswith("-k glyphs")
        assert f"{machine.checkout}/.venv-newest-{version}/cache/pytest" in calls[-1]
    assert machine.stamp.exists()


@pytest.mark.parametrize("asked", ["python3.11", "nowhere/python"])
def test_newest_of_a_python_that_does_not_fit(machine: Machine, asked: str) -> None:
    machine.add_python("python3.11", "3, 11, 7")
    machine.add_python("python3.12")
    assert_one_sentence(machine.run("test.sh", f"--newest={asked}"), f"'{asked}' is no Python 3.12, 3.13 or 3.14")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_shellcheck() -> None:
    beside_python = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside_python) if os.access(beside_python, os.X_OK) else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_committed_pins_name_no_place() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "@" not in text
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(len(pin.split("==")) == 2 for pin in pins)
    assert len({pin.split("==")[0] for pin in pins}) == len(pins)
