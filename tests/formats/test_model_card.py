"""Model cards: what they state is so, the hub can read their header, and the code they show runs."""

import ast
import dataclasses
import math
import re
import subprocess

import ml_dtypes
import numpy as np
import pytest
import yaml
from tiny_models import TINY, lively_model, tiny

from hmar_jax.commands.main import main
from hmar_jax.config import ModelConfig
from hmar_jax.formats import model_card
from hmar_jax.formats.model_directory import read_config
from hmar_jax.formats.safetensors_files import File, Tensor
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder

# As small as they come: the code in their cards compiles them.
SMALL = dataclasses.replace(
    TINY,
    ladder=ScaleLadder((1, 2)),
    transformer=dataclasses.replace(TINY.transformer, depth=2, branch_depth=1, num_classes=3),
    class_names=("a", "b", "c"),
)


def small(**transformer):
    return dataclasses.replace(SMALL, transformer=dataclasses.replace(SMALL.transformer, **transformer))


# kind → (config, licences)
KINDS = {
    "hmar": (SMALL, ["Not for sale.", "Nor for rent."]),
    "stage-1": (small(masked=False), []),
    "var": (small(masked=False, pattern="block_causal"), ["As the file it came from."]),
    "tokenizer": (dataclasses.replace(SMALL, transformer=None, class_names=()), ["Free."]),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """kind → its model directory; all in one folder."""
    folder = tmp_path_factory.mktemp("cards")
    return {
        kind: lively_model(config).save(folder / kind, source=f"made of {kind} by a test", licences=licences)
        for kind, (config, licences) in KINDS.items()
    }


@pytest.fixture(scope="module", params=list(KINDS))
def directory(request, directories):
    return directories[request.param]


def read(directory):
    return (directory / "README.md").read_text(encoding="utf-8")


def rows(card):
    """The table of a card."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, re.MULTILINE))


def header(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def code(card, language):
    """The one block of code in a language, or None."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert len(blocks) <= 1
    return blocks[0] if blocks else None


def words(command):
    """The words of a command of ours, after its name, as a shell understands them."""
    script = "hmar-jax() { printf '%s\\0' \"$@\"; }\n" + command
    finished = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout.split("\0")[:-1]


def described(config, tensors, **options):
    """The card of a model that is not there."""
    return model_card.write("x", config, tensors, **({"source": "a test", "licences": [], "sampling": {}} | options))


# --- what is stated


def test_a_card_states_what_the_files_hold(directory):
    config, meta = read_config(directory)
    shapes, table = File(directory / "model.safetensors").shapes, rows(read(directory))
    for network in ("tokenizer", "transformer"):
        count = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(f"{network}."))
        assert (network in table) == (count > 0)
        assert count == 0 or table[network].startswith(f"{count} parameters, ")
    assert table["sides of the token maps"] == "1, 2 (5 tokens)"
    assert "16 codes of 4 channels, 2 pixels a token side" in table["tokenizer"]
    assert table["source"] == meta["source"]
    assert table["stored as"] == f"float32, {4 * sum(map(math.prod, shapes.values())) / 1e6:.1f} MB"
    if config.transformer:
        assert table["classes"] == "3"
        assert table["attention"] == config.transformer.pattern.replace("_", "-")
        assert "depth 2" in table["transformer"]
        assert "width 32, 4 heads" in table["transformer"]
        assert ("last 1 in each branch" in table["transformer"]) == config.transformer.masked
    else:
        assert not {"classes", "attention"} & table.keys()


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("hmar", "HMAR with tokenizer, for 4x4 pictures"),
        ("stage-1", "HMAR of stage 1, without masked steps, with tokenizer, for 4x4 pictures"),
        ("var", "VAR: next-scale transformer with tokenizer, for 4x4 pictures"),
        ("tokenizer", "Tokenizer for 4x4 pictures"),
    ],
)
def test_a_card_says_what_kind_of_model_it_is(directories, kind, family):
    card = read(directories[kind])
    assert f"\n# {kind}\n\n{family}, in the format of HMAR-JAX" in card


@pytest.mark.parametrize("kind", ["vae", "hmar"])
def test_the_card_of_a_converted_model_states_file_and_licences(golden_directory, kind):
    directory = golden_directory(kind)
    card, meta = read(directory), read_config(directory)[1]
    assert meta["licences"]
    assert f"## Licence\n\n{' '.join(meta['licences'])}\n" in card
    assert rows(card)["source"] == meta["source"] == f"converted by hmar-jax from {kind}.safetensors ({kind})"
    assert header(card)["license"] == "other"


def test_without_licences_a_card_says_that_none_is_stated(directories):
    card = read(directories["stage-1"])
    assert "## Licence\n\nNone is stated: " in card
    assert "license" not in header(card)


def test_the_hub_can_read_the_header(directory):
    fields = header(read(directory))
    assert fields["library_name"] == "hmar-jax"
    assert set(fields["tags"]) > {"jax", "image-generation"}
    assert fields.keys() <= {"library_name", "license", "tags"}
    assert fields.get("license", "other") == "other"


