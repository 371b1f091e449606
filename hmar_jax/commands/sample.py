"""`hmar-jax sample`: model directory + labels → pictures, or classes → a directory of many of each."""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from hmar_jax.commands import processes, schedule
from hmar_jax.errors import InputError, device_memory
from hmar_jax.files import write_whole


def run(argv: Sequence[str]) -> None:
    """Samples one picture a label, and a grid of all, or many pictures of each class."""
    parser = argparse.ArgumentParser(
        prog="hmar-jax sample", description="Sample one picture for each label, or many of each class."
    )
    parser.add_argument("--model", required=True, help="model directory, or id on the Hugging Face hub")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--labels", help="one picture each, by number or name: 3,7 or A,b or 0-9")
    which.add_argument("--classes", help="many pictures each, over all devices: all, or some as for --labels")
    parser.add_argument("--schedule", help=f"{schedule.HELP} (default: next-scale, for a VAR var)")
    parser.add_argument("--seed", type=int, default=0)
    schedule.add_options(parser)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token everywhere")
    parser.add_argument("--trace", action="store_true", help="beside each picture, how it came about, as PNG and GIF")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", required=True, type=Path, help="directory for the pictures")
    many = parser.add_argument_group("many pictures", "with --classes. Running again with the same --output goes on.")
    many.add_argument("--per-class", type=int, help="how many of each class (default: 50)")
    many.add_argument("--batch", type=int, help="pictures at a time on each device (default: 16)")
    many.add_argument("--format", choices=["png", "array_record"], help="of the pictures' files (default: png)")
    processes.add_options(parser)
    args = parser.parse_args(argv)
    if args.labels is not None:
        of_many = ("per_class", "batch", "format", "coordinator", "processes", "process")
        if given := [f"--{name.replace('_', '-')}" for name in of_many if getattr(args, name) is not None]:
            parser.error(f"not with --labels, only with --classes: {', '.join(given)}")
        _sample_labels(args)
    else:
        if args.trace:
            parser.error("not with --classes, only with --labels: --trace")
        _sample_classes(args)


def _sample_labels(args: argparse.Namespace) -> None:
    """One picture a label."""
    from hmar_jax import pictures
    from hmar_jax.pretrained import from_pretrained
    from hmar_jax.sampling import trace

    model = from_pretrained(args.model, args.dtype, args.revision)
    labels = parse_labels(args.labels, model.config.class_names)
    settings = {"seed": args.seed, "greedy": args.greedy, "record": args.trace}
    with device_memory("choose fewer labels"):
        out = model.sample(labels, args.schedule, **settings, **schedule.changes(args))
    for i, (label, image) in enumerate(zip(labels, pictures.to_uint8(out.images), strict=True)):
        name = f"{i:05d}-class{label}-seed{args.seed}"
        pictures.save_png(pictures.Image.fromarray(image), args.output / f"{name}.png")
        if args.trace:
            frames = trace.frames(model, out, i)
            pictures.save_png(pictures.trace(frames), args.output / f"{name}-trace.png")
            write_whole(args.output / f"{name}-trace.gif", pictures.animation(frames))
    pictures.save_png(pictures.grid(out.images, min(8, len(labels))), args.output / "grid.png")
    print(f"{len(labels)} pictures and grid.png are in {args.output}")


def _sample_classes(args: argparse.Namespace) -> None:
    """Many pictures of each class, by all processes together."""
    processes.join(args)
    # A run that is killed goes on; in a job JAX would note the signal, and wait to be asked for it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    import jax

    from hmar_jax.config import MeshConfig
    from hmar_jax.model import Model
    from hmar_jax.pretrained import open_model, read_params
    from hmar_jax.sampling import bulk
    from hmar_jax.training import distributed, sharding

    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        opened = open_model(args.model, args.revision)
        model = Model(opened.config, read_params(opened, put=sharding.put), args.dtype)
        settings = bulk.Settings(
            weights=opened.meta["sha256"],
            model=opened.config,
            dtype=args.dtype,
            schedule=model.schedule(args.schedule, **schedule.changes(args)),
            seed=args.seed,
            greedy=args.greedy,
            pictures=args.format or "png",
        )
        classes, names = opened.config.num_classes, opened.config.class_names
        every = args.classes == "all" and "all" not in names
        labels = parse_labels(f"0-{classes - 1}" if every else args.classes, names)
        per_class = 50 if args.per_class is None else args.per_class
        batch = 16 if args.batch is None else args.batch
        with device_memory("choose a smaller --batch"):
            drawn = bulk.sample_classes(model, settings, labels, per_class, args.output, batch=batch)
    if distributed.is_first():
        before = f", {total - drawn} of them from before" if (total := per_class * len(set(labels))) > drawn else ""
        print(f"{total} pictures, {per_class} of each of {len(set(labels))} classes, are in {args.output}{before}")


def parse_labels(text: str, class_names: Sequence[str]) -> list[int]:
    """Labels from `3,7` or `0-9` or, where the model names its classes, from names, which go before numbers."""
    labels: list[int] = []
    for word in text.split(","):
        if word.strip() in class_names:
            labels.append(class_names.index(word.strip()))
            continue
        if (ends := re.fullmatch(r"\s*(\d+)-(\d+)\s*", word)) and int(ends[1]) <= int(ends[2]):
            labels.extend(range(int(ends[1]), int(ends[2]) + 1))
            continue
        try:
            labels.append(int(word))
        except ValueError:
            some = ", ".join(class_names[:12]) + (", …" if len(class_names) > 12 else "")
            known = f"a number or one of {some}" if class_names else "a number"
            raise InputError(f"Label {word.strip()!r} is not a class of this model; expected {known}.") from None
    return labels
