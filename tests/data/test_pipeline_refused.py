"""What the pipeline refuses: a config, a batch, a pass or a part of the stream, each in one sentence that names it."""

import dataclasses

import pytest

from hmar_jax.config import DataConfig
from hmar_jax.data.pipeline import batches, example_indices, examples
from hmar_jax.data.sources import Sources
from hmar_jax.errors import InputError

S = 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "lmdb"}, "'lmdb'"),
        ({"resize": 0.9}, "0.9"),
        ({"resize": 288}, "data.resize is 288; expected 1 to 16: it is not in pixels, but the ratio"),
        ({"resize": float("nan")}, "data.resize is nan"),
        ({"resize": float("inf")}, "data.resize is inf"),
        ({"resize": "2"}, "'data.resize' is '2'"),
        ({"crop": "left"}, "'left'"),
        ({"workers": -1}, "-1"),
        ({"workers": 1.5}, r"'data.workers' is 1\.5"),
        ({"workers": True}, "'data.workers' is True"),
        ({"flip": 1}, "'data.flip' is 1"),
        ({"path": 3}, "'data.path' is 3"),
        ({"name": None}, "'data.name' is None"),
        ({"classes": ["a"]}, "'data.classes' is"),
        ({"held_out": "half"}, "'data.held_out' is 'half'"),
        ({"skip_broken": True}, "skip_broken is for 'folder' and 'tfds', and data.source is 'glyphs'"),
        ({"source": "folder", "path": "/nowhere"}, "/nowhere"),
        ({"source": "tokens", "path": "/nowhere"}, "/nowhere"),
        ({"source": "tfds", "name": "nonsense", "path": "/nowhere"}, "nonsense"),
    ],
)
def test_a_bad_config_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        Sources(dataclasses.replace(DataConfig(), **changes), S).open()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rows": [0, 4]}, "rows from 0 to below"),
        ({"rows": []}, "rows=\\[\\]"),
        ({"seed": -1}, "-1"),
        ({"seed": 2**32}, "seed"),
        ({"image_size": 8}, "8 pixels"),
    ],
)
def test_a_bad_batch_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        batches(DataConfig(), **({"batch_size": 4, "image_size": S, "seed": 0} | changes))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DataConfig(), {}, "endless.*count"),
        (DataConfig(), {"count": 0}, "count=0"),
        (DataConfig(), {"count": 1, "crops": 0}, "crops=0"),
        (DataConfig(source="tokens"), {}, "no pictures"),
        (DataConfig(source="folder", crop="center"), {"crops": 2}, "1 different"),
        (DataConfig(source="folder", crop="center", flip=True), {"crops": 3}, "2 different"),
    ],
)
def test_a_bad_pass_is_named_at_once(config, options, message):
    with pytest.raises(InputError, match=message):
        examples(config, S, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": -1}, "start=-1"),
        ({"count": -1}, "count=-1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_bad_part_of_the_stream_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        config = DataConfig()
        example_indices(Sources(config, S).open(), config, **({"start": 0, "count": 1, "seed": 0} | changes))
