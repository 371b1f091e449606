"""What commands write: lines without control characters, to streams that may be closed, full or no longer read."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from hmar_jax.errors import printable

_LONGEST_ERROR = 300  # letters of what argparse says, which repeats the arguments


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows arguments escaped and cut, and that reads `--option=--` in every Python."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        for word in args or ():
            if word.startswith("-") and word.endswith("=--"):  # Python 3.12 and 3.13 drop the value and then miss it
                self.error(f"argument {word[:-3]}: expected a value, not --; a file of that name is ./--")
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse says nothing where a disk is full

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, _LONGEST_ERROR))


class OneLine(logging.Formatter):
    """Log messages without line ends and control characters, which a file's or a class's name may have."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def say(text: str, *, flush: bool = False) -> None:
    """Prints lines, with control characters escaped: they may hold names from files and arguments."""
    print("\n".join(map(printable, text.split("\n"))), flush=flush)


def open_streams() -> None:
    """Gives standard streams that are closed a file that takes all, and others an escape for letters they lack.

    Left closed, the next file to be opened would get the number of standard output, and what libraries print.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, so that of the stream
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without the letters of a class name or path


def settle_streams() -> None:
    """Writes what is left to write; what a full disk or a reader that has gone does not take is dropped.

    Python would try again at its end, complain, and leave with an exit code of its own.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
