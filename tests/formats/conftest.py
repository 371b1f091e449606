import pytest


@pytest.fixture
def saved(model, tmp_path):
    """The directory of a tiny model."""
    return model.save(tmp_path / "model", source="made by a test")
