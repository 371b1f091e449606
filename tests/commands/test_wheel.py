"""A wheel that is installed outside a checkout runs the demo, trains an installed config by its name, and samples."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "hmar_jax", "pallas_kernels", "configs")
CONFIGS = {file.name for file in (ROOT / "configs").glob("*.py")}

# In a process that finds the package where the wheel put it, in a folder that is empty.
RUN = """
import json, sys
import hmar_jax, pallas_kernels, tiny_demo
from hmar_jax.commands.main import main

names = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
with tiny_demo.miniature():
    codes = [main(["demo", "--quick", "--output=demo"])]
codes.append(main([
    "train", "--config=glyphs_masked", "--workdir=run", f"--config.steps={tiny_demo.STEPS}", "--config.log_every=10",
    "--config.sample_every=0", "--config.init_from=demo/next_scale/model", "--config.data.path=demo/tokens",
]))
codes.append(main([
    "sample", "--model=run/model", f"--labels={','.join(names * 2)}", "--schedule=small", "--cfg=2.5", "--top-k=60",
    "--output=samples",
]))
homes = [module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)]
print(json.dumps({"codes": codes, "homes": homes, "configs": "configs" in sys.modules}))
"""


def call(*words, cwd):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a copy of what is built from, as a checkout has it, and `sdist` and `wheel` made of that."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "checkout").mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "checkout" / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / "checkout" / name)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(folder / 'sdist')!r})"
    call("-c", make, cwd=folder / "checkout")
    offline = ["--disable-pip-version-check", "--no-deps", "--no-index"]
    pip = ["-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", folder / "wheel", "."]
    call(*pip, cwd=folder / "checkout")
    (wheel,) = (folder / "wheel").iterdir()
    call("-m", "pip", "install", *offline, "--target", folder / "site", wheel, cwd=folder)
    return folder


def check_contents(names):
    """Whether an archive's files, relative to its package folder, are those of a checkout and no others."""
    folders = [Path(folder) for package in ("hmar_jax", "pallas_kernels") for folder, _, _ in os.walk(ROOT / package)]
    modules = {str(file.relative_to(ROOT)) for folder in folders for file in folder.glob("*.py")}
    modules |= {f"hmar_jax/configs/{name}" for name in CONFIGS}
    data = {"hmar_jax/py.typed", "pallas_kernels/py.typed", "hmar_jax/data/imagenet_classes.txt"}
    assert {name for name in names if name.startswith(("hmar_jax/", "pallas_kernels/"))} == data | modules
    assert {name.rpartition("/")[2] for name in names if name.startswith("hmar_jax/configs/")} == CONFIGS
    assert not [name for name in names if name.startswith(("configs/", "tests/"))]


def test_the_wheel_has_every_module_the_configs_and_no_other_package(built):
    (file,) = (built / "wheel").iterdir()
    with zipfile.ZipFile(file) as archive:
        check_contents(archive.namelist())


def test_the_sdist_has_the_same(built):
    (file,) = (built / "sdist").iterdir()
    with tarfile.open(file) as archive:
        check_contents([name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isreg()])


def test_it_runs_the_demo_trains_by_name_and_samples_outside_a_checkout(built, tmp_path):
    (tmp_path / "away").mkdir()
    helpers = tmp_path / "helpers"
    helpers.mkdir()
    shutil.copy(Path(__file__).with_name("tiny_demo.py"), helpers)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (built / "site", helpers)))}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path / "away", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == [0, 0, 0], done.stderr
    assert not found["configs"]
    ours = [home for home in found["homes"] if "/hmar_jax/" in home or "/pallas_kernels/" in home]
    assert len(ours) > 60
    assert all(Path(home).is_relative_to(built / "site") for home in ours)
    assert len(list((tmp_path / "away" / "samples").rglob("*.png"))) >= 68
