"""The console script `hmar-jax`: finds the subcommand, turns bad input into one sentence and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import glob
import importlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from hmar_jax import __version__
from hmar_jax.commands import terminal
from hmar_jax.errors import BUG, HmarError, InputError
from hmar_jax.xla import naming_absent_platforms, set_flags, use_compilation_cache

COMMANDS = {
    "train": "train one stage from a config",
    "convert": "turn an official PyTorch checkpoint into a model directory",
    "export": "write a model directory, a token cache or an official PyTorch checkpoint",
    "sample": "sample pictures from a model directory",
    "edit": "draw a part of a picture anew",
    "schedule": "show what a schedule does: its passes, their work, the order of commitment",
    "bench": "measure scale attention against other implementations, a train step, or sampling",
    "compile-check": "compile a stage for TPUs or an H200 not here: memory, collectives, least time of a step",
    "demo": "train all three stages on glyphs, from nothing to pictures",
}

_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hmar-jax` with `argv`, by default the process's arguments.

    Returns:
      The exit code: 0, 2 for what the user must mend, 1 for what may pass by itself, 130 after Ctrl-C, and 70 for a bug
      of ours, with its traceback. argparse itself exits with 2 on a malformed command line, and `compile-check` with 1
      where a program does not fit.
    """
    terminal.open_streams()
    name, code, said, torn = "hmar-jax", 0, "", False
    shown, sys.unraisablehook = sys.unraisablehook, functools.partial(_show_unraisable, sys.unraisablehook)
    try:
        try:
            args = _arguments(list(sys.argv[1:] if argv is None else argv))
            name = f"hmar-jax {args.command}"
            _prepare(args.command)
            with naming_absent_platforms():
                importlib.import_module(f"hmar_jax.commands.{args.command.replace('-', '_')}").run(args.rest)
        finally:
            sys.stdout.flush()  # here, where a full disk has a sentence; after argparse's help as well
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE  # as of any program whose reader has gone; what is left to say goes nowhere
    except HmarError as error:
        code = error.exit_code
        said, torn = str(error), error.__cause__ is not None
    except KeyboardInterrupt:
        code, said, torn = 130, "interrupted", True
    except Exception as error:
        from hmar_jax.failures import explain

        if known := explain(error, "It could not go on", memory="ask for less at a time"):
            code, said, torn = known.exit_code, str(known), True
        else:
            with contextlib.suppress(OSError):
                traceback.print_exc()
            code, said = BUG, f"this is a bug of hmar-jax {__version__}; please report it, with the lines above."
    finally:
        if torn:
            gc.collect()  # what Orbax left unheard is destroyed now; TensorStore's threads may report until the end
        else:
            sys.unraisablehook = shown
        if said:
            with contextlib.suppress(OSError):
                print(f"{name}: {said}", file=sys.stderr)
        terminal.settle_streams()
    return code


def _arguments(argv: list[str]) -> argparse.Namespace:
    """The command's name, `command`, and the arguments that are its own, `rest`."""
    parser = terminal.Parser(
        prog="hmar-jax",
        description="Hierarchical masked autoregressive image generation in JAX.",
        epilog="\n".join(["commands:", *(f"  {name:13} {what}" for name, what in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its arguments; `hmar-jax COMMAND --help` lists them")
    args = parser.parse_args(argv[:1])
    args.rest = argv[1:]
    return args


def _prepare(command: str) -> None:
    """Sets what JAX reads when it is imported, and who may log what."""
    try:
        os.getcwd()
    except FileNotFoundError:  # libtpu would abort the process
        raise InputError("The current folder has been deleted; change to one that exists.") from None
    # JAX's C++ layers log to standard error what means nothing to a user.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    set_flags()
    if command in ("bench", "compile-check"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # none: they tell what compiling takes
    else:
        use_compilation_cache()
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        # Where libtpu is installed, as for the tests, but no TPU: it would go looking for one, and complain.
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
    handler = logging.StreamHandler()
    handler.setFormatter(terminal.OneLine("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for ours in ("hmar_jax", "pallas_kernels"):
        logging.getLogger(ours).setLevel(logging.INFO)
    for theirs in ("absl", "asyncio"):  # Orbax logs pages of what it raises, and we say, anyway
        logging.getLogger(theirs).setLevel(logging.CRITICAL)
    # What a save that failed had still to do is destroyed undone.
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)


def _show_unraisable(show: Callable[[Any], Any], report: Any) -> None:
    """Shows what a thread could not raise, but for TensorStore's farewell when a checkpoint cannot be read or saved."""
    if not any(phrase in str(report.exc_value) for phrase in ("Event loop is closed", "full TensorStore details")):
        show(report)
