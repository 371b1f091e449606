"""`hmar-jax sample`: model directory + labels → pictures, or classes → a directory of many of each."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from hmar_jax.commands import options
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.errors import InputError, device_memory, shown
from hmar_jax.files import check_files, check_folder, check_outputs, check_pictures, note_replaced, write_whole
from hmar_jax.labels import HELP, every_class, parse_labels


def run(argv: Sequence[str]) -> None:
    """Samples one picture a label, and a grid of all, or many pictures of each class."""
    parser = Parser(prog="hmar-jax sample", description="Sample one picture for each label, or many of each class.")
    options.add_model(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--labels", help=f"one picture each, of classes {HELP}")
    which.add_argument("--classes", help="many pictures each, over all devices: all, or some as for --labels")
    options.add_schedule(parser, "next-scale, for a VAR var")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token everywhere")
    parser.add_argument("--trace", action="store_true", help="beside each picture, how it came about, as PNG and GIF")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", required=True, action=options.LocalPath, help="directory for the pictures")
    many = parser.add_argument_group("many pictures", "with --classes. Running again with the same --output goes on.")
    many.add_argument("--per-class", type=int, help="how many of each class (default: 50)")
    many.add_argument("--batch", type=int, help="pictures at a time on each device (default: 16)")
    many.add_argument("--format", choices=["png", "array_record"], help="of the pictures' files (default: png)")
    options.add_processes(parser)
    args = parser.parse_args(argv)
    check_outputs("--output", [args.output], {"--model": args.model})
    check_folder("--output", args.output)
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed is {shown(args.seed)}; expected 0 to {2**32 - 1}.")
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
    from hmar_jax import images, plots
    from hmar_jax.bulk import traces
    from hmar_jax.model import from_pretrained

    model = from_pretrained(args.model, args.dtype, revision=args.revision)
    labels = parse_labels(args.labels, model.config.class_names, model.config.num_classes)
    names = [f"{i:05d}-class{_in_file_names(label.name)}-seed{args.seed}" for i, label in enumerate(labels)]
    endings = (".png", "-trace.png", "-trace.gif") if args.trace else (".png",)
    files = [args.output / f"{name}{ending}" for name in names for ending in endings] + [args.output / "grid.png"]
    check_files("--output", files)
    check_pictures("--output", files)
    settings = {"seed": args.seed, "greedy": args.greedy, "record": args.trace}
    with device_memory("choose fewer labels"):
        out = model.sample([label.number for label in labels], args.schedule, **settings, **options.changes(args))
    note_replaced(files)
    for i, (name, picture) in enumerate(zip(names, out.pil(), strict=True)):
        images.save_png(picture, args.output / f"{name}.png")
        if args.trace:
            frames = traces.frames(model, out, i)
            images.save_png(plots.trace(frames), args.output / f"{name}-trace.png")
            write_whole(args.output / f"{name}-trace.gif", plots.animation(frames))
    images.save_png(out.grid(), args.output / "grid.png")
    number = f"{len(labels)} picture{'s' * (len(labels) > 1)}"
    say(f"{number} and grid.png are in {args.output}")


def _sample_classes(args: argparse.Namespace) -> None:
    """Many pictures of each class, by all processes together."""
    options.join_processes(args)

    import jax

    from hmar_jax.bulk import samples
    from hmar_jax.config import MeshConfig
    from hmar_jax.formats.model_directory import open_model, read_params
    from hmar_jax.model import Model
    from hmar_jax.parallel import processes, sharding

    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        opened = open_model(args.model, args.revision)
        model = Model(opened.config, read_params(opened, put=sharding.put), args.dtype)
        model.sampling = opened.sampling
        settings = samples.Settings(
            weights=opened.meta["sha256"],
            model=opened.config,
            dtype=args.dtype,
            schedule=model.schedule(args.schedule, **options.changes(args)),
            seed=args.seed,
            greedy=args.greedy,
            pictures=args.format or "png",
        )
        classes, names = opened.config.num_classes, opened.config.class_names
        if args.classes == "all" and "all" not in names:
            labels = every_class(names, classes)
        else:
            labels = parse_labels(args.classes, names, classes)
        numbers = sorted({label.number for label in labels})
        per_class = 50 if args.per_class is None else args.per_class
        batch = 16 if args.batch is None else args.batch
        with device_memory("choose a smaller --batch"), processes.preemption() as asked:
            drawn = samples.sample_classes(model, settings, numbers, per_class, args.output, batch=batch, stop=asked)
    if drawn is None and processes.is_first():
        say(f"Stopped; run the command again to go on with the pictures in {args.output}")
    if asked.interrupted:
        raise KeyboardInterrupt
    if drawn is None:
        return
    if processes.is_first():
        before = f", {total - drawn} of them from before" if (total := per_class * len(numbers)) > drawn else ""
        say(f"{total} pictures, {per_class} of each of {len(numbers)} classes, are in {args.output}{before}")
        if names and settings.pictures == "png":
            folders = {samples.folder_of(label.number, classes): label.name for label in labels}
            some = ", ".join(f"{folder} has {name}" for folder, name in list(folders.items())[:12])
            say(f"Folders have the numbers of classes: {some}{', …' if len(folders) > 12 else ''}")


def _in_file_names(name: str) -> str:
    """A class as a part of a file's name: what no file's name may have becomes _, and much too long a name is cut."""
    kept = "".join("_" if character == "/" or not character.isprintable() else character for character in name)
    return os.fsencode(kept)[:150].decode(errors="ignore")
