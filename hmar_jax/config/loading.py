"""A config file or the name of an installed config, and overrides → a `TrainConfig`, checked once, after the overrides.

A config file is a program of the user's: whatever it does wrong becomes one sentence that names the file and the line.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from hmar_jax.config.plain import checked_later, from_config_dict
from hmar_jax.config.training import TrainConfig, check_paths
from hmar_jax.errors import InputError, printable
from hmar_jax.files import check_readable, check_refusal, is_there, local_path

_INSTALLED = Path(__file__).parents[1] / "configs"
_PREFIX = "--config."  # of an override on a command line
_MODULE = "config_config"  # where ml_collections, in version 1.1, runs a config file


def load(path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """The train config of a file or of an installed config, with overrides applied and checked.

    Args:
      path_or_name: a Python file whose `get_config()` returns an `ml_collections.ConfigDict` of a `TrainConfig`'s
        fields, or the name of a config that is installed in `hmar_jax/configs`, such as `glyphs_tokenizer`; a file of
        that path comes first. `FILE:ARGUMENT` and `NAME:ARGUMENT`, such as `imagenet256_d16:masked`, call
        `get_config(ARGUMENT)`.
      overrides: `FIELD=VALUE`, such as `optimizer.base_lr=2e-4`, or `--config.FIELD=VALUE`, as on a command line.

    Raises:
      InputError: no such file or name, one that gives no config, a field that does not exist, or a value of the wrong
        type or range.
    """
    file = find(path_or_name)
    argv = ["load", f"--config={file}", *(_PREFIX + override.removeprefix(_PREFIX) for override in overrides)]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    with _as_sentences(file):
        with checked_later(), _own_module():
            values(argv)
        if isinstance(failed := getattr(holder.value, "_error", None), OSError):  # ml_collections puts it off
            raise failed
        if not isinstance(holder.value, ml_collections.ConfigDict):
            raise InputError(
                f"get_config() of {file} returns {type(holder.value).__name__}; expected an ml_collections.ConfigDict."
            )
        config = from_config_dict(TrainConfig, holder.value)
    check_paths(config)
    return config


def names() -> list[str]:
    """The installed configs, by which `load` finds them."""
    return sorted(file.stem for file in _INSTALLED.glob("*.py") if file.stem != "__init__")


def find(path_or_name: str | os.PathLike[str]) -> str:
    """FILE or FILE:ARGUMENT, as ml_collections reads it, of a path or a name; InputError where there is none."""
    text = str(local_path(path_or_name, "The config"))
    start, colon, argument = text.partition(":")
    path = Path(start)
    there = is_there(path, "Config file")
    if not (there and path.is_file()) and start in names():
        return f"{_INSTALLED / start}.py{colon}{argument}"
    if not there:
        near = difflib.get_close_matches(path.stem, names(), n=1)
        raise InputError(
            f"Config file {text} does not exist, and no installed config is called so; "
            f"{f'perhaps you mean {near[0]}; ' if near else ''}the names are {', '.join(names())}."
        )
    if not path.is_file() or path.suffix == ".json":
        raise InputError(f"The config {text} is no Python file; give one, or a name such as {names()[0]}.")
    check_readable(path, "Config file")
    return text


@contextlib.contextmanager
def _own_module() -> Iterator[None]:
    """A new module for a config file: ml_collections has one name for those of all, and a file may load another."""
    outer = sys.modules.pop(_MODULE, None)
    try:
        yield
    finally:
        if outer is not None:
            sys.modules[_MODULE] = outer


@contextlib.contextmanager
def _as_sentences(file: str) -> Iterator[None]:
    """Turns what a config file, or an override of a value of its, raises in the block into an InputError."""
    try:
        with _naming_fault(file.partition(":")[0]):
            yield
    except InputError:
        raise
    except (RecursionError, MemoryError):
        raise InputError(
            f"Config file {file}, or a value given for it, is nested too deeply; take levels out of it."
        ) from None
    except (AttributeError, LookupError) as error:
        if "get_config" in str(error):
            raise InputError(f"Config file {file} has no get_config(), which is to return the config.") from None
        reason = _sentence(error).rstrip(".")
        raise InputError(
            f"No such field in the config of {file}: {reason}; `hmar_jax.TrainConfig` lists them."
        ) from None
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


@contextlib.contextmanager
def _naming_fault(file: str) -> Iterator[None]:
    """Turns what the program in a config file raises into an InputError with its line."""
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
