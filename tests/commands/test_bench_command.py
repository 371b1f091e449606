"""`hmar-jax bench attention` from the command line to its table, files and refusals."""

import argparse
import dataclasses
import json
import logging
import sys
import types

import jax
import pytest
from PIL import Image

from hmar_jax.bench import attention
from hmar_jax.commands import bench
from hmar_jax.commands.main import main
from pallas_kernels.scale_attention import api
from pallas_kernels.scale_attention.bench.peers import PEERS
from pallas_kernels.scale_attention.xla import xla_attention

TINY = ["--sides=1,2,3", "--batch=1", "--heads=2", "--head-size=8", "--repeats=1"]


def measured(folder, *options):
    logging.getLogger("pallas_kernels").setLevel(logging.WARNING)
    return main(["bench", "attention", *TINY, "--implementations=xla,reference", f"--output={folder}", *options])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command wrote about both kinds of attention."""
    folder = tmp_path_factory.mktemp("bench") / "not made yet"
    assert measured(folder) == 0
    return folder


@pytest.fixture
def report(folder):
    return json.loads((folder / "attention.json").read_text())


def test_everything_is_measured_without_and_with_qk_norm(report):
    assert [found["setting"]["norm"] for found in report["settings"]] == [False, True]
    for found in report["settings"]:
        names = {row["name"]: row for row in found["rows"]}
        for name in ("xla", "reference"):
            assert (names[name]["right"], names[name]["absent"]) == (True, None)
            assert max(names[name]["errors"].values()) < 1e-5
            assert all(0 < time["low"] <= time["median"] <= time["high"] for time in names[name]["times"].values())
        assert "needs a TPU" in names["splash attention"]["absent"]


def test_the_report_says_on_what_it_was_measured(report):
    assert report["device"].startswith("CPU")
    assert {"python", "jax", "jaxlib"} <= report["versions"].keys()
    assert min(report["rates"].values()) > 0
    assert report["settings"][0]["setting"]["ladder"] == [1, 2, 3]
    assert report["settings"][0]["work"]["forward"]["flops"] == 4 * 2 * 8 * (1 + 16 + 81)


def test_the_page_has_a_table_a_setting(folder):
    page = (folder / "attention.md").read_text()
    assert page.count("### N=14 B=1 H=2 D=8 float32 block_diagonal, ") == 2
    assert page.count("| xla * |") == page.count("| reference |") == 2
    assert page.count("* splash attention: absent, needs a TPU.") == 2


def test_the_plot_is_a_picture(folder):
    with Image.open(folder / "attention.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**20)) > 10


def test_without_matplotlib_there_is_a_sentence_and_no_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert measured(tmp_path, "--no-norm", "--peers=none", "--implementations=xla") == 0
    out, err = capsys.readouterr()
    assert "There is no plot: Bar plots need matplotlib; install it with `pip install matplotlib`." in err
    assert {entry.name for entry in tmp_path.iterdir()} == {"attention.json", "attention.md"}
    assert f"The same is in {tmp_path / 'attention.json'}, {tmp_path / 'attention.md'}\n" in out
    assert "without QK-norm" in out
    assert "with QK-norm" not in out
    assert "absent" not in out


def arguments(*options):
    parser = argparse.ArgumentParser()
    bench.add_attention(parser.add_subparsers())
    return parser.parse_args(["attention", *options])


def shapes(settings):
    return [(s.ladder.length, s.batch, s.heads, s.head_size, s.dtype, s.pattern, s.norm) for s in settings]


def test_an_accelerator_gets_the_published_settings():
    published = [(680, 64, 16), (2240, 16, 24), (9451, 2, 24)]
    rest = (64, "bfloat16", "block_diagonal")
    expected = [(*shape, *rest, norm) for shape in published for norm in (False, True)]
    assert shapes(bench.attention_settings(arguments(), on_cpu=False)) == expected


def test_options_change_what_they_name():
    options = arguments("--pixels=512", "--heads=3", "--dtype=float16", "--pattern=block_causal", "--norm")
    expected = [(2240, 16, 3, 64, "float16", "block_causal", True)]
    assert shapes(bench.attention_settings(options, on_cpu=False)) == expected


def test_without_an_accelerator_the_usual_setting_is_small():
    expected = [(155, 2, 4, 64, "float32", "block_diagonal", norm) for norm in (False, True)]
    assert shapes(bench.attention_settings(arguments(), on_cpu=True)) == expected


def test_each_ladder_is_a_setting():
    options = arguments("--pixels=256", "--sides=16", "--sides=1,2,3", "--no-norm")
    measured = bench.attention_settings(options, on_cpu=False)
    assert [(s.ladder.length, s.batch, s.heads) for s in measured] == [(680, 64, 16), (256, 16, 16), (14, 16, 16)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none", []),
        ("flex, cudnn", ["FlexAttention", "cuDNN, packed", "cuDNN, by scale", "cuDNN, dense mask"]),
        ("SDPA flash,sdpa", ["SDPA flash, by scale", "SDPA, dense mask"]),
        (None, list(PEERS)),
    ],
)
def test_peers_are_chosen_by_how_their_names_start(text, names):
    assert attention.parse_peers(text) == names


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of tiles, as tuning sees them."""

    rows: int


