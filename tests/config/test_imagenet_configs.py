"""configs/imagenet*.py: the published recipes, at sizes that fit the machines their headers name."""

import ast
import re
from pathlib import Path

import pytest

from hmar_jax.config import ModelConfig, TokenizerConfig, load
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder
from hmar_jax.training.settings import used

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
IMAGES = 1_281_167

# Published: epochs of the two stages, batch, base learning rate, final ratio, final weight decay.
PUBLISHED = {
    16: (200, 100, 768, 1e-4, 0.1, 0.05),
    20: (250, 100, 768, 1e-4, 0.1, 0.05),
    24: (350, 100, 768, 8e-5, 0.01, 0.05),
    30: (350, 100, 1024, 8e-5, 0.01, 0.08),
}
MODELS = pytest.mark.parametrize("resolution", [256, 512])
DEPTHS = pytest.mark.parametrize("depth", PUBLISHED)


def header(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text())) or ""


def stages(resolution, depth):
    file = CONFIGS / f"imagenet{resolution}_d{depth}.py"
    first, named = load(str(file)), load(f"{file}:next_scale")
    assert first == named
    return file, first, load(f"{file}:masked")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("[!_]*.py")), ids=lambda file: file.stem)
def test_every_config_loads_and_says_its_command(file):
    load(str(file))
    assert f"hmar-jax train --config=configs/{file.name} " in header(file)


@pytest.mark.parametrize("kind", ["folder", "glyphs"])
def test_the_later_stages_say_nothing_that_init_from_says(kind):
    for stage in ("next_scale", "masked"):
        config = load(str(CONFIGS / f"{kind}_{stage}.py"))
        assert used(config) == config


@MODELS
@DEPTHS
class TestPublishedRecipe:
    def test_training(self, resolution, depth):
        *epochs, batch, base_lr, final_lr, final_decay = PUBLISHED[depth]
        for count, config in zip(epochs, stages(resolution, depth)[1:], strict=True):
            assert config.steps == count * IMAGES // batch
            assert config.batch_size == batch
            optimizer = config.optimizer
            assert (optimizer.base_lr, optimizer.final_lr) == (base_lr, final_lr)
            assert (optimizer.weight_decay, optimizer.final_weight_decay) == (0.05, final_decay)
            assert (optimizer.b1, optimizer.b2, optimizer.clip, optimizer.ema) == (0.9, 0.95, 2.0, 0.0)
            assert (optimizer.warmup, optimizer.warmup_from, optimizer.flat) == (0.02, 0.005, 0.05)
            assert config.objective.scale_weights == "log_normal"
            assert config.dtype == "bfloat16"

    def test_pictures(self, resolution, depth):
        file, tokens = CONFIGS / "imagenet256_tokenizer.py", stages(resolution, depth)[1].data.path
        export = rf"hmar-jax export tokens --config=configs/{file.name} (.*) --output={tokens}$"
        (command,) = re.findall(export, header(file), re.MULTILINE)
        data = load(str(file), [word for word in command.split() if word.startswith("--config.")]).data
        assert (data.name, data.split, data.resize, data.crop) == ("imagenet2012", "train", 1.125, "random")
        assert data.flip is False

    def test_model(self, resolution, depth):
        transformer = stages(resolution, depth)[1].transformer
        assert (transformer.depth, transformer.width, transformer.heads) == (depth, 64 * depth, depth)
        assert (transformer.branch_depth, transformer.num_classes, transformer.class_dropout) == (8, 1000, 0.1)
        assert transformer.drop_path == pytest.approx(0.1 * depth / 24)

    def test_samples_can_be_drawn(self, resolution, depth):
        _, first, second = stages(resolution, depth)
        for config, masked in ((first, False), (second, True)):
            schedule = Schedule.preset(config.sample_schedule, ScaleLadder.preset(resolution), depth)
            assert schedule.has_masked_steps == masked
            assert set(config.sample_labels) <= set(range(1000))

    def test_the_stages_lead_to_each_other(self, resolution, depth):
        file, first, second = stages(resolution, depth)
        commands = re.findall(r"--config=configs/(\S+) --workdir=(\S+)", header(file))
        assert [name for name, _ in commands] == [file.name, f"{file.name}:masked"]
        assert second.init_from == f"{commands[0][1]}/model"
        prepared = header(CONFIGS / "imagenet256_tokenizer.py")
        assert f"--output={first.data.path}" in prepared and first.data == second.data
        assert f"--model={first.init_from} --output={first.data.path}" in prepared

    def test_fits_the_machines_of_its_header(self, resolution, depth):
        file, *both = stages(resolution, depth)
        found = re.search(r"--config\.accumulate=(\d+)", header(file))
        for config in both:
            for chips, accumulate in ((256, 1), (64, 1), (8, int(found[1]) if found else 1)):
                assert chips % config.mesh.fsdp == 0
                assert config.batch_size % (chips * accumulate) == 0


def test_the_tokenizer_is_the_published_one_and_serves_both_resolutions():
    file = CONFIGS / "imagenet256_tokenizer.py"
    config = load(str(file))
    assert config.tokenizer == TokenizerConfig()
    assert ModelConfig(ScaleLadder(config.sides), config.tokenizer).image_size == 256
    assert config.sides == ScaleLadder.preset(256).sides
    sides = {tuple(map(int, text.split(","))) for text in re.findall(r"--sides=(\S+)", header(file))}
    assert sides == {ScaleLadder.preset(256).sides, ScaleLadder.preset(512).sides}
    assert all(config.batch_size % chips == 0 for chips in (256, 64, 8))
