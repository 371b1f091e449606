"""model directory ⇄ Model. A directory holds `config.json`, `model.safetensors` and a model card; no pickles.

`config.json` has the fields of `_Description`. Entries of the weights file are our dotted parameter names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax import params as trees
from hmar_jax.config import Kind, ModelConfig
from hmar_jax.config.plain import Checked, from_plain, to_plain
from hmar_jax.errors import InputError, printable, saying, shown
from hmar_jax.files import (
    is_there,
    json_files,
    local_path,
    open_regular,
    put_back,
    reading,
    refused_by_disk,
    remove,
    swap_in,
    writing,
)
from hmar_jax.formats import hub, model_card, safetensors_files
from hmar_jax.formats.safetensors_files import Tensor
from hmar_jax.networks import Layout, shapes_of
from hmar_jax.sampling import recommended
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.tokenizer.quantizer import phi_of_scale, recorded_phis, unrecorded_phi_of_scale

logger = logging.getLogger(__name__)

FORMAT = 1
# Names in a config.json → the library whose models have them.
_OTHER_LIBRARIES = {"_class_name": "diffusers", "model_type": "transformers", "architectures": "transformers"}
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


@dataclasses.dataclass(frozen=True)
class _Description(Checked):
    """What a `config.json` says.

    Attributes:
      format: version of the format. digest: SHA-256 of all other fields (`_digest`), by which a change is noticed;
        absent in older directories.
      model: the `ModelConfig`. source: one line on where the weights come from.
      licences: sentences on those the weights are bound to. layout: the official one that they came in, if any.
      sha256: of the weights file.
      sampling: schedules that the model recommends, by name (`sampling.recommended`); absent where there are none.
      tokenizer_sha256: of the tokenizer's weights alone (`_fingerprint`), by which a token cache is known as its own.
    """

    format: int
    model: ModelConfig
    source: str
    licences: tuple[str, ...]
    layout: Literal[Kind, ""]
    sha256: str
    tokenizer_sha256: str
    digest: str = ""
    sampling: object = None


def _digest(meta: Mapping[str, Any]) -> str:
    """SHA-256 of all fields of a `config.json` but `digest`, however the file is laid out."""
    others = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class About(Checked):
    """What a `config.json` says of a model beside its config, as in `_Description`: all that `write_model` is to repeat
    when a loaded model is saved.
    """  # fmt: skip

    source: str = "not stated"
    licences: tuple[str, ...] = ()
    layout: Literal[Kind, ""] = ""


class Opened(NamedTuple):
    """A model directory, checked.

    Attributes:
      config, meta: as `read_config` gives them. file: the weights, to be read one by one.
    """

    config: ModelConfig
    meta: dict[str, Any]
    file: safetensors_files.File

    @property
    def about(self) -> About:
        return About(self.meta["source"], tuple(self.meta["licences"]), self.meta["layout"])

    @property
    def sampling(self) -> dict[str, Schedule]:
        return sampling_of(self.config, self.meta)


def open_model(path: str | Path, revision: str | None = None) -> Opened:
    """Opens a model directory or hub id; arguments and errors are those of `from_pretrained`."""
    local = locate(path, revision)
    config, meta = read_config(local)
    weights = local / WEIGHTS
    cached = f"delete {local.parent.parent}, the hub's cache of it, and load it again"
    again = "copy or export it again" if local == local_path(path, "The model") else cached
    try:
        with open_regular(weights, "File") as stream, reading(weights):
            size, most = os.fstat(stream.fileno()).st_size, _most_bytes(config)
            if size > most:
                raise InputError(f"{weights} has {size} bytes; a model of its {CONFIG} has {most} at most, so {again}.")
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{local} has no {WEIGHTS}; it is not a whole model directory, so export the model again."
        ) from None
    if digest != meta["sha256"]:
        with open_regular(weights, "File") as stream:
            safetensors_files.check_downloaded(weights, stream.read(64))
        raise InputError(f"{weights} is damaged: its checksum is not the one in {CONFIG}; {again}.")
    file = safetensors_files.File(weights)
    check_entries(config, file.shapes, str(weights))
    safetensors_files.check_floats(file.dtypes, ("float32", "bfloat16", "float16"), str(weights))
    if "digest" in meta and meta["digest"] != _digest(meta):
        # Not refused: people change class names and licences by hand, and much else no longer fits the weights.
        logger.warning(
            "%s is not as it was written, since its digest is of other fields. If you have changed it, delete the line "
            "with its digest; if not, %s.",
            printable(str(local / CONFIG), 400),
            again,
        )
    return Opened(config, meta, file)


def read_params(
    opened: Opened, only: str = "", put: Callable[[str, np.ndarray], jax.Array] = lambda _, array: jnp.asarray(array)
) -> trees.Tree:
    """The parameters of a model directory, one by one from the file to where they are to live.

    Args:
      only: `tokenizer` or `transformer`, to have that network's parameters alone.
      put: (dotted name, array in host memory) → array on devices; the default device if not given.
    """
    names = [name for name in opened.file.shapes if name.startswith(only)]
    return trees.unflatten({name: put(name, opened.file.read(name)) for name in names})


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The local directory of a model: the path itself, or where the download of a hub id lies.

    What could be either is a hub id where neither it nor a folder of its first name is here.
    """
    local, text = local_path(path, "The model"), os.fspath(path)
    with contextlib.suppress(OSError):  # a reader need not be allowed to
        put_back(local)
    there = is_there(local, "Model directory")
    if there or not hub.is_hub_id(text):
        if revision is not None:
            raise InputError(f"{text} is a local path, which has no revision {shown(revision)}; leave revision out.")
        return local
    if local.parent.is_dir():
        raise InputError(
            f"{text} does not exist, and was not looked for on the Hugging Face hub, since there is a folder "
            f"{local.parent} here; check the path, or, for a model of the hub, work in another folder."
        )
    return hub.download(text, revision, (CONFIG, WEIGHTS))


