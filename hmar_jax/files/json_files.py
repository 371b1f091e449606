"""JSON text or file → plain values, checked: every JSON file that the project reads goes through here.

A file may be damaged or made to harm, so its size, its depth and its numbers are bounded before anybody uses them, and
what Python's parser lets through although JSON or UTF-8 forbid it is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hmar_jax.errors import InputError, shown
from hmar_jax.files.paths import read_bytes

MOST_BYTES = 16 * 2**20  # a config.json with a hundred thousand class names has 2 MiB
_DEEPEST = 64  # levels of lists and objects; ours have six at most


def read(path: Path, what: str, remedy: str) -> Any:
    """The value in a JSON file.

    Args:
      what: what a sentence calls the file, before its path. remedy: what to do where it is damaged, as the end of a
        sentence.

    Raises:
      FileNotFoundError, NotADirectoryError: it does not exist.
      InputError: it is no regular file, may not be read, or is not JSON as `parse` has it.
      TransientError: the disk does not answer.
    """
    return parse(read_bytes(path, what, MOST_BYTES), f"{what} {path}", remedy)


def parse(content: str | bytes, what: str, remedy: str) -> Any:
    """The value of a JSON text: dicts, lists, str, int within 64 bits, finite float, bool and None.

    Args:
      content: text, or its bytes in UTF-8. what: what a sentence calls it. remedy: what to do where it is no JSON, as
        the end of a sentence.

    Raises:
      InputError: it is no JSON, is larger than 16 MiB or deeper than 64 levels, has a number that is not finite or
        beyond 64 bits, a name twice in one object, or half a surrogate pair.
    """
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES // 2**20} MiB")
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_number
        )
        _check_depth(value)
    except RecursionError:
        why = f"it is nested deeper than {_DEEPEST} levels"
    except UnicodeError:
        why = "it is not UTF-8"
    except ValueError as error:
        why = str(error)
    else:
        return value
    raise InputError(f"{what} is not JSON ({why}); {remedy}.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"an object has the name {shown(name)} twice")
        made[name] = value
    return made


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the number {text:.20}… does not fit into 64 bits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.20} is not finite")
    return value


def _check_depth(value: Any) -> None:
    """Raises RecursionError where a value is too deep, UnicodeError where a text in it cannot be written as UTF-8."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        for item in level:
            if isinstance(item, str):
                item.encode()
        inner = [[*item, *item.values()] if isinstance(item, dict) else item for item in level]
        level = [part for item in inner if isinstance(item, list) for part in item]
        if not level:
            return
    raise RecursionError
