"""`hmar-jax schedule`: the table is exact, the picture true, and what it writes can be sampled by."""

import dataclasses
import sys

import numpy as np
import pytest
import tiny_training as tiny
from matplotlib import colormaps
from PIL import Image

from hmar_jax.commands.main import main
from hmar_jax.config import DataConfig, ModelConfig, TokenizerConfig, TrainConfig, TransformerConfig
from hmar_jax.flops import model_flops, sample_flops
from hmar_jax.sampling import orders, presets
from hmar_jax.sampling.commitment import commitment
from hmar_jax.sampling.generators import CURVES
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder

LADDER = ScaleLadder.preset(256)
SHOWN = ["cfg", "temperature", "top-k", "top-p", "noise"]


@pytest.fixture
def said(capsys):
    """Runs `hmar-jax schedule`; what it printed, or its sentence where that is `refused`."""

    def run(*words, refused=False):
        capsys.readouterr()
        assert main(["schedule", *map(str, words)]) == (2 if refused else 0)
        out, err = capsys.readouterr()
        assert (out == "") == refused
        return err if refused else out

    return run


def test_the_table_has_each_scale_and_what_all_of_them_cost(said):
    lines = said("show", "official-256").splitlines()
    assert lines[0].split() == ["scale", "side", "steps", "commit", "guided", *SHOWN, "FLOPs"]
    assert len({len(line) for line in lines[:11]}) == 1
    rows = [line.split("  ") for line in lines[1:11]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows[2] == ["3", "3", "4", "1+1+2+5", "1 of 4", "0.3778, 3×0", "1", "1000", "0.99", "0", "3.2%"]
    assert rows[9] == ["10", "16", "1", "256", "1 of 1", "1.7", "1", "1000", "0.99", "0", "37.4%"]
    assert lines[11] == "passes: 14, 4 of them masked, 9 guided"
    assert lines[-1] == f"digest: {Schedule.preset('official-256', LADDER).digest}"


def test_flops_are_those_of_the_tokens_that_passes_run_over(said):
    """d16 by hand: 24C² a token and block, 2CV a token, 4C for each pair, twice where guided."""
    schedule = Schedule.parse("cosine:3@4-6", LADDER)
    total = 0
    for side, steps, guided in zip(LADDER.sides, schedule.counts, schedule.plan.guided, strict=True):
        halves = sum(2 if step else 1 for step in guided)
        assert len(guided) == len(steps)
        length = side * side
        total += halves * length * (16 * (24 * 1024**2 + 4 * 1024 * length) + 2 * 1024 * 4096)
    assert f"transformer of depth 16: {total / 1e12:.4g} TFLOP a picture" in said("show", "cosine:3@4-6", "--depth=16")


@pytest.mark.parametrize("name", ["d24", "var-d16"])
def test_one_unguided_step_a_scale_is_the_forward_pass_of_training(name):
    transformer = TransformerConfig.preset(name, masked=False)
    model = ModelConfig(LADDER, TokenizerConfig(), transformer)
    data = DataConfig(source="tokens", path="tokens")
    step = model_flops(TrainConfig(init_from="model", data=data, batch_size=1, transformer=transformer), model)
    passes = sample_flops(model, Schedule.preset("next-scale", LADDER).replace(cfg=0).plan)
    total = {part: sum(flops[part] for flops in passes) for part in passes[0]}
    assert total["trunk"] + total["branch"] == pytest.approx(step["blocks"] / 3)
    assert total["branch"] * transformer.trunk_depth == pytest.approx(total["trunk"] * transformer.branch_depth)
    assert total["attention"] == pytest.approx(step["attention"] / 3)
    assert (total["head"], total["null"]) == (step["head"] / 3, 0)


def test_guidance_doubles_the_passes_that_have_it_and_all_of_a_var():
    plan = Schedule.from_counts([[1], [1, 3]], refine_cfg=1.0).plan
    for name, doubled in (("d16", [False, True, True]), ("var-d16", [True, True, True])):
        model = ModelConfig(ScaleLadder((1, 2)), TokenizerConfig(), TransformerConfig.preset(name))
        for flops, twice in zip(sample_flops(model, plan), doubled, strict=True):
            null = flops.pop("null")
            assert null == (sum(flops.values()) if twice else 0)


def test_options_change_the_schedule_and_json_brings_it_back(said, tmp_path):
    file = tmp_path / "s.json"
    options = ["--cfg=2", "--refine-cfg=0.5", "--top-k=50", "--top-p=0.9", "--temperature=0.8", "--order=halton"]
    shown = said("show", "power2:4@3-9", "--depth=d30", *options, "--noise=1", f"--json={file}")
    schedule = Schedule.generate(
        LADDER,
        "power",
        4,
        (3, 9),
        exponent=2,
        cfg=2,
        refine_cfg=0.5,
        top_k=50,
        top_p=0.9,
        temperature=0.8,
        noise=1,
        order="halton",
    )
    assert Schedule.from_json(file.read_text()) == schedule
    assert shown.endswith(f"order: halton\ndigest: {schedule.digest}\n")
    assert said("show", file, "--depth=d30") == shown


def test_a_models_own_ladder_and_depth_are_taken(said, tmp_path_factory, tmp_path):
    starts = tiny.once(tiny.shared_folder(tmp_path_factory) / "starts", tiny.write_starts)
    shown = said("show", "next-scale", f"--model={starts / 'next_scale'}", f"--json={tmp_path / 's.json'}")
    assert Schedule.from_json((tmp_path / "s.json").read_text()).sides == (1, 2, 8)
    assert "passes: 3, 0 of them masked, 2 guided" in shown
    assert "order: confidence, without effect: no masked steps" in shown
    refusal = said("show", "small", f"--model={starts / 'next_scale'}", refused=True)
    assert "A schedule with masked steps needs a mask branch" in refusal
    assert "is a tokenizer alone" in said("show", "small", f"--model={starts / 'tokenizer'}", refused=True)


@pytest.mark.parametrize("policy", orders.ORDERS)
def test_the_maps_show_the_counts_at_their_places(policy):
    schedule = Schedule.generate(LADDER, "cosine", 5, (2, 6), order=policy)
    maps, title = commitment(schedule)
    assert policy in title
    for (_, steps), counts, side in zip(maps, schedule.counts, schedule.sides, strict=True):
        assert steps.shape == (side, side)
        assert np.bincount(steps.ravel()).tolist() == list(counts)
        if policy == "halton":
            in_order = steps.ravel()[np.argsort(orders.halton(side))]
            assert (np.diff(in_order) >= 0).all()


@pytest.mark.parametrize("text", ["single", "cosine:5@2-6", "equal:30@10"])
def test_the_picture_has_a_colour_for_each_step(said, tmp_path, text):
    file = tmp_path / "new" / "s.png"
    said("show", text, "--order=random", f"--output={file}")
    pixels = {tuple(pixel) for pixel in np.asarray(Image.open(file)).reshape(-1, 3)}
    steps = max(map(len, Schedule.parse(text, LADDER).counts))
    colours = colormaps["viridis"].resampled(steps)(np.arange(steps), bytes=True)[:, :3]
    assert {tuple(colour) for colour in colours} <= pixels


def test_a_picture_needs_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["schedule", "show", "single", f"--output={tmp_path / 's.png'}"]) == 2
    assert "Pictures of schedules need matplotlib; install it with `pip install matplotlib`." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_list_has_all_there_are_and_they_parse(said):
    lines = said("list").splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names[: len(presets.NAMES)] == list(presets.NAMES)
    curves = names[len(presets.NAMES) : -2]
    assert names[-2:] == ["F.json", "default"]
    assert [name.rstrip("0123456789:@-") for name in curves] == list(CURVES)
    for name in curves:
        Schedule.parse(name, LADDER)


