"""The exceptions that commands turn into one sentence and an exit code."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input, exit code 2. The message is one sentence: the value, what was expected, what to do."""


class TransientError(InputError):
    """What another try may not meet again, such as a machine that is late: exit code 1."""


def reason(error: Exception) -> str:
    """What an error says, as part of a sentence: its first line or clause; its type's name where it says nothing."""
    said = re.split(r"[\n;]", str(error).strip(), maxsplit=1)[0]
    return said[:200].rstrip(".: ") or type(error).__name__


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
    """Begins the sentence of an InputError in the block with `what` and a colon."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{what}: {error}") from None


@contextlib.contextmanager
def device_memory(remedy: str) -> Iterator[None]:
    """Turns a device's lack of memory in the block into an InputError that ends with the remedy."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"The device has too little memory ({reason(error)}); {remedy}.") from None
