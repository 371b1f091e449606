"""parameters → `samples/STEP.png` in the work directory, while a stage trains."""

from __future__ import annotations

from pathlib import Path

from hmar_jax import images, plots
from hmar_jax.config import ModelConfig, TrainConfig
from hmar_jax.data import pipeline
from hmar_jax.data.sources import Sources
from hmar_jax.errors import InputError, shown
from hmar_jax.model import Model
from hmar_jax.parallel import processes
from hmar_jax.params import Tree
from hmar_jax.sampling.schedule import Schedule


def check_samples(config: TrainConfig, model: ModelConfig) -> None:
    """Raises InputError now, not after hours of training, where sample pictures could not be drawn."""
    if not config.sample_every or model.transformer is None:
        return
    wrong = [label for label in config.sample_labels if not 0 <= label < model.num_classes]
    if wrong or not config.sample_labels:
        raise InputError(
            f"sample_labels={shown(config.sample_labels)} is not a list of the classes 0 to {model.num_classes - 1}; "
            "set it to some of those, or sample_every to 0."
        )
    schedule = Schedule.parse(config.sample_schedule, model.ladder, model.transformer.depth)
    if schedule.has_masked_steps and not model.transformer.masked:
        raise InputError(
            f"sample_schedule={shown(config.sample_schedule)} has masked steps, which stage {config.stage!r} does not "
            "have; set it to 'next-scale', or sample_every to 0."
        )


class SampleWriter:
    """Draws the same pictures every time: of a transformer the labels and seed of the config, of a tokenizer the
    reconstructions of pictures that are held out, where any are.
    """  # fmt: skip

    def __init__(self, config: TrainConfig, model_config: ModelConfig, sources: Sources, workdir: Path):
        self._config, self._model_config, self._folder = config, model_config, workdir / "samples"
        self._enlarge = max(1, 96 // model_config.image_size)
        if config.stage == "tokenizer" and config.sample_every:
            size, seed = model_config.image_size, config.seed + 1
            source = sources.open("validation" if sources.has_validation() else "train", seed)
            held = pipeline.batches(config.data, batch_size=16, image_size=size, seed=seed, source=source)
            self._originals = next(held)["image"]
            held.close()

    def __call__(self, step: int, params: Tree) -> None:
        """Writes the picture of a step from a model's parameters."""
        config, model = self._config, Model(self._model_config, params, self._config.dtype)
        if config.stage == "tokenizer":
            picture = plots.reconstructions(model.tokenizer, self._originals, enlarge=self._enlarge)
        else:
            drawn = model.sample(config.sample_labels, config.sample_schedule, seed=config.seed)
            picture = drawn.grid(8, self._enlarge)
        if processes.is_first():
            images.save_png(picture, self._folder / f"{step:08d}.png")
