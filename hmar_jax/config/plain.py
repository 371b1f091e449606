"""plain values (JSON, ml_collections) ⇄ frozen dataclasses, whose fields have their declared types and are in bounds.

from_plain, from_config_dict    → a dataclass, every value checked, or a sentence
to_plain, to_config_dict        ← back again
Checked                         the base class of dataclasses that are checked also where Python code makes them
checked_later                   has them take values out of bounds while a config file runs, before overrides
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import types
import typing
import unicodedata
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any, Literal

import ml_collections

from hmar_jax.errors import InputError, shown

_GREATEST = 1e9  # of a factor of losses or gradients: far from the end of float32
_later: contextvars.ContextVar[bool] = contextvars.ContextVar("_later", default=False)


@contextlib.contextmanager
def checked_later() -> Iterator[None]:
    """In the block, and in this thread alone, dataclasses that are made are not checked beyond their fields' types.

    A config file makes its dataclasses before overrides change them, and some values are in bounds only together with
    an override. What the file returns is made once more, and checked, after the overrides.
    """
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


class Checked:
    """A config whose fields have their declared types, however it is made: numbers and lists are converted, other types
    refused. Then `_check` refuses values out of bounds. `group` is what its fields' names begin with in a sentence.
    """  # fmt: skip

    _group: typing.ClassVar[str]

    def __init_subclass__(cls, group: str = "") -> None:
        cls._group = group

    def __post_init__(self) -> None:
        hints = _hints(typing.cast(Any, type(self)))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            given = getattr(self, field.name)
            value = _convert(hints[field.name], given, self._group + field.name)
            if type(given) is not int:  # which stays one where a float is declared, as sentences show it
                object.__setattr__(self, field.name, value)
        if not _later.get():
            self._check()

    def _check(self) -> None:
        """Raises InputError where a value is out of bounds, or does not go with another."""

    def _check_whole(self, least: int, **most: int) -> None:
        """Raises InputError, naming the field, unless each field that is named is from `least` to its bound."""
        for name, bound in most.items():
            value = getattr(self, name)
            if not least <= value <= bound:
                expected = f"{least} or more" if value < least else f"{bound} at most"
                raise InputError(f"{self._group}{name} is {shown(value)}; expected {expected}.")

    def _check_factors(self, *names: str) -> None:
        """Raises InputError, naming the field, unless each is from 0 to what float32 has room for times anything."""
        for name in names:
            value = getattr(self, name)
            if not 0 <= value <= _GREATEST:
                expected = f"{_GREATEST:g} at most" if _GREATEST < value < math.inf else "0 or more"
                raise InputError(f"{self._group}{name} is {value}; expected {expected}.")


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A config dataclass as the ConfigDict that a config file returns, tuples and nesting kept."""
    return ml_collections.ConfigDict(to_plain(config))


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts of JSON types (tuples stay tuples)."""
    return {
        field.name: tuple(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def _plain(value: Any) -> Any:
    return to_plain(value) if dataclasses.is_dataclass(value) else value


def from_config_dict[T](cls: type[T], config: ml_collections.ConfigDict) -> T:
    """What `to_config_dict` made, perhaps changed since, checked: see `from_plain`."""
    return from_plain(cls, config.to_dict())


def from_plain[T](cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The config dataclass `cls` from nested mappings, as JSON gives them.

    Raises:
      InputError: no mapping, a name that the dataclass does not have, a missing one, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{cls.__name__} is {shown(values)}; expected its fields by name.")
    hints = _hints(typing.cast(Any, cls))
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise InputError(
                f"Config field {shown(where + str(name))} does not exist; {cls.__name__} has {', '.join(fields)}."
            )
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"Config field '{where}{name}' is missing.")
    return cls(**{name: _convert(hints[name], value, where + name) for name, value in values.items()})


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, whose text takes long to evaluate."""
    return typing.get_type_hints(typing.cast(Any, cls))


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as type `hint`: nested dataclasses built, lists made tuples, ints taken as floats; else InputError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value, name)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_plain(typing.cast(type, hint), value, f"{name}.")
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], item, name) for item in value)
    if origin is Literal and isinstance(value, str) and value in args:
        return value
    if hint is float and isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):  # NumPy's too
        return int(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = " or ".join(map(repr, args)) if origin is Literal else str(hint if origin else hint.__name__)
    raise InputError(f"Config field '{name}' is {shown(value)}; expected {expected}.")


def check_names(names: tuple[str, ...]) -> None:
    """Raises InputError unless class names tell classes apart, and can be written in a line and in a file."""
    seen = set()
    for number, name in enumerate(names):
        if not name.strip():
            raise InputError(f"The name of class {number} is {shown(name)}, which is blank; give it a name.")
        if not is_line(name):
            raise InputError(
                f"The name of class {number} is {shown(name)}, which has a control character or is no Unicode text; "
                "give it another name."
            )
        if name in seen:
            raise InputError(f"Two classes are called {shown(name)}; give one of them another name.")
        seen.add(name)


def is_line(text: str) -> bool:
    """Whether a text has no control characters, such as line ends and escapes, and can be written as UTF-8."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)