REFUSED = {
    "unknown": (["quick"], "Schedule 'quick' is unknown; choose official-256"),
    "a preset of another ladder": (["official-512"], "official-512 is for the sides 1,2,3,4,6"),
    "scales that are not there": (["cosine:4@5-12"], "Scales are (5, 12); expected"),
    "a curve without steps": (["cosine"], "The steps of curve 'cosine' are None"),
    "no such ladder": (["small", "--pixels=300"], "No ladder is named '300'"),
    "sides that are none": (["small", "--sides=1,x"], "Sides '1,x' are not a list of whole numbers"),
    "no such depth": (["small", "--depth=17"], "No transformer is named 'd17'"),
    "masked steps for a VAR": (["small", "--depth=var-d16"], "A schedule with masked steps needs a mask branch"),
    "a scalar out of range": (["small", "--top-p=2"], "top_p is 2.0; expected above 0"),
    "no such model": (["small", "--model=/nowhere/at/all"], "/nowhere/at/all is not a model directory"),
    "a file that is no JSON": (["small", "--json=s.txt"], "--json is s.txt; expected a file that ends in .json"),
    "a file that is no PNG": (["small", "--output=s.jpg"], "--output is s.jpg; expected a file that ends in .png"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_show_refuses(said, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, expected = REFUSED[case]
    sentence = said("show", *words, refused=True)
    assert sentence.startswith(f"hmar-jax schedule: {expected}")
    assert sentence.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "rest"), [("sample", []), ("edit", []), ("schedule", ["show"])])
def test_wherever_a_schedule_is_taken_so_are_the_options_that_change_it(command, rest, capsys):
    with pytest.raises(SystemExit):
        main([command, *rest, "--help"])
    shown = capsys.readouterr().out
    fields = {field.name for field in dataclasses.fields(Schedule)} - {"counts"} | {"refine_cfg"}
    for name in fields:
        assert f"--{name.replace('_', '-')}" in shown
    assert "cosine:4@5-9" in " ".join(shown.split())
