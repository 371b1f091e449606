"""official PyTorch files ⇄ model directory, array by array: memory holds one array, whatever the file's size.

`official_layouts.py` knows the names and shapes; this module finds them in a file, and moves what they name.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from hmar_jax.config import Kind, ModelConfig
from hmar_jax.errors import InputError, check_choice, printable, saying, shown
from hmar_jax.files import check_outputs, is_there, local_path, written_whole
from hmar_jax.formats import official_layouts, pytorch_files, safetensors_files
from hmar_jax.formats.model_directory import WEIGHTS, open_model, write_model
from hmar_jax.formats.safetensors_files import Tensor
from hmar_jax.networks import shapes_of
from hmar_jax.params import check_shapes
from hmar_jax.scales import ScaleLadder

# Files in an official layout need not be official ones: own models are exported in it too.
_LICENCES = {
    "hmar": "The transformer keeps the licence of the file it was converted from; official HMAR files are for "
    "non-commercial use.",
    "var": "The transformer keeps the licence of the file it was converted from.",
    "vae": "The tokenizer keeps the licence of the file it was converted from.",
}
_MOST_STATE_DICTS = 100  # in a file, of one kind: each is compared with all of its entries
_NEXT_SCALE, _MASKED = "transformer.next_scale.", "transformer.masked."


def convert(
    kind: Kind,
    source: Path,
    ladder: ScaleLadder,
    output: Path,
    *,
    tokenizer: str | Path | None = None,
    next_scale: str | Path | None = None,
    key: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Writes the model directory of an official file.

    Args:
      source: a `.safetensors` or PyTorch file, of a state dict or of a training checkpoint that nests one.
      ladder: the sides that the model is for, which no file tells.
      tokenizer: model directory (or hub id) whose tokenizer joins the transformer; for all kinds but `vae`.
      next_scale: for `hmar-stage2`, the model converted from its stage 1, which gives the next-scale branch; without
        it both branches get the file's blocks. The classes have the names that this or `tokenizer` has for them, or
        else, being 1000, ImageNet's.
      key: where in a checkpoint the state dict is, with dots, if there are several.
      dtype: `float32`, or `bfloat16` for a file of half the size; the quantizer, biases, norms and scales, next to
        nothing of the whole, are float32 all the same.

    Raises:
      InputError: the file is not of this kind or not whole, by the names of its entries; it doesn't fit the ladder or
        the tokenizer; or the disk refused.
    """
    source, output = local_path(source, "--input"), local_path(output, "--output")
    check_choice("kind", kind, typing.get_args(Kind))
    check_choice("dtype", dtype, ("float32", "bfloat16"))
    for name, part in (("--tokenizer", tokenizer), ("--next-scale", next_scale)):
        if part is not None:
            local_path(part, name)
    check_outputs("--output", [output], {"--input": source, "--tokenizer": tokenizer, "--next-scale": next_scale})
    if is_there(output, "Directory"):
        raise InputError(f"{output} exists already; remove it, or choose another output directory.")
    if (tokenizer is None) != (kind == "vae"):
        raise InputError(f"Kind {kind} goes {'without' if tokenizer else 'with'} --tokenizer, a model directory.")
    if next_scale is not None and kind != "hmar-stage2":
        raise InputError(f"--next-scale is the stage-1 model of an hmar-stage2 file; leave it out for {kind}.")
    state = open_state_dict(source, kind, key)
    official_layouts.check_kind(kind, state.shapes.keys(), state.where)
    base = None if tokenizer is None else _open_part(tokenizer, "tokenizer")
    stage1 = None if next_scale is None else _open_part(next_scale, "transformer")
    config = _config(state, kind, ladder, base, stage1)
    parameters = _from_official(state, config, kind)
    if kind == "hmar-stage2":
        parameters |= _next_scale_branch(parameters, stage1, state.where)
    if base is not None:
        parameters |= base.parameters
    inherited = [licence for part in (base, stage1) if part is not None for licence in part.licences]
    return write_model(
        output,
        config,
        {name: tensor._replace(dtype=_stored_dtype(name, tensor, dtype)) for name, tensor in parameters.items()},
        source=f"converted by hmar-jax from {printable(source.name)} ({kind})",
        licences=list(dict.fromkeys([_LICENCES[kind.split("-")[0]], *inherited])),
        layout=kind,
    )


