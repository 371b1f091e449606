"""The exceptions that commands turn into one sentence and an exit code."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

BUG = 70  # EX_SOFTWARE of sysexits.h


class HmarError(Exception):
    """What a command prints as one sentence: the value, what was expected, what to do.

    Attributes:
      exit_code: what the command ends with. Launchers start it again after 1, and give up when it ends with 2 again.
        Any other exception is a bug of ours, and ends a command with `BUG`.
    """

    exit_code = 2

    def __init__(self, sentence: str):
        super().__init__(printable(sentence))


class InputError(HmarError, ValueError):
    """Bad input: an argument, a config or a file that the user must mend."""


class MachineError(HmarError, RuntimeError):
    """The machine lacks what the user must provide, such as room on a disk, memory or a permission."""


class DivergedError(HmarError, ArithmeticError):
    """A training run whose loss or gradient is no longer finite."""


class TransientError(HmarError, RuntimeError):
    """What another try may not meet again, such as a machine that is late."""

    exit_code = 1


def shown(value: Any, most: int = 80) -> str:
    """A value as a sentence shows it: its repr in one line, cut where it has more than `most` characters."""
    try:
        text = printable(" ".join(repr(value).split()))
    except Exception:  # an int of thousands of digits, a deep list, an object whose repr fails
        text = f"({type(value).__name__})"
    return text if len(text) <= most else f"{text[: most - 3]}…"


# They can be iterated over, but are no lists of numbers: the items of bytes are integers, those of a set have no order.
NO_LISTS = (str, bytes, bytearray, dict, set, frozenset)
_LONGEST_WORD = 200  # a path may well have a hundred and fifty letters


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises InputError, with the argument's name, unless a value is one of these texts."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {shown(value)}; expected {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}.")


def printable(text: str, most: int = 1000) -> str:
    """A text as a terminal may have it: line ends and control characters escaped, the middle of a long one left out,
    and that of a long word.

    What a file says may hold sequences that move a terminal's cursor or write kilobytes.
    """  # fmt: skip
    if len(text) > _LONGEST_WORD:
        text = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _without_middle(word[0], _LONGEST_WORD), text)
    if len(text) > most:
        text = _without_middle(text, most)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _without_middle(text: str, most: int) -> str:
    return f"{text[: most * 2 // 3]} … {text[-most // 3 :]}"


def reason(error: Exception) -> str:
    """What an error says, as part of a sentence: its first line or clause; its type's name where it says nothing."""
    said = re.split(r"[\n;]", str(error).strip(), maxsplit=1)[0]
    return said[:200].rstrip(".: ") or type(error).__name__


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
    """Begins the sentence of an error in the block with `what` and a colon."""
    try:
        yield
    except HmarError as error:
        raise type(error)(f"{what}: {error}") from None


@contextlib.contextmanager
def device_memory(remedy: str) -> Iterator[None]:
    """Turns a lack of memory in the block, the device's or this machine's, into a MachineError with the remedy."""
    import jax

    try:
        yield
    except MemoryError:
        raise MachineError(f"This machine has too little memory; {remedy}.") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MachineError(f"The device has too little memory ({reason(error)}); {remedy}.") from None