def test_a_kernel_is_tuned(monkeypatch, capsys):
    """One whose sizes make no difference, and where XLA is the kernel."""

    def attend(q, k, v, ranges, q_scale, *, blocks):
        return xla_attention(q, k, v, ranges, q_scale)

    kernel = types.SimpleNamespace(
        candidates=lambda *_: [Blocks(64), Blocks(128)], table_entry=lambda *_: "TUNED[0]", hopper_attention=attend
    )
    monkeypatch.setitem(sys.modules, "pallas_kernels.scale_attention.hopper.attention", kernel)
    monkeypatch.setattr(api, "choose", lambda *_: "hopper")
    assert main(["bench", "attention", "--tune", "--no-norm", *TINY]) == 0
    title, *lines = capsys.readouterr().out.strip().splitlines()
    assert title.startswith("hopper, N=14 B=1 H=2 D=8 float32 block_diagonal, without QK-norm")
    assert [line.split()[-1] for line in lines[:2]] == ["Blocks(rows=64)", "Blocks(rows=128)"]
    assert "Blocks(rows=64)" in lines[2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sides=3,2"], "Sides (3, 2) are not an increasing list of positive integers"),
        (["--sides=1,x"], "Sides '1,x' are not a list of whole numbers"),
        (["--pixels=300"], "No ladder is named '300'; choose one of 64, 128, 256, 512, 1024."),
        (["--sides="], "Sides '' are not a list of whole numbers"),
        (["--batch=0"], "--batch is 0; expected a whole number, 1 to 65536."),
        (["--head-size=-8"], "--head-size is -8; expected a whole number, 1 to 65536."),
        (["--repeats=0"], "--repeats is 0; expected a whole number, 1 to 65536."),
        (["--implementations=xla,cudnn"], "--implementations names 'cudnn'; expected some of "),
        (["--implementations="], "--implementations names ''"),
        (
            ["--peers=cudnn,flash"],
            "--peers names 'flash'; expected none, or beginnings of FlexAttention;",
        ),
        (["--peers="], "--peers names ''"),
        (
            ["--tune", *TINY],
            "There is no kernel to tune here: N=14 B=1 H=2 D=8 float32",
        ),
        (["--tune", "--implementations=tpu"], "scale_attention cannot run as 'tpu' on cpu with q of float32"),
        (["--output=/dev/null"], "--output is /dev/null, but /dev/null is a file"),
    ],
)
def test_a_bad_argument_is_one_sentence(tmp_path, capsys, options, sentence):
    assert main(["bench", "attention", f"--output={tmp_path / 'out'}", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"hmar-jax bench: {sentence}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--tune"]], ids=["bench", "tune"])
def test_inputs_that_do_not_fit_are_one_sentence(tmp_path, monkeypatch, capsys, options):
    def make_case(setting, seed=0):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwith a page of details")

    monkeypatch.setattr("pallas_kernels.scale_attention.bench.cases.make_case", make_case)
    monkeypatch.setattr(attention, "kernels_to_tune", lambda *_: ["hopper"])
    assert measured(tmp_path, *options) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith("hmar-jax bench: This device cannot prepare N=14 B=1 H=2 D=8 float32")
    assert sentence.endswith("(RESOURCE_EXHAUSTED: Out of memory); choose a smaller --batch.")


def test_help_names_what_can_be_measured(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--help"])
    assert stopped.value.code == 0
    assert "attention" in capsys.readouterr().out
