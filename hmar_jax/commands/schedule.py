"""`hmar-jax schedule`: schedule + ladder → its passes, their work, when each token is committed; nothing is drawn."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hmar_jax.commands import options
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.config import ModelConfig, TokenizerConfig, TransformerConfig
from hmar_jax.errors import InputError
from hmar_jax.files import check_files, check_kind, check_outputs, check_pictures, note_replaced, write_whole
from hmar_jax.scales import ScaleLadder

if TYPE_CHECKING:
    from hmar_jax.sampling.schedule import Schedule

LIST = """presets
  official-256   published, for the ladder of 256 pixels: masked steps on the sides 2 and 3
  official-512   published, for the ladder of 512 pixels: masked steps on the sides 2, 3 and 4
  official-1024  published, for the ladder of 1024 pixels: masked steps on the sides 2, 3 and 4
  small          any ladder: those masked steps on whichever of the sides 2, 3 and 4 it has
  next-scale     any ladder: one step a scale
  var            any ladder: one step a scale, with the guidance published for VAR
curves, as CURVE:STEPS or CURVE:STEPS@FIRST-LAST for some scales, from 1; masked after a share r of the steps:
  single         nothing, one step a scale
  equal:4        1 - r
  cosine:4@5-9   cos(πr/2)
  arccos:4@7     2/π·arccos(r)
  power2:4@5-9   1 - r^2, or any other exponent
files
  F.json         as `hmar-jax schedule show SCHEDULE --json=F.json` writes it
a model's own, in the config.json of its directory; they go before presets of the same name
  default        what is sampled by where nothing else is said; others have names of their own"""


def run(argv: Sequence[str]) -> None:
    """Shows one schedule, or lists what there is."""
    parser = Parser(prog="hmar-jax schedule", description="Look at how pictures will be sampled, before any is.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="presets and curves")
    show = actions.add_parser("show", help="passes, work and order of commitment of one schedule")
    show.add_argument("schedule", action=options.PathOrName, help=options.SCHEDULE)
    ladder = show.add_mutually_exclusive_group()
    ladder.add_argument("--pixels", default="256", help="the published ladder for so many (default: %(default)s)")
    ladder.add_argument("--sides", help=options.SIDES)
    ladder.add_argument("--model", action=options.PathOrName, help=options.MODEL)
    show.add_argument(
        "--depth", default="16", help="without --model, of the transformer, or its name: 24, d24, var-d24"
    )
    options.add_changes(show)
    show.add_argument("--json", action=options.LocalPath, help="the .json file to write the schedule to")
    show.add_argument(
        "--output", action=options.LocalPath, help="the .png file for a picture of when each token is committed"
    )
    args = parser.parse_args(argv)
    if args.action == "list":
        print(LIST)
    else:
        _show(args)


def _show(args: argparse.Namespace) -> None:
    from hmar_jax.sampling.schedule import Schedule

    for option, file, suffix in (("--json", args.json, ".json"), ("--output", args.output, ".png")):
        if file is not None and file.suffix.lower() != suffix:
            raise InputError(f"{option} is {file}; expected a file that ends in {suffix}.")
    given = {"the schedule": args.schedule, "--model": args.model}
    for option, file in (("--json", args.json), ("--output", args.output)):
        check_outputs(option, [file] if file else [], given)
        check_files(option, [file] if file else [])
    if args.json is not None:
        check_kind("--json", args.json, _is_schedule, "a schedule")
    if args.output is not None:
        check_pictures("--output", [args.output])
    model, recommended = _model(args)
    assert model.transformer is not None
    schedule = Schedule.resolve(args.schedule, model.ladder, model.transformer, recommended, **options.changes(args))
    say(report(schedule, model))
    note_replaced(file for file in (args.json, args.output) if file is not None)
    if args.json is not None:
        write_whole(args.json, f"{schedule.to_json()}\n".encode())
    if args.output is not None:
        from hmar_jax import images, plots
        from hmar_jax.sampling import commitment

        images.save_png(plots.commitment(*commitment.commitment(schedule)), args.output)


def _is_schedule(content: bytes) -> bool:
    from hmar_jax.sampling.schedule import Schedule

    Schedule.from_json(content)
    return True


def _model(args: argparse.Namespace) -> tuple[ModelConfig, dict[str, Schedule]]:
    """The config of the model directory, or of a published transformer on the ladder asked for; the schedules that the
    directory recommends.
    """  # fmt: skip
    if args.model is not None:
        from hmar_jax.formats.model_directory import locate, read_config, sampling_of

        config, meta = read_config(locate(args.model))
        if config.transformer is None:
            raise InputError(f"{args.model} is a tokenizer alone; give a model directory that has a transformer.")
        return config, sampling_of(config, meta)
    ladder = ScaleLadder.preset(args.pixels) if args.sides is None else ScaleLadder.parse(args.sides)
    name = f"d{args.depth}" if args.depth.isdecimal() else args.depth
    return ModelConfig(ladder, TokenizerConfig(), TransformerConfig.preset(name)), {}


def report(schedule: Schedule, model: ModelConfig) -> str:
    """A line for each scale, then passes, FLOPs, order and digest."""
    from hmar_jax.flops import sample_flops
    from hmar_jax.sampling.schedule import SCALARS

    assert model.transformer is not None
    plan, work = schedule.plan, sample_flops(model, schedule.plan)
    totals = [sum(parts.values()) for parts in work]
    rows = [["scale", "side", "steps", "commit", "guided", "cfg", "temperature", "top-k", "top-p", "noise", "FLOPs"]]
    for scale, steps in enumerate(schedule.counts):
        at = slice(first := sum(map(len, schedule.counts[:scale])), first + len(steps))
        rows.append(
            [
                str(scale + 1),
                str(schedule.sides[scale]),
                str(len(steps)),
                "+".join(map(str, steps)) if len(steps) <= 8 else _runs(steps),
                f"{sum(plan.guided[scale])} of {len(steps)}",
                *(_runs(getattr(schedule, name)[scale]) for name in SCALARS),
                f"{sum(totals[at]) / sum(totals):.1%}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    parts = ", ".join(f"{name} {sum(part[name] for part in work) / sum(totals):.1%}" for name in work[0])
    return "\n".join(
        [
            *table,
            f"passes: {len(work)}, {len(work) - len(plan.counts)} of them masked, {sum(map(sum, plan.guided))} guided",
            f"transformer of depth {model.transformer.depth}: {sum(totals) / 1e12:.4g} TFLOP a picture ({parts})",
            f"order: {schedule.order}" + ("" if schedule.has_masked_steps else ", without effect: no masked steps"),
            f"digest: {schedule.digest}",
        ]
    )


def _runs(values: Sequence[float]) -> str:
    """`0.4, 3×0`, or the one value of all."""
    runs = [(text, len(list(same))) for text, same in itertools.groupby(f"{value:.4g}" for value in values)]
    if len(runs) == 1:
        return runs[0][0]
    return ", ".join(f"{count}×{text}" if count > 1 else text for text, count in runs)
