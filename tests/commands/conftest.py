import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))
import tiny_training

CONFIG = """
from hmar_jax.config import *

def get_config():
    return to_config_dict(TrainConfig({fields}))
"""


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    with tiny_training.quick_compilation(tiny_training.shared_folder(tmp_path_factory) / "compiled"):
        yield


@pytest.fixture(scope="session")
def write_config():
    """(file, config) → the file, as a config file that returns it."""

    def write(file, config):
        file.write_text(CONFIG.format(fields=repr(config).removeprefix("TrainConfig(").removesuffix(")")))
        return file

    return write
