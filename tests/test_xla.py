"""Compiler flags: XLA and libtpu take them, and a user's own win. Compiled programs: kept where they may be."""

import importlib.util
import os
import stat
import subprocess
import sys

import jax
import pytest
from PIL import Image
from tiny_models import TINY, lively_model

from hmar_jax.commands.main import main
from hmar_jax.errors import TransientError
from hmar_jax.xla import (
    FLAGS,
    leave_compilation_cache,
    naming_absent_platforms,
    set_flags,
    use_compilation_cache,
)


def test_flags_are_added_and_one_that_is_set_keeps_its_value():
    ours = FLAGS["XLA_FLAGS"][0]
    theirs = ours.replace("true", "false")
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {theirs}"}
    set_flags(environment)
    assert ours not in environment["XLA_FLAGS"]
    assert environment["XLA_FLAGS"].split()[-2:] == ["--xla_force_host_platform_device_count=2", theirs]
    assert environment["LIBTPU_INIT_ARGS"] == " ".join(FLAGS["LIBTPU_INIT_ARGS"])
    before = dict(environment)
    set_flags(environment)
    assert environment == before


def run(program):
    environment = {name: value for name, value in os.environ.items() if name not in FLAGS}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    set_flags(environment)
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


def test_xla_knows_its_flags():
    """It aborts on an unknown one, on a CPU too."""
    done = run("import jax; print(jax.numpy.ones(3).sum())")
    assert (done.returncode, done.stdout.strip()) == (0, "3.0"), done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed")
def test_libtpu_knows_its_flags():
    done = run(
        "import jax; from jax.experimental import topologies\n"
        "chip = topologies.get_topology_desc('v5e:1x1', platform='tpu', chips_per_host_bounds=[1, 1, 1]).devices[0]\n"
        "x = jax.ShapeDtypeStruct((8, 128), 'float32', sharding=jax.sharding.SingleDeviceSharding(chip))\n"
        "print(jax.jit(lambda x: x + 1).lower(x).compile().as_text()[:9])"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "HloModule"), done.stderr


# --- compiled programs


@pytest.fixture
def jax_cache():
    """Whether JAX, which runs here already, has been told of a directory; as it was, after the test."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache(jax_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for environment, parent in (
        ({"XDG_CACHE_HOME": str(tmp_path / "xdg")}, tmp_path / "xdg"),
        ({"XDG_CACHE_HOME": ""}, tmp_path / "home" / ".cache"),
    ):
        jax.config.update("jax_compilation_cache_dir", None)
        use_compilation_cache(environment)
        assert jax_cache() == str(parent / "hmar-jax" / "xla")
        assert (parent / "hmar-jax" / "xla").is_dir()
    monkeypatch.delitem(sys.modules, "jax")  # as in the console script: JAX, once imported, reads the variable
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    use_compilation_cache(environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "xdg" / "hmar-jax" / "xla")


def test_another_directory_of_programs_and_none_are_respected(jax_cache, tmp_path):
    for own in ("", "gs://bucket/programs"):
        use_compilation_cache({"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": own})
        assert jax_cache() is None
    jax.config.update("jax_compilation_cache_dir", "/mine")
    use_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    leave_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert jax_cache() == "/mine"
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    leave_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert jax_cache() is None


def test_a_place_that_cannot_be_written_keeps_nothing_and_breaks_nothing(jax_cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    use_compilation_cache({"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert jax_cache() is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # root may write anywhere
        use_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert jax_cache() is None
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.home", no_home)
        use_compilation_cache({})
    assert jax_cache() is None


@pytest.mark.parametrize(("command", "kept"), [("sample", True), ("bench", False), ("compile-check", False)])
def test_commands_that_measure_the_compiler_keep_nothing(jax_cache, tmp_path, monkeypatch, command, kept):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    use_compilation_cache()  # as `from_pretrained` does
    assert (jax_cache() is not None) == kept


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_command_finds_its_programs_again_and_they_give_the_same_pictures(tmp_path):
    lively_model(TINY).save(tmp_path / "model", source="a test")
    command = [sys.executable, "-W", "error", "-m", "hmar_jax", "sample", "--model", tmp_path / "model", "--labels=0,3"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}  # says what was found
    pictures, said = [], []
    for out in ("first", "again"):
        done = subprocess.run([*command, "--output", tmp_path / out], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
        with Image.open(tmp_path / out / "grid.png") as picture:
            pictures.append(picture.tobytes())
    assert pictures[0] == pictures[1]
    assert "cache hit for 'jit_sample'" not in said[0]
    assert "cache hit for 'jit_sample'" in said[1]
    foreign = [line for line in said[1].splitlines() if ".cc:" in line]  # XLA's, about machines that do not match
    assert foreign == []


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Command lines, one a subcommand that computes, whose arguments are right."""
    folder = tmp_path_factory.mktemp("platforms")
    model = lively_model(TINY).save(folder / "model", source="a test")
    picture = folder / "pictures/class/a.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (6, 6)).save(picture)
    config = folder / "config.py"
    config.write_text(
        "from hmar_jax.config import DataConfig, TrainConfig, to_config_dict\n"
        "def get_config():\n    return to_config_dict(TrainConfig(stage='tokenizer', data=DataConfig('glyphs')))\n"
    )
    of_folder = ["--config.data.source=folder", f"--config.data.path={folder / 'pictures'}"]
    output = f"--output={folder / 'out'}"
    return {
        "train": [f"--config={config}", f"--workdir={folder / 'run'}"],
        "sample": [f"--model={model}", "--labels=0", output],
        "edit": [f"--model={model}", f"--image={picture}", "--box=0,0,2,2", f"--output={folder / 'b.png'}"],
        "export": ["tokens", f"--config={config}", *of_folder, f"--model={model}", output],
        "bench": ["attention", "--sides=1,2", output],
        "demo": ["--quick", output],
    }


# What the command would do; JAX is started by the first that it computes.
NOTHING_THERE = """
import sys
from hmar_jax.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("platform", "command"),
    [*(("cuda", command) for command in ("train", "sample", "edit", "export", "bench", "demo")), ("no-such", "demo")],
)
def test_a_platform_that_is_not_here_is_one_sentence(commands, platform, command):
    environment = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run(
        [sys.executable, "-c", NOTHING_THERE, command, *commands[command]],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert f"JAX cannot start on JAX_PLATFORMS={platform} (" in done.stderr.splitlines()[-1]


def test_other_errors_stay_what_they_are():
    for error in (AssertionError(), AssertionError("x"), RuntimeError("Unable to initialize backend 'tpu': busy")):
        with pytest.raises(type(error)) as caught, naming_absent_platforms({}):
            raise error
        assert caught.value is error


def test_a_device_that_another_process_has_may_be_free_later():
    with pytest.raises(TransientError, match="JAX_PLATFORMS=tpu"), naming_absent_platforms({"JAX_PLATFORMS": "tpu"}):
        raise RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process 7")


def test_programs_are_kept_where_nobody_else_may_write(jax_cache, tmp_path, monkeypatch):
    place = tmp_path / "hmar-jax" / "xla"
    place.mkdir(parents=True)
    for folder in (place, place.parent):
        folder.chmod(0o777)
    use_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert jax_cache() == str(place)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (place, place.parent)] == [0o700, 0o700]
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    use_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert jax_cache() is None