def export_torch(model: str | Path, output: Path, kind: Kind | None = None) -> Kind:
    """Writes the official state dict of a model directory: the inverse of `convert`, bit for bit in float32.

    Args:
      model: model directory, or hub id. output: a `.safetensors` or `.pth` file.
      kind: `vae` for the tokenizer; by default the transformer's, in the layout that it was converted from.

    Returns:
      The kind that was written.

    Raises:
      InputError: the model has no such part, or is nothing that the official code could run.
    """
    output = local_path(output, "--output")
    check_outputs("--output", [output], {"--model": model, "the weights of --model": Path(model) / WEIGHTS})
    if is_there(output, "File"):
        raise InputError(f"{output} exists already; remove it, or choose another output file.")
    if output.suffix not in (".safetensors", *pytorch_files.SUFFIXES):
        raise InputError(f"Output {output} is no .safetensors or .pth file; give it one of these endings.")
    opened = open_model(model)
    kind = kind or opened.meta["layout"] or official_layouts.kind_of(opened.config)
    _check_exportable(opened.config, kind, str(model))
    state = {
        place.name: Tensor(place.shape, np.dtype(np.float32), functools.partial(_official, opened.file, place))
        for place in official_layouts.places(opened.config, kind)
    }
    with written_whole(output) as partial:
        file_format = safetensors_files if output.suffix == ".safetensors" else pytorch_files
        file_format.write(partial, state, output.name)
    return kind


# ------------------------------------------------------------------------------------------- official → ours


class _Part(NamedTuple):
    """One network of a model directory, to be read when written, and the licences that bind it."""

    where: str
    config: ModelConfig
    licences: list[str]
    parameters: dict[str, Tensor]


def _open_part(model: str | Path, network: str) -> _Part:
    """The tokenizer or the transformer of a model directory, layer by layer where it is stacked."""
    opened = open_model(model)

    def parts(name: str, layers: int | None) -> Iterator[np.ndarray]:
        if layers is None:
            yield opened.file.read(name)
        else:
            yield from (opened.file.read(name, layer) for layer in range(layers))

    parameters = {
        name: Tensor(shape, np.dtype(np.float32), functools.partial(parts, name, shape[0] if _stacked(name) else None))
        for name, shape in opened.file.shapes.items()
        if name.startswith(f"{network}.")
    }
    other = {"tokenizer": "transformer", "transformer": "tokenizer"}[network]
    licences = [licence for licence in opened.meta["licences"] if not licence.startswith(f"The {other} ")]
    return _Part(str(model), opened.config, licences, parameters)


def _config(
    state: StateDict, kind: Kind, ladder: ScaleLadder, tokenizer: _Part | None, stage1: _Part | None
) -> ModelConfig:
    """What the file's shapes and the models beside it say together; InputError where they contradict each other."""
    if tokenizer is None:
        phi_layout = official_layouts.infer_phi_layout(state.shapes)
        sizes = official_layouts.infer_tokenizer(state.shapes, state.where)
        with saying(state.where):
            return ModelConfig(ladder, sizes, phi_layout=phi_layout)
    found, sizes = (
        official_layouts.infer_transformer(state.shapes, kind, ladder, state.where),
        tokenizer.config.tokenizer,
    )
    if (found.codebook_size, found.latent_channels) != (sizes.codebook_size, sizes.latent_channels):
        raise InputError(
            f"{state.where} is for {found.codebook_size} codes of {found.latent_channels} channels, but "
            f"{tokenizer.where} has {sizes.codebook_size} of {sizes.latent_channels}; give the tokenizer that the "
            "transformer was trained with."
        )
    transformer = found.config
    if stage1 is not None:
        start = stage1.config.transformer
        if start is None:
            raise InputError(f"{stage1.where} is a tokenizer alone; --next-scale is a model converted from stage 1.")
        transformer = dataclasses.replace(transformer, branch_depth=start.branch_depth)
        if dataclasses.replace(transformer, masked=start.masked) != start or stage1.config.ladder != ladder:
            raise InputError(
                f"{stage1.where} is not the stage 1 of {state.where}: sizes or sides differ; give the one it started "
                "from."
            )
    names = _class_names(transformer.num_classes, [stage1, tokenizer])
    with saying(tokenizer.where):
        return dataclasses.replace(tokenizer.config, ladder=ladder, transformer=transformer, class_names=names)


