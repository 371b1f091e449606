"""`hmar-jax sample`: model directory + labels → pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hmar_jax.errors import InputError
from hmar_jax.sampling.schedule import Schedule


def run(argv: Sequence[str]) -> None:
    """Samples one picture a label, and a grid of all."""
    parser = argparse.ArgumentParser(prog="hmar-jax sample", description="Sample one picture for each label.")
    parser.add_argument("--model", required=True, help="model directory, or id on the Hugging Face hub")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--labels", required=True, help="classes, by number or name: 3,7 or A,b")
    parser.add_argument(
        "--schedule", default="next-scale", help="name of a preset, or a .json file (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg", type=float, help="guidance; the schedule's by default")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--noise", type=float, help="noise on the order of commitment")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token everywhere")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", required=True, type=Path, help="directory for the pictures")
    args = parser.parse_args(argv)

    from hmar_jax import pictures
    from hmar_jax.pretrained import from_pretrained

    model = from_pretrained(args.model, args.dtype, args.revision)
    labels = parse_labels(args.labels, model.config.class_names)
    scalars = {name: getattr(args, name) for name in ("cfg", "temperature", "top_k", "top_p", "noise")}
    schedule = read_schedule(args.schedule)
    out = model.sample(labels, schedule, seed=args.seed, greedy=args.greedy, **scalars)
    for i, (label, image) in enumerate(zip(labels, pictures.to_uint8(out.images), strict=True)):
        pictures.save_png(pictures.Image.fromarray(image), args.output / f"{i:05d}-class{label}-seed{args.seed}.png")
    pictures.save_png(pictures.grid(out.images, min(8, len(labels))), args.output / "grid.png")
    print(f"{len(labels)} pictures and grid.png are in {args.output}")


def parse_labels(text: str, class_names: Sequence[str]) -> list[int]:
    """Labels from `3,7` or, where the model names its classes, from names; a name goes before a number."""
    labels = []
    for word in text.split(","):
        if word.strip() in class_names:
            labels.append(class_names.index(word.strip()))
            continue
        try:
            labels.append(int(word))
        except ValueError:
            some = ", ".join(class_names[:12]) + (", …" if len(class_names) > 12 else "")
            known = f"a number or one of {some}" if class_names else "a number"
            raise InputError(f"Label {word.strip()!r} is not a class of this model; expected {known}.") from None
    return labels


def read_schedule(text: str) -> str | Schedule:
    """A preset's name as it is, or the schedule in a .json file."""
    if not text.endswith(".json"):
        return text
    try:
        return Schedule.from_json(Path(text).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Schedule file {text} cannot be read ({error}); write one with Schedule.to_json.") from None
