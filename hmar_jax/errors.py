"""The exceptions that commands turn into one sentence and an exit code."""

import re


class InputError(ValueError):
    """Bad input, exit code 2. The message is one sentence: the value, what was expected, what to do."""


class TransientError(InputError):
    """What another try may not meet again, such as a machine that is late: exit code 1."""


def reason(error: Exception) -> str:
    """What an error says, as part of a sentence: its first line or clause; its type's name where it says nothing."""
    said = re.split(r"[\n;]", str(error).strip(), maxsplit=1)[0]
    return said[:200].rstrip(".: ") or type(error).__name__