def read_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The `ModelConfig` of a model directory, and all of its `config.json`.

    Raises:
      InputError: it is no model directory, or its `config.json` is damaged or describes no model.
    """
    file, again = path / CONFIG, "copy or export the model again"
    meta = json_files.read(file, "File", again) if is_there(file, "File") else None
    if other := _other_than_model(path, meta):
        raise InputError(f"{path} is not a model directory: it {other}.")
    if not isinstance(meta, dict):
        raise InputError(f"{file} is damaged, as it has {shown(meta)} and no fields; {again}.")
    if (found := meta.get("format", FORMAT)) != FORMAT:
        raise InputError(f"{file} has format {shown(found)}; this version reads {FORMAT}.")
    with saying(f"{file} describes no model"):
        config = _with_phis(from_plain(_Description, meta).model, meta)
    with saying(str(file)):
        sampling_of(config, meta)
    return config, meta


def sampling_of(config: ModelConfig, meta: dict[str, Any]) -> dict[str, Schedule]:
    """The schedules that a model directory recommends, from what `read_config` gives."""
    return recommended.read(meta.get("sampling", {}), config)


def _other_than_model(path: Path, meta: Any) -> str:
    """What a path is that is no model directory, and what to give instead, as the end of a sentence; else empty.

    Args:
      meta: what its `config.json` says, None where there is none.

    Raises:
      InputError: it may not be looked at.
    """

    def has(name: str) -> bool:
        return is_there(path / name, "File")

    if path.is_file() and path.name in (CONFIG, WEIGHTS):
        return f"is a file; give the directory {path.parent}"
    if path.is_file():
        return "is a file; `hmar-jax convert` turns an official checkpoint into a model directory"
    fields = meta if isinstance(meta, dict) else {}
    if "stage" in fields or (not fields and has("checkpoints")):
        return _work_directory(path)
    for mark, library in _OTHER_LIBRARIES.items():
        if mark in fields:
            return f"is a model of {library}; give one that `hmar-jax convert` or `export model` wrote"
    if has(CONFIG):
        return ""
    if has("model_index.json"):
        return "is a pipeline of diffusers, which is another kind of model; give one that `hmar-jax convert` wrote"
    if has("cache.json"):
        return "is a token cache, for data.path; give the model directory that it was exported with"
    if has("samples.json") or has("grid.png"):
        return "holds samples; give the model directory that they were drawn from"
    if inside := sorted(path.glob(f"*/{CONFIG}")) + sorted(path.glob(f"*/model/{CONFIG}")):
        return f"has no {CONFIG}; give a model directory in it, such as {inside[-1].parent}"
    return f"has no {CONFIG}; `hmar-jax export model` and `convert` write one"


def _work_directory(path: Path) -> str:
    """What to give instead of the work directory of a training run, as the end of a sentence."""
    if is_there(path / "model" / CONFIG, "File"):
        return f"is the work directory of a training run; give {path / 'model'}"
    if is_there(path / "checkpoints", "Folder"):
        return (
            "is the work directory of a training run that has not ended; `hmar-jax export model "
            f"--workdir={path} --output=MODEL` writes the model of its newest checkpoint"
        )
    return "is the work directory of a training run that has saved no checkpoint yet; train on"


def _with_phis(config: ModelConfig, meta: dict[str, Any]) -> ModelConfig:
    """The config of a `config.json`, also of one from before `phi_of_scale` was recorded."""
    recorded = "phi_of_scale" in meta["model"]["tokenizer"]
    tokenizer = recorded_phis(config.tokenizer, config.ladder.num_scales, recorded=recorded)
    return dataclasses.replace(config, tokenizer=tokenizer)


def _phis(config: ModelConfig) -> tuple[int, ...]:
    return config.tokenizer.phi_of_scale or phi_of_scale(config.ladder.num_scales, config.tokenizer.phis)


def _most_bytes(config: ModelConfig) -> int:
    """What a weights file of a model has at most, so that not all of a huge one is read before it is refused."""
    return safetensors_files.MOST_HEADER + 4 * sum(math.prod(shape) for shape in shapes_of(config).values())


def check_entries(config: ModelConfig, found: trees.Shapes, where: str) -> None:
    """Raises InputError, naming entries, unless `found` has exactly the parameters of `config`."""
    trees.check_shapes(found, shapes_of(config), where, "weights and config are not of one model.")


def write_model(
    path: str | Path,
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    *,
    source: str,
    licences: Sequence[str] = (),
    layout: str = "",
    sampling: Mapping[str, Schedule] | None = None,
    replace: bool = False,
) -> Path:
    """Writes a model directory, whole or not at all, holding one part of one parameter in memory at a time.

    Args:
      path: to write to; must not exist, unless `replace`.
      parameters: all of them, by dotted name.
      source: one line on where the weights come from.
      licences: sentences on those they are bound to; empty where they are the user's own.
      layout: the official one that the transformer, or a tokenizer alone, was converted from.
      sampling: schedules that the model recommends, by name; `default` is used where nothing else is said.

    Raises:
      InputError: the path exists, a schedule is not for this model, or the disk refused. MachineError: it is full.
    """
    path = local_path(path, "The model's path")
    with writing(path):
        put_back(path)
    if is_there(path, "Directory") and not replace:
        raise InputError(f"{path} exists already; remove it, or choose another output directory.")
    check_entries(config, {name: tensor.shape for name, tensor in parameters.items()}, "The model")
    sampling = sampling or {}
    recommended.check(sampling, config)
    partial = path.with_name(f".{path.name}.partial")
    try:
        remove(partial)  # what a killed run left
        partial.mkdir(parents=True)
        name = printable(path.name)  # names of folders and files may hold line ends, or be no UTF-8
        digests = safetensors_files.write(partial / WEIGHTS, parameters, label=name)
        card = model_card.write(name, config, parameters, source=source, licences=licences, sampling=sampling)
        (partial / CARD).write_text(card, encoding="utf-8")
        recorded = dataclasses.replace(config.tokenizer, phi_of_scale=_phis(config))
        meta = {
            "format": FORMAT,
            "model": to_plain(dataclasses.replace(config, tokenizer=recorded)),
            "source": source,
            "licences": list(licences),
            "layout": layout,
            "sha256": digests.file,
            "tokenizer_sha256": _fingerprint(config, digests.tensors),
            **({"sampling": recommended.to_plain(sampling)} if sampling else {}),
        }
        # Before the other fields, so that its line may be deleted and leave JSON.
        described = {"digest": _digest(meta)} | meta
        (partial / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        swap_in(partial, path)
    except OSError as error:
        raise refused_by_disk(f"Could not write the model to {path}", error) from None
    finally:
        remove(partial)
    return path


def tokenizer_fingerprint(config: ModelConfig, params: trees.Tree) -> str:
    """SHA-256 of the tokenizer's parameters, whatever file they are in, and of which phi each scale uses."""
    flat = trees.flatten({"tokenizer": Layout.unpack(params["tokenizer"])})
    return _fingerprint(config, {name: safetensors_files.digest(np.asarray(leaf)) for name, leaf in flat.items()})


def _fingerprint(config: ModelConfig, digests: Mapping[str, str]) -> str:
    """Of the tokenizer, from the SHA-256 of each parameter's bytes.

    The phi of each scale counts where it is not what it was before it was recorded, so that older caches stay valid.
    """
    of_tokenizer = sorted(item for item in digests.items() if item[0].startswith("tokenizer."))
    phis = _phis(config)
    if phis != unrecorded_phi_of_scale(config.ladder.num_scales, config.tokenizer.phis):
        of_tokenizer.append(("phi_of_scale", ",".join(map(str, phis))))
    return hashlib.sha256(json.dumps(of_tokenizer).encode()).hexdigest()
