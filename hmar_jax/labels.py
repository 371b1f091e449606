"""classes as users write them → labels, numbers from 0, with the names that were written.

A list is a line of CSV: words with commas between them, and a word that has a comma itself in double quotes. One rule
reads each word:

* a word that is a class's name is that class;
* any other whole number is a class's number, counted from 0, but only where no class has a whole number for a name:
  where classes are called 1, 2, 3, the word 0 is none of them;
* `FIRST-LAST` is a range, whose ends are read by the same rule. Between two names that are whole numbers it counts, so
  that 9-11 is 9, 10 and 11, wherever these stand in the model; between other names it follows the model's order.

What can be read in two ways is refused.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from hmar_jax.errors import InputError, printable, shown

MOST_LABELS = 10_000  # that are sampled at once; a command line of 128 KiB can name millions
HELP = (
    'by name, or by number from 0 where no class has a number for a name: A,b or 3,7 or 0-9 or fox-owl; "a, b",c has a '
    "name with a comma"
)


class Label(NamedTuple):
    """A class: its number in the model, and its name or number as the user wrote it."""

    number: int
    name: str


def parse_labels(text: str, class_names: Sequence[str], num_classes: int) -> list[Label]:
    """The classes of a list, in its order.

    Raises:
      InputError: a word is no class, or can be read in two ways; a number is out of range; or there are more than
        10,000 and than the model has classes.
    """
    try:
        words = next(csv.reader([text], skipinitialspace=True, strict=True), []) or [""]
    except csv.Error as error:
        raise InputError(
            f"{shown(text)} is not a list of classes ({error}); write commas between them, and a name that has a comma "
            'in double quotes: "a, b",c.'
        ) from None
    classes = _Classes(class_names, num_classes)
    labels: list[Label] = []
    for word in words:
        labels += classes.read(word)
        if len(labels) > max(MOST_LABELS, num_classes):
            raise InputError(
                f"{shown(text)} names more than {max(MOST_LABELS, num_classes)} classes; name fewer, or draw many of "
                "each class with --classes and --per-class."
            )
    return labels


def parse_label(text: str, class_names: Sequence[str], num_classes: int) -> Label:
    """The one class that an option asks for; as it is only one, a name with a comma needs no quotes."""
    classes = _Classes(class_names, num_classes)
    labels = (
        classes.read(text)
        if isinstance(text, str) and text in class_names
        else parse_labels(text, class_names, num_classes)
    )
    if len(labels) != 1:
        raise InputError(f"--label is {printable(text, 80)}; expected one class.")
    return labels[0]


def class_numbers(names: Sequence[str], class_names: Sequence[str], num_classes: int) -> list[int]:
    """The number of each class, which a Python call gives by name, or in digits where no class has a number for a name.

    Neither commas nor dashes are read: each is one class.

    Raises:
      InputError: what is no class, with the names that are nearest; or one of several.
    """
    classes = _Classes(class_names, num_classes)
    return [classes.one(name).number for name in names]


def every_class(class_names: Sequence[str], num_classes: int) -> list[Label]:
    """All classes of a model, in its order."""
    names = class_names or [str(number) for number in range(num_classes)]
    return [Label(number, name) for number, name in enumerate(names)]


class _Classes:
    """The classes of a model, by name and by number."""

    def __init__(self, names: Sequence[str], count: int) -> None:
        self._names, self._count = list(names), count
        self._numbers_of: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            self._numbers_of.setdefault(name, []).append(number)
        self._whole = {name: int(name) for name in names if _is_whole(name)}
        self._longest = 2 * max(map(len, names), default=0) + 100  # letters of a range, spaces and all

    def one(self, word: str) -> Label:
        """The class that a word stands for."""
        if label := self._named_or_numbered(word):
            return label
        near = self._near(word) or [name for name in self._names if len(name) <= 40][:3]
        expected = f"its name, such as {', '.join(map(shown, near))}" if near else "its name or number"
        if near and not self._whole:
            expected = f"its number, or {expected}"
        elif self._whole and _is_whole(word.strip()):
            expected += "; as some names are numbers, a class's number is an int, not a str"
        raise InputError(f"Label {shown(word)} is not a class of this model; expected {expected}.")

    def read(self, word: str) -> list[Label]:
        """The classes that a word stands for: one, or those of a range."""
        if not word.isascii() and not word.isprintable():  # UTF-8 of a command line whose locale is ASCII
            word = word.encode(errors="surrogateescape").decode(errors="surrogateescape")
        if label := self._named_or_numbered(word):
            return [label]
        word = word.strip()
        readings = [ends for at in re.finditer("-", word[: self._longest]) if (ends := self._ends(word, at.start()))]
        if len(readings) > 1:
            ways = " or ".join(f"{shown(first)} to {shown(last)}" for first, last in readings[:3])
            raise InputError(f"Label {shown(word)} can be read as {ways}; write those classes one by one.")
        if not readings:
            raise InputError(f"Label {shown(word)} is not a class of this model; expected {self._expected(word)}.")
        first, last = readings[0]
        if first not in self._numbers_of:
            return self._numbers(int(first), int(last))
        return self._counted(first, last) if {first, last} <= self._whole.keys() else self._between(first, last)

    def _named_or_numbered(self, word: str) -> Label | None:
        """The class of a name, with or without the spaces around it, or of a number; None where it is neither."""
        for text in (word, word.strip()):
            if text in self._numbers_of:
                return Label(self._number(text), text)
        word = word.strip()
        if not self._whole and _is_whole(word.removeprefix("-")):
            return self._numbers(int(word), int(word))[0]
        return None

    def _ends(self, word: str, at: int) -> tuple[str, str] | None:
        """The ends of a range whose dash is at a place of a word: two names, or two numbers; None where it is none."""
        first, last = word[:at].strip(), word[at + 1 :].strip()
        by_name = first in self._numbers_of and last in self._numbers_of
        by_number = not self._whole and _is_whole(first) and _is_whole(last) and int(first) <= int(last)
        return (first, last) if by_name or by_number else None

    def _number(self, name: str) -> int:
        first, *others = self._numbers_of[name]
        if others:
            numbers = " or ".join(map(str, [first, *others]))
            remedy = "give other names to them" if self._whole else f"give the number of one, {numbers}"
            raise InputError(f"{1 + len(others)} classes of this model are called {shown(name)}; {remedy}.")
        return first

    def _numbers(self, first: int, last: int) -> list[Label]:
        for wrong in (min(first, 0), max(last, self._count - 1)):
            if not 0 <= wrong < self._count:
                wrong = wrong if wrong < 0 else max(first, self._count)
                raise InputError(f"Label {wrong} is out of range; this model has classes 0 to {self._count - 1}.")
        return [Label(number, str(number)) for number in range(first, last + 1)]

    def _counted(self, first: str, last: str) -> list[Label]:
        """The classes called by the whole numbers from one to another."""
        start, end = self._whole[first], self._whole[last]
        by_value: dict[int, list[str]] = {}
        for name, value in self._whole.items():
            by_value.setdefault(value, []).append(name)
        names: list[str] = []
        for value in range(start, end + 1):
            called = by_value.get(value, [])
            if len(called) != 1:
                what = f"there are classes {' and '.join(called)}" if called else f"there is no class {value}"
                word = shown(f"{first}-{last}")
                raise InputError(f"Label {word} counts from {start} to {end}, but {what}; list the classes.")
            names += called
        if not names:
            raise InputError(f"Label {shown(f'{first}-{last}')} is a range that runs backwards; write {last}-{first}.")
        return [Label(self._number(name), name) for name in names]

    def _between(self, first: str, last: str) -> list[Label]:
        """The classes from one to another in the model's order."""
        start, end = self._number(first), self._number(last)
        if start > end:
            raise InputError(
                f"Label {shown(f'{first}-{last}')} is a range that runs backwards: {shown(first)} is class {start} of "
                f"this model and {shown(last)} class {end}; write "
                f"{printable(f'{last}-{first}', 80)}, or list the classes."
            )
        return [Label(number, self._names[number]) for number in range(start, end + 1)]

    def _near(self, word: str) -> list[str]:
        """Names, three at most, that have the word in them or are like it, whatever their letters' case."""
        word = word.strip().casefold()
        if _is_whole(word) or len(word) > self._longest:
            return []
        folded = {name.casefold(): name for name in self._names if len(name) <= 40}
        inside = [name for name in folded if word in name] if len(word) > 2 else []
        return [folded[name] for name in dict.fromkeys(inside + difflib.get_close_matches(word, folded))][:3]

    def _expected(self, word: str) -> str:
        """What a word that is no class could have been, as a part of a sentence."""
        few = [name for name in self._names[:12] if len(name) <= 40] or ["its names"]
        some = ", ".join(map(_quoted, few)) + (", …" if len(self._names) > len(few) else "")
        if any("," in name for name in self._names):
            some += " (names and ranges that have a comma in double quotes)"
        if not self._names:
            return "a number"
        if near := self._near(word):
            some += f", the nearest being {' and '.join(map(_quoted, near))}"
        if not self._whole:
            return f"a number or one of {some}"
        called = ""
        if _is_whole(word) and int(word) < len(self._names):
            called = f" (the class of that number is called {shown(self._names[int(word)])})"
        return f"one of {some}; as some of these are numbers, classes go by name alone{called}"


def written(numbers: Sequence[int], class_names: Sequence[str]) -> str:
    """A list that `parse_labels` reads as the classes of these numbers."""
    by_name = any(map(_is_whole, class_names))
    return ",".join(_quoted(class_names[number]) if by_name else str(number) for number in numbers)


def _is_whole(word: str) -> bool:
    return re.fullmatch(r"[0-9]{1,18}", word) is not None


def _quoted(name: str) -> str:
    """A name as a list has it."""
    return '"' + name.replace('"', '""') + '"' if re.search(r'[,"\r\n]|^\s|\s$', name) else name