def _class_names(classes: int, parts: Sequence[_Part | None]) -> tuple[str, ...]:
    """Those of the first part that names as many classes, else ImageNet's where there are 1000: no file tells them."""
    for part in parts:
        if part is not None and len(part.config.class_names) == classes:
            return part.config.class_names
    imagenet = resources.files("hmar_jax.data").joinpath("imagenet_classes.txt")
    return tuple(imagenet.read_text(encoding="utf-8").splitlines()) if classes == 1000 else ()


def _from_official(state: StateDict, config: ModelConfig, kind: Kind) -> dict[str, Tensor]:
    """Our parameters, to be read from their official arrays when written; checked to be all there, and no others."""
    places = official_layouts.places(config, kind)
    remedy = f"expected all entries of one {kind} and no others."
    check_shapes(state.shapes, {place.name: place.shape for place in places}, state.where, remedy)
    by_path: dict[str, list[official_layouts.Place]] = {}
    for place in places:
        by_path.setdefault(place.path, []).append(place)

    def parts(of_path: list[official_layouts.Place]) -> Iterator[np.ndarray]:
        return (place.layout.ours(state.get(place.name)) for place in of_path)

    shapes = shapes_of(config)
    return {
        path: Tensor(shapes[path], np.dtype(np.float32), functools.partial(parts, of_path))
        for path, of_path in by_path.items()
    }


def _next_scale_branch(parameters: Mapping[str, Tensor], stage1: _Part | None, where: str) -> dict[str, Tensor]:
    """What a stage-2 file lacks: its stage 1's branch or, without that, the mask branch again."""
    if stage1 is None:
        return {
            _NEXT_SCALE + name.removeprefix(_MASKED): tensor
            for name, tensor in parameters.items()
            if name.startswith(_MASKED)
        }
    for name, tensor in stage1.parameters.items():
        if name in parameters and not name.startswith((_MASKED, "transformer.mask_embed")):
            pairs = zip(tensor.parts(), parameters[name].parts(), strict=True)
            if not all(np.array_equal(before, after) for before, after in pairs):
                raise InputError(
                    f"{name} differs between {stage1.where} and {where}; stage 2 leaves it as it was, so give the "
                    "stage-1 model that it started from, converted in float32."
                )
    return {name: tensor for name, tensor in stage1.parameters.items() if name.startswith(_NEXT_SCALE)}


def _stacked(name: str) -> bool:
    return name.startswith("transformer.") and ".blocks." in name


def _stored_dtype(name: str, tensor: Tensor, dtype: str) -> np.dtype:
    """float32, but for matrices and convolutions of a bfloat16 file; the quantizer's argmins would flip in that."""
    vector = len(tensor.shape) - _stacked(name) < 2
    if dtype == "float32" or vector or name.startswith("tokenizer.quantizer."):
        return np.dtype(np.float32)
    return np.dtype(ml_dtypes.bfloat16)


# ------------------------------------------------------------------------------------------- ours → official


def _official(file: safetensors_files.File, place: official_layouts.Place) -> Iterator[np.ndarray]:
    """The one array of a place, float32."""
    yield np.ascontiguousarray(place.layout.official(file.read(place.path, place.layer)), np.float32)


def _check_exportable(config: ModelConfig, kind: Kind, where: str) -> None:
    """Raises InputError where the official code has no such network."""
    own = official_layouts.kind_of(config)
    has = {"vae", own, "hmar-stage2" if own == "hmar" else own}
    if kind not in has:
        raise InputError(f"{where} holds {' and '.join(sorted(has))}, not {kind}; choose one of those as --kind.")
    if kind == "vae" and config.tokenizer.norm_groups != official_layouts.NORM_GROUPS:
        raise InputError(
            f"The tokenizer of {where} has {config.tokenizer.norm_groups} groups in its norms; the official code has "
            f"{official_layouts.NORM_GROUPS}, and would give other pictures."
        )
    if kind == "vae" and config.tokenizer.phi_of_scale:
        raise InputError(
            f"The tokenizer of {where} uses other phi convolutions in its scales than the official code, which would "
            "give other pictures."
        )
    if kind != "vae" and config.transformer and config.transformer.leak_free:
        raise InputError(f"{where} is leak-free, which the official code is not: it would give other pictures.")
    if kind == "hmar" and config.transformer and not config.transformer.branch_depth:
        raise InputError(f"{where} has no block of its own in either branch; the official layout has one at least.")