@pytest.mark.parametrize(
    ("shape", "count", "stored"),
    [
        ((99_999,), "99999", "0.4 MB"),
        ((100_000,), "0.1M", "0.4 MB"),
        ((24_990_000,), "25.0M", "100.0 MB"),
        ((1000, 310_340), "310.3M", "1.24 GB"),
    ],
)
def test_large_counts_and_sizes_are_rounded(shape, count, stored):
    table = rows(described(SMALL, {"transformer.x": Tensor(shape, np.dtype(np.float32), list)}))
    assert table["transformer"].startswith(f"{count} parameters, ")
    assert table["stored as"] == f"float32, {stored}"


def test_every_type_that_is_stored_is_stated():
    dtypes = {"tokenizer.x": np.dtype(np.float32), "transformer.x": np.dtype(ml_dtypes.bfloat16)}
    table = rows(described(SMALL, {name: Tensor((10, 10_000), dtype, list) for name, dtype in dtypes.items()}))
    assert table["stored as"] == "bfloat16, float32, 0.6 MB"


# --- the code that is shown


@pytest.fixture
def in_their_folder(directories, monkeypatch, tmp_path):
    """Works in a folder that holds the directories, by links, so that what is written is apart."""
    for kind, directory in directories.items():
        (tmp_path / kind).symlink_to(directory)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tokenizer"])
def test_the_python_code_gives_pictures(directories, in_their_folder, kind):
    names = {}
    exec(code(read(directories[kind]), "python"), names)
    assert names["out"].images.shape == (2, 4, 4, 3)
    assert names["model"].config == KINDS[kind][0]


def test_the_python_code_of_a_tokenizer_gives_pictures(directories, in_their_folder):
    names = {}
    exec(code(read(directories["tokenizer"]), "python"), names)
    assert names["tokens"].shape[1:] == (5,)
    assert names["images"].shape[1:] == (4, 4, 3)
    assert code(read(directories["tokenizer"]), "bash") is None


def test_the_command_gives_pictures(directories, in_their_folder, capsys):
    assert main(words(code(read(directories["hmar"]), "bash"))) == 0
    pictures = sorted(path.name for path in (in_their_folder / "samples").iterdir())
    assert pictures == ["00000-class0-seed0.png", "00001-class2-seed0.png", "grid.png"]


@pytest.mark.parametrize("name", ["two words", "d16's", '"best"', "a$HOME;b", "schön\\"])
def test_the_code_fits_directories_of_any_name(name):
    card = model_card.write(name, SMALL, {}, source="a test", licences=[], sampling={})
    assert ast.literal_eval(re.search(r"from_pretrained\((.+)\)$", code(card, "python"), re.MULTILINE)[1]) == name
    assert f"--model={name}" in words(code(card, "bash"))


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        (tiny(), "small"),
        (tiny(masked=False), "next-scale"),
        (tiny(masked=False, pattern="block_causal"), "var"),
        *(
            (dataclasses.replace(tiny(), ladder=ScaleLadder.preset(size)), f"official-{size}")
            for size in (256, 512, 1024)
        ),
        (dataclasses.replace(tiny(masked=False), ladder=ScaleLadder.preset(256)), "next-scale"),
        (dataclasses.replace(tiny(masked=False, pattern="block_causal"), ladder=ScaleLadder.preset(256)), "var"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_schedule_shown_is_the_one_for_the_model(config, schedule):
    assert isinstance(config, ModelConfig)
    card = described(config, {})
    assert f'schedule="{schedule}"' in code(card, "python")
    assert f"--schedule={schedule}" in words(code(card, "bash"))


def test_what_the_card_quotes_takes_one_line_each():
    card = model_card.write("a\nb", SMALL, {}, source="x\n| y | z |", licences=["Not for sale.\n# Free"], sampling={})
    lines = card.splitlines()
    assert {"# a\\nb", "| source | x\\n| y | z | |", "Not for sale.\\n# Free"} <= set(lines)


# --- how to sample


def test_recommended_schedules_are_listed_and_the_code_leaves_the_default_out():
    fast, default = (Schedule.preset(name, SMALL.ladder) for name in ("next-scale", "small"))
    card = described(SMALL, {}, sampling={"fast": fast})
    assert 'schedule="small"' in code(card, "python")
    assert f"| `fast` | 2 | 0 | 1.7 | confidence | `{fast.digest}` |\n" in card
    card = described(SMALL, {}, sampling={"fast": fast, "default": default.replace(order="halton", refine_cfg=2)})
    assert "schedule" not in code(card, "python") + code(card, "bash")
    assert "| `default` | 3 | 1 | 2 | halton | `" in card


@pytest.mark.parametrize(
    ("depth", "stated"),
    [
        (16, "cfg 1.7 and top-k 1000 are those published for depth 16."),
        (2, "No guidance was published for depth 2; cfg 1.7 and top-k 1000 are those of depth 16, the nearest."),
        (28, "No guidance was published for depth 28; cfg 1.6 and top-k 650 are those of depth 30, the nearest."),
    ],
)
def test_a_card_states_whose_guidance_schedules_bring(depth, stated):
    sampling = described(small(depth=depth), {}).partition("## Sampling\n")[2]
    assert sampling.startswith(f"\nNames of presets and curves bring guidance with them. {stated}")
    assert "VAR" not in sampling
    var = described(small(depth=depth, masked=False, pattern="block_causal"), {})
    assert "`var` has the guidance published for VAR of any depth.\n" in var
    assert "## Sampling" not in described(KINDS["tokenizer"][0], {})
