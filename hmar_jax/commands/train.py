"""`hmar-jax train`: config file + overrides → a trained stage in a work directory."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from hmar_jax.commands import options
from hmar_jax.commands.options import LocalPath, PathOrName
from hmar_jax.commands.terminal import Parser, say
from hmar_jax.config import TrainConfig, check_paths
from hmar_jax.config.plain import from_config_dict
from hmar_jax.errors import InputError, printable, shown
from hmar_jax.files import check_outputs, check_readable, check_refusal, is_there, local_path


def run(argv: Sequence[str]) -> None:
    """Trains, or goes on training, one stage."""
    parser = Parser(
        prog="hmar-jax train",
        description="Train one stage. Running again with the same work directory resumes.",
        epilog="Any field of the config can be set: --config.batch_size=32 --config.optimizer.base_lr=2e-4",
    )
    parser.add_argument(
        "--config",
        required=True,
        action=PathOrName,
        metavar="FILE",
        help="a config file, such as configs/glyphs_tokenizer.py",
    )
    parser.add_argument("--workdir", required=True, action=LocalPath, help="where checkpoints, metrics and samples go")
    parser.add_argument(
        "--profile", type=_steps, default=range(0), metavar="FIRST:LAST", help="trace these steps into WORKDIR/profile"
    )
    options.add_processes(parser)
    args, overrides = parser.parse_known_args(argv)
    for override in overrides:
        if not override.startswith("--config."):
            parser.error(f"unrecognized argument: {override}")
    config = read_config(args.config, overrides)
    check_outputs("--workdir", [args.workdir / "model"], {"init_from": config.init_from})

    from hmar_jax.parallel import processes
    from hmar_jax.training.loop import train

    options.join_processes(args)
    model = train(config, args.workdir, args.profile)
    if model is not None and processes.is_first():
        say(f"Trained. The model is in {model}")


def _steps(text: str) -> range:
    """`100:110` → the steps from 100 to 110."""
    ends = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if ends is None or not 0 < int(ends[1]) <= int(ends[2]):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not FIRST:LAST, such as 100:110")
    return range(int(ends[1]), int(ends[2]) + 1)


def read_config(file: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The train config of a file, with `--config.field=value` overrides applied and checked.

    Raises:
      InputError: no such file, a field that does not exist, or a value of the wrong type or range.
    """
    file = str(local_path(file, "--config"))
    path = Path(file.split(":")[0])
    if not is_there(path, "Config file"):
        raise InputError(f"Config file {file} does not exist; those that come with the project are in configs/.")
    if not path.is_file() or path.suffix == ".json":
        raise InputError(f"--config is {file}, which is no Python file; give one such as those in configs/.")
    check_readable(path, "Config file")
    sys.modules.pop("config_config", None)  # where ml_collections loads a file: one without get_config sees the last
    argv = ["train", f"--config={file}", *overrides]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        with _naming_fault(str(path)):
            values(argv)
            if isinstance(failed := getattr(holder.value, "_error", None), OSError):  # ml_collections puts it off
                raise failed
            if isinstance(holder.value, ml_collections.ConfigDict):
                made = from_config_dict(TrainConfig, holder.value)
    except InputError:
        raise
    except (RecursionError, MemoryError):
        raise InputError(
            f"Config file {file}, or a value given for it, is nested too deeply; take levels out of it."
        ) from None
    except (AttributeError, LookupError) as error:
        if "get_config" in str(error):
            raise InputError(f"Config file {file} has no get_config(); see those in configs/.") from None
        reason = _sentence(error).rstrip(".")
        raise InputError(f"No such field in the config of {file}: {reason}; hmar_jax/config.py lists them.") from None
    except SyntaxError as error:
        at = f", line {error.lineno}" if error.lineno else ""
        raise InputError(f"Config file {file} is not Python ({error.msg}{at}).") from None
    except ImportError as error:
        raise InputError(f"Config file {file} cannot be loaded: {_sentence(error)}") from None
    except OSError as error:
        check_refusal(f"Config file {file}", error)
        raise InputError(f"Config file {file} cannot be loaded: {_sentence(error)}") from None
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(f"A config value is not usable: {_sentence(error)}") from None
    if not isinstance(holder.value, ml_collections.ConfigDict):
        raise InputError(
            f"get_config() of {file} returns {type(holder.value).__name__}; expected an ml_collections.ConfigDict."
        )
    check_paths(made)
    return made


@contextlib.contextmanager
def _naming_fault(file: str) -> Iterator[None]:
    """Turns what a config file raises, being a program of the user's, into an InputError with its line."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too
        cause: BaseException = error  # ml_collections and absl wrap some, with a traceback for a text
        while isinstance(cause, flags.Error | TypeError | ValueError) and (
            below := cause.__cause__ or cause.__context__
        ):
            cause = below
        lines = [at.lineno for at in traceback.extract_tb(cause.__traceback__) if at.filename == file]
        if lines and not isinstance(cause, InputError | ImportError):
            said = f"{type(cause).__name__} ({_first_line(cause)})"
            raise InputError(f"Config file {file} fails at line {lines[-1]} with {said}.") from None
        if "Traceback" in _text(error):
            raise InputError(f"Config file {file} cannot be loaded: {_sentence(Exception(*cause.args))}") from None
        raise


def _sentence(error: Exception) -> str:
    text = _first_line(Exception(*error.args[:1])).replace("\\n", " ").replace("\\'", "'")
    return text if text.endswith((".", "?")) else text + "."


def _first_line(error: BaseException) -> str:
    """What an error says, cut to its first line."""
    return printable(_text(error).strip().partition("\n")[0], 200)


def _text(error: BaseException) -> str:
    """What an error says; a config file may raise one that fails at saying it."""
    try:
        return str(error)
    except Exception:
        return ""
