"""`hmar-jax demo`: nothing → three trained stages on glyphs → pictures a person can judge."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hmar_jax.commands.options import LocalPath
from hmar_jax.commands.terminal import Parser, say


def run(argv: Sequence[str]) -> None:
    """Trains the three stages and draws reconstructions, loss curves, samples and a sample's growth."""
    parser = Parser(
        prog="hmar-jax demo",
        description="Train tokenizer, next-scale and masked stage on rendered glyphs, from nothing, and sample.",
    )
    parser.add_argument(
        "--output", action=LocalPath, help="folder for everything (default: runs/demo or runs/demo-quick)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a minute, to see that all works; the pictures will be poor"
    )
    args = parser.parse_args(argv)
    folder = args.output or Path("runs/demo-quick" if args.quick else "runs/demo")
    start = time.perf_counter()

    from hmar_jax.bulk.token_caches import export_tokens
    from hmar_jax.training import demo
    from hmar_jax.training.loop import train

    configs = {stage: demo.stage_config(stage, folder, quick=args.quick) for stage in demo.STAGES}
    demo.check_same_length(folder, configs["tokenizer"].steps)
    say(f"1/4 tokenizer: pictures to tokens and back, {configs['tokenizer'].steps} steps", flush=True)
    if train(configs["tokenizer"], folder / "tokenizer") is None:
        return
    say("2/4 next-scale: each scale from the coarser ones", flush=True)
    if not (folder / "tokens").exists():
        count = demo.QUICK_PICTURES if args.quick else demo.PICTURES
        export_tokens(folder / "tokenizer" / "model", configs["tokenizer"].data, folder / "tokens", count=count)
    if train(configs["next_scale"], folder / "next_scale") is None:
        return
    say("3/4 masked: a scale from a part of its own tokens", flush=True)
    if train(configs["masked"], folder / "masked") is None:
        return
    model = folder / "masked" / "model"
    say("4/4 pictures", flush=True)
    for picture, what in demo.draw(folder, model, configs).items():
        say(f"  {picture}  {what}")
    say(f"Done in {time.perf_counter() - start:.0f} s. The model is in {model}; sample it with")
    settings = f"--labels=A,7 --schedule=small --cfg={demo.SAMPLING['cfg']} --top-k={demo.SAMPLING['top_k']}"
    say(f"  hmar-jax sample --model={model} {settings} --output={folder / 'samples'}")