# ------------------------------------------------------------------------------------------- state dicts in files


class StateDict(NamedTuple):
    """The parameters in an official file, by name.

    Attributes:
      where: what errors call it. get: reads one as float32; InputError where a number in it is not finite.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]
    get: Callable[[str], np.ndarray]


def open_state_dict(source: Path, kind: Kind, key: str | None = None) -> StateDict:
    """Finds the state dict of a kind in a file, at the top or nested under a key; see `convert`."""
    if source.suffix not in (".safetensors", *pytorch_files.SUFFIXES):
        raise InputError(f"{source} is no .safetensors or .pth file; give one with such an ending.")
    file = safetensors_files.File(source) if source.suffix == ".safetensors" else pytorch_files.File(source)
    return _choose(source, file, kind, key)


def _choose(source: Path, file: safetensors_files.File | pytorch_files.File, kind: Kind, key: str | None) -> StateDict:
    """The one state dict of a kind among all entries of a file, its buffers and wrappers left out."""
    raw: dict[str, list[str]] = {}  # name without wrappers → as it is in the file
    for name in file.shapes:
        raw.setdefault(official_layouts.unwrapped(name), []).append(name)
    shapes = {name: file.shapes[names[0]] for name, names in raw.items()}
    mark = official_layouts.TOKENIZER_MARK if kind == "vae" else official_layouts.TRANSFORMER_MARK
    prefixes = _prefixes(shapes, mark)
    if len(prefixes) > _MOST_STATE_DICTS:
        raise InputError(f"{source} holds {len(prefixes)} state dicts; save one of them alone.")
    wanted = None if key is None else official_layouts.unwrapped(f"{key}." if key else "")
    chosen = [prefix for prefix in prefixes if wanted in (None, prefix)]

    def as_written(prefix: str) -> str:
        """A prefix as the file has it."""
        name = raw[prefix + mark][0]
        return (name.removesuffix(mark) if name.endswith(mark) else prefix).rstrip(".")

    if not prefixes:
        others = _prefixes(shapes, official_layouts.TOKENIZER_MARK) + _prefixes(
            shapes, official_layouts.TRANSFORMER_MARK
        )
        for prefix in others[:_MOST_STATE_DICTS]:
            official_layouts.check_kind(kind, _under(prefix, shapes).keys(), str(source))
        first = ", ".join(f"{name:.80}" for name in sorted(shapes)[:3])
        some = f"its entries begin {first}" if shapes else "it has no entries at all"
        raise InputError(f"{source} lacks {mark} at the top or under a key, so it holds no whole {kind}; {some}.")
    if len(chosen) != 1:
        place = f"under {shown(key)}" if key else "at the top"
        found = f"{len(chosen)} state dicts of this kind" if chosen else f"no {kind} {place}"
        keys = ", ".join(shown(name) for name in sorted(map(as_written, prefixes))[:5])
        raise InputError(f"{source} holds {found}; choose with --key one of {keys}.")
    prefix = chosen[0]
    where = f"{source} under {shown(as_written(prefix))}" if prefix else str(source)
    deeper = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    own = _under(prefix, {name: shape for name, shape in shapes.items() if not name.startswith(deeper)})
    parameters = official_layouts.without_buffers(own)
    for name in parameters:
        if len(twice := raw[prefix + name]) > 1:
            raise InputError(
                f"{where} has both {twice[0]:.100} and {twice[1]:.100}, which are one entry without the names of "
                "wrappers; save a state dict with one of them."
            )

    def get(name: str) -> np.ndarray:
        (entry,) = raw[prefix + name]
        return safetensors_files.cast(file.read(entry), np.float32, f"{entry} of {source}")

    entries = {name: raw[prefix + name][0] for name in parameters}
    safetensors_files.check_floats(
        {name: file.dtypes[entry] for name, entry in entries.items()}, safetensors_files.FLOATS, where
    )
    if isinstance(file, pytorch_files.File):
        file.check_sharing(entries.values())
    return StateDict(where, parameters, get)


def _prefixes(shapes: official_layouts.Shapes, mark: str) -> list[str]:
    """What stands before an entry's name, with its last dot, wherever the entry is."""
    return [name.removesuffix(mark) for name in shapes if f".{name}".endswith(f".{mark}")]


def _under(prefix: str, shapes: official_layouts.Shapes) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
