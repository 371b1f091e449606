"""`hmar-jax export`: work directory → model directory; pictures + tokenizer → token cache; model → PyTorch file."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tqdm

from hmar_jax.commands.options import LocalPath, PathOrName
from hmar_jax.commands.train import read_config
from hmar_jax.config import DataConfig
from hmar_jax.errors import InputError
from hmar_jax.files import check_outputs

if TYPE_CHECKING:
    from hmar_jax.official import Kind


def run(argv: Sequence[str]) -> None:
    """Writes what `export model`, `export tokens` or `export torch` names."""
    from hmar_jax.official import Kind

    parser = argparse.ArgumentParser(
        prog="hmar-jax export", description="Write a model directory, a token cache or an official PyTorch checkpoint."
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    model = kinds.add_parser("model", help="the newest checkpoint of a training run as a model directory")
    model.add_argument("--workdir", required=True, action=LocalPath, help="of the training run")
    model.add_argument(
        "--init-from",
        default="",
        action=PathOrName,
        help="where the model that the run started from is now, if it or the run was moved",
    )
    model.add_argument("--output", required=True, action=LocalPath, help="model directory to write; must not exist")
    tokens = kinds.add_parser("tokens", help="pictures as tokens, for the two transformer stages to train from")
    tokens.add_argument(
        "--model", required=True, action=PathOrName, help="model directory or hub id, with the tokenizer"
    )
    tokens.add_argument(
        "--config", required=True, action=PathOrName, help="config file whose `data` names the pictures"
    )
    tokens.add_argument("--crops", type=int, default=1, help="versions of each picture (default: %(default)s)")
    tokens.add_argument("--count", type=int, help="pictures to take; all by default, needed for glyphs")
    tokens.add_argument("--batch-size", type=int, default=64)
    tokens.add_argument("--seed", type=int, default=0, help="of crops and flips")
    tokens.add_argument("--output", required=True, action=LocalPath, help="cache directory to write; must not exist")
    torch = kinds.add_parser("torch", help="a model directory in the layout of the official PyTorch code")
    torch.add_argument("--model", required=True, action=PathOrName, help="model directory or hub id")
    torch.add_argument(
        "--kind",
        dest="layout",
        choices=typing.get_args(Kind),
        help="vae for the tokenizer; by default the transformer as it was converted, or as what it is",
    )
    torch.add_argument("--output", required=True, action=LocalPath, help=".safetensors or .pth file; must not exist")
    args, overrides = parser.parse_known_args(argv)
    if unknown := [o for o in overrides if args.kind != "tokens" or not o.startswith("--config.")]:
        parser.error(f"unrecognized argument: {unknown[0]}")
    if args.kind == "model":
        _export_model(args.workdir, args.output, args.init_from)
    elif args.kind == "torch":
        _export_torch(args.model, args.output, args.layout)
    else:
        data = read_config(args.config, overrides).data
        inputs = {"--model": args.model, "--config": args.config.partition(":")[0], "data.path": data.path}
        check_outputs("--output", [args.output], inputs)
        size = {"crops": args.crops, "count": args.count, "batch_size": args.batch_size, "seed": args.seed}
        written = export_tokens(args.model, data, args.output, **size)
        print(f"Tokens of {written} pictures in {args.crops} crops are in {args.output}")


def _export_model(workdir: Path, output: Path, init_from: str) -> None:
    from hmar_jax.pretrained import save_model
    from hmar_jax.training.loop import load_trained

    check_outputs("--output", [output], {"--workdir": workdir, "--init-from": init_from})
    if output.exists():
        raise InputError(f"{output} exists already; remove it, or choose another output directory.")
    model, source, licences = load_trained(workdir, init_from)
    print(f"The model is in {save_model(output, model, source, licences=licences)}")


def _export_torch(model: str, output: Path, layout: Kind | None) -> None:
    from hmar_jax.convert import export_torch

    written = export_torch(model, output, layout)
    rest = "" if written == "vae" else "; --kind=vae writes its tokenizer"
    print(f"The {written} state dict is in {output}, without the buffers that the official code derives{rest}")


def export_tokens(
    model_path: str | Path,
    data: DataConfig,
    output: Path,
    *,
    crops: int = 1,
    count: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> int:
    """Writes a token cache of pictures, whose batches all devices share; returns the number of pictures.

    The arguments are those of `pipeline.examples`.
    """
    import jax

    from hmar_jax import pictures
    from hmar_jax.config import MeshConfig
    from hmar_jax.data import pipeline
    from hmar_jax.data.tokens import write_token_cache
    from hmar_jax.pretrained import from_pretrained, tokenizer_fingerprint
    from hmar_jax.tokenizer.door import TokenizerDoor
    from hmar_jax.training import sharding

    model, mesh = from_pretrained(model_path), sharding.make_mesh(MeshConfig())
    tokenizer = TokenizerDoor(model.config, model.placed(mesh), model.dtype)
    rows = -(-crops * batch_size // mesh.size) * mesh.size
    size = model.config.image_size
    source = pipeline.open_source(data, size, seed)
    examples = pipeline.examples(data, size, crops=crops, batch_size=batch_size, seed=seed, count=count)

    def encoded() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with tqdm.tqdm(total=count or len(source), desc="tokens", unit="picture", disable=None) as bar:
            for images, labels in examples:
                flat = images.reshape(-1, *images.shape[2:])
                full = np.resize(flat, (rows, *flat.shape[1:]))  # one shape, one compilation
                shared = jax.device_put(pictures.to_unit(full), sharding.batch_sharding(mesh))
                with jax.set_mesh(mesh):
                    tokens = np.asarray(tokenizer.encode(shared))[: len(flat)]
                yield tokens.reshape(crops, len(labels), -1), labels
                bar.update(len(labels))

    return write_token_cache(
        output,
        encoded(),
        ladder=model.config.ladder,
        codebook_size=model.config.tokenizer.codebook_size,
        crops=crops,
        class_names=source.class_names,
        tokenizer=tokenizer_fingerprint(model),
        source=f"{data.source} {data.name or data.path or data.classes}".strip(),
    )
