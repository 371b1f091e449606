import pytest
import tiny_training


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    with tiny_training.quick_compilation(tiny_training.shared_folder(tmp_path_factory) / "compiled"):
        yield


@pytest.fixture(scope="session")
def starts(tmp_path_factory):
    """Folder with `tokenizer`, `next_scale` (model directories) and `tokens` (a cache): what the stages start from."""
    return tiny_training.once(tiny_training.shared_folder(tmp_path_factory) / "starts", tiny_training.write_starts)
