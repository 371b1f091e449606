"""model directory ⇄ Model. A directory holds `config.json` and `model.safetensors`; no pickles.

`config.json` has the format's version, the `ModelConfig`, `source`, one line on where the weights come from, the
SHA-256 of the weights file and that of the tokenizer's weights alone, by which a token cache is known to be its own.
Entries of the weights file are our dotted parameter names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from hmar_jax import params as trees
from hmar_jax.config import ModelConfig, from_plain, to_plain
from hmar_jax.errors import InputError
from hmar_jax.files import remedy
from hmar_jax.model import Model, structure

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def from_pretrained(path: str | Path, dtype: str = "float32") -> Model:
    """Loads a model directory.

    Args:
      path: of the directory. dtype: compute dtype, `float32` or `bfloat16`; parameters stay as stored.

    Raises:
      InputError: no model there, damaged weights, or entries that don't fit the config, by name.
    """
    path = Path(path)
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}; use 'float32' or 'bfloat16'.")
    config, meta = read_config(path)
    weights = path / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{path} has no {WEIGHTS}; it is not a whole model directory, so export the model again.")
    if _sha256(weights) != meta["sha256"]:
        raise InputError(f"{weights} is damaged: its checksum is not the one in {CONFIG}; copy or export it again.")
    flat = safetensors.numpy.load_file(weights)
    check_entries(config, flat, str(weights))
    return Model(config, jax.tree.map(jnp.asarray, trees.unflatten(flat)), dtype)


def read_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The `ModelConfig` of a model directory, and all of its `config.json`."""
    try:
        meta = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise InputError(f"{path / CONFIG} has format {meta['format']}; this version reads {FORMAT}.")
        if absent := {"source", "sha256", "tokenizer_sha256"} - meta.keys():
            raise KeyError(*sorted(absent))
        return from_plain(ModelConfig, meta["model"]), meta
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path} is not a model directory: it has no {CONFIG}; `hmar-jax export model` writes one."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path / CONFIG} is damaged ({error}); copy or export the model again.") from None


def check_entries(config: ModelConfig, flat: dict[str, np.ndarray], where: str) -> None:
    """Raises InputError, naming entries, unless `flat` has exactly the parameters of `config`."""
    _, abstract = structure(config)
    expected = {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(abstract)}
    missing, unexpected = sorted(expected.keys() - flat.keys()), sorted(flat.keys() - expected.keys())
    misshapen = [n for n in expected if n in flat and tuple(flat[n].shape) != expected[n]]
    for what, names in (("lacks", missing), ("has the unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{where} {what} {', '.join(names[:3])}{more}; weights and config are not of one model.")
    if misshapen:
        name = misshapen[0]
        raise InputError(f"{where} has {name} of shape {tuple(flat[name].shape)}; its config wants {expected[name]}.")


def save_model(path: str | Path, model: Model, source: str, *, replace: bool = False) -> Path:
    """Writes a model directory, whole or not at all.

    Args:
      path: to write to; must not exist, unless `replace`. source: one line on where the weights come from.

    Raises:
      InputError: the path exists, or the disk refused.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise InputError(f"{path} exists already; remove it, or choose another output directory.")
    flat = {name: np.asarray(leaf) for name, leaf in trees.flatten(model.params).items()}
    check_entries(model.config, flat, "The model")
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        partial.chmod(0o755)
        safetensors.numpy.save_file(flat, partial / WEIGHTS)
        meta = {
            "format": FORMAT,
            "model": to_plain(model.config),
            "source": source,
            "sha256": _sha256(partial / WEIGHTS),
            "tokenizer_sha256": tokenizer_fingerprint(model),
        }
        (partial / CONFIG).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        _swap_in(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"Could not write the model to {path} ({error}); {remedy(error)}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def tokenizer_fingerprint(model: Model) -> str:
    """SHA-256 of the tokenizer's parameters, whatever file they are in."""
    digest = hashlib.sha256()
    for name, leaf in sorted(trees.flatten(model.params["tokenizer"]).items()):
        digest.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _swap_in(new: Path, path: Path) -> None:
    """Renames `new` to `path`; what was there steps aside first, so that no moment has half a directory."""
    if not path.exists():
        os.rename(new, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    old = aside / path.name
    try:
        os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        if old.exists():
            os.rename(old, path)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
