"""model config, parameters, provenance → the model directory's README.md, with the header that the hub reads."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence

from hmar_jax.config import ModelConfig, TransformerConfig
from hmar_jax.errors import printable
from hmar_jax.formats.safetensors_files import Tensor
from hmar_jax.labels import written
from hmar_jax.sampling import presets
from hmar_jax.sampling.schedule import DEFAULT, Schedule


def write(
    name: str,
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    *,
    source: str,
    licences: Sequence[str],
    sampling: Mapping[str, Schedule],
) -> str:
    """The text of a model card.

    Args:
      name: of the model directory.
      source: one line on where the weights come from. licences: sentences on those they are bound to; perhaps none.
      sampling: the schedules that the model recommends, by name; perhaps none.
    """
    what = "Tokenizer" if config.transformer is None else _family(config.transformer)
    bound = printable(" ".join(licences)) or "None is stated: whoever trained these weights decides."
    parts = [
        "---",
        "library_name: hmar-jax",
        *(["license: other"] if licences else []),
        "tags: [jax, flax, image-generation, class-conditional, hmar]",
        "---",
        f"# {printable(name)}",
        "",
        f"{what} for {config.image_size}x{config.image_size} pictures, in the format of HMAR-JAX (hierarchical masked",
        "autoregressive image generation, [arXiv 2506.04421](https://arxiv.org/abs/2506.04421)).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _geometry(config, parameters)),
        f"| source | {printable(source)} |",
        "",
        "## Licence",
        "",
        bound,
        "",
        "## Use",
        "",
        *_usage(name, config, sampling),
        "",
        *(_sampling(config.transformer, sampling) if config.transformer else []),
    ]
    return "\n".join(parts)


def _family(transformer: TransformerConfig) -> str:
    if transformer.is_var:
        return "VAR: next-scale transformer with tokenizer,"
    return ("HMAR" if transformer.masked else "HMAR of stage 1, without masked steps,") + " with tokenizer,"


def _geometry(config: ModelConfig, parameters: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """What a reader asks first, row by row."""
    ladder, tokenizer, transformer = config.ladder, config.tokenizer, config.transformer
    rows = [
        ("sides of the token maps", f"{', '.join(map(str, ladder.sides))} ({ladder.length} tokens)"),
        (
            "tokenizer",
            f"{_count(parameters, 'tokenizer.')} parameters, {tokenizer.codebook_size} codes of "
            f"{tokenizer.latent_channels} channels, {tokenizer.downsampling} pixels a token side",
        ),
    ]
    if transformer:
        branches = f", last {transformer.branch_depth} in each branch" if transformer.masked else ""
        rows += [
            (
                "transformer",
                f"{_count(parameters, 'transformer.')} parameters, depth {transformer.depth}{branches}, width "
                f"{transformer.width}, {transformer.heads} heads",
            ),
            ("attention", transformer.pattern.replace("_", "-")),
            ("classes", str(transformer.num_classes)),
        ]
    stored = ", ".join(sorted({str(tensor.dtype) for tensor in parameters.values()}))
    size = sum(tensor.nbytes for tensor in parameters.values())
    return [*rows, ("stored as", f"{stored}, {size / 1e9:.2f} GB" if size >= 1e8 else f"{stored}, {size / 1e6:.1f} MB")]


def _count(parameters: Mapping[str, Tensor], prefix: str) -> str:
    number = sum(math.prod(tensor.shape) for name, tensor in parameters.items() if name.startswith(prefix))
    return f"{number / 1e6:.1f}M" if number >= 1e5 else str(number)


def _sampling(transformer: TransformerConfig, sampling: Mapping[str, Schedule]) -> list[str]:
    """The schedules that are recommended, and the guidance of all others."""
    rows = [
        f"| `{name}` | {sum(map(len, schedule.counts))} | {sum(len(steps) - 1 for steps in schedule.counts)} | "
        f"{max(map(max, schedule.cfg)):g} | {schedule.order} | `{schedule.digest}` |"
        for name, schedule in sampling.items()
    ]
    table = [
        "This model recommends these schedules, by name; `default` is used where nothing else is said.",
        "",
        "| schedule | passes | masked | highest cfg | order | digest |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    var = " `var` has the guidance published for VAR of any depth." if transformer.is_var else ""
    others = f"Names of presets and curves bring guidance with them. {presets.guidance_origin(transformer.depth)}{var}"
    return ["## Sampling", "", *(table if sampling else []), others, ""]


def _usage(name: str, config: ModelConfig, sampling: Mapping[str, Schedule]) -> list[str]:
    """Commands that run in the folder that the model directory lies in."""
    load = f"model = hmar_jax.from_pretrained({json.dumps(name, ensure_ascii=False)})"
    size = config.image_size
    if config.transformer is None:
        return [
            "```python",
            "import numpy as np",
            "",
            "import hmar_jax",
            "",
            load,
            f"images = np.zeros((1, {size}, {size}, 3), np.float32)  # in [-1,1]",
            f"tokens = model.tokenizer.encode(images)  # (1,{config.ladder.length}) int32",
            "images = model.tokenizer.decode(tokens)",
            "```",
        ]
    schedule = "" if DEFAULT in sampling else presets.preset_for(config.ladder, config.transformer)
    argument, option = (f', schedule="{schedule}"', f" --schedule={schedule}") if schedule else ("", "")
    labels = [0, config.num_classes - 1]
    listed = shlex.quote(written(labels, config.class_names))
    return [
        "```python",
        "import hmar_jax",
        "",
        load,
        f"out = model.sample({labels}{argument}, seed=0)",
        f"out.images  # (2,{size},{size},3) float32 in [0,1]",
        "```",
        "",
        "```bash",
        f"hmar-jax sample --model={shlex.quote(name)} --labels={listed}{option} --output=samples",
        "```",
    ]
