"""Classes on the command line have one reading: by name; by number only where no name is a number."""

import pytest

from hmar_jax.errors import InputError
from hmar_jax.labels import HELP, every_class, parse_label, parse_labels, written

LETTERS = ["a", "b", "c"]
SORTED_AS_TEXT = sorted(map(str, range(12)))  # as folders 0 … 11 are: 0, 1, 10, 11, 2, …
FROM_ONE = ["1", "2", "3"]
DOGS = ["golden retriever, dog", "black-and-tan coonhound", 'a "small" dog', "fox", "1-3"]
DASHES = ["a", "b", "c", "a-b", "b-c"]

READ = {
    "numbers": ("3, 1,0-2", ["w", "x", "y", "z"], [(3, "3"), (1, "1"), (0, "0"), (1, "1"), (2, "2")]),
    "numbers of a model without names": ("7,0", [], [(7, "7"), (0, "0")]),
    "names and numbers": ("b,0", LETTERS, [(1, "b"), (0, "0")]),
    "a range of names": ("a-c", LETTERS, [(0, "a"), (1, "b"), (2, "c")]),
    "names that are numbers, out of order": ("9,10,11", SORTED_AS_TEXT, [(11, "9"), (2, "10"), (3, "11")]),
    "a range of them": ("9-11", SORTED_AS_TEXT, [(11, "9"), (2, "10"), (3, "11")]),
    "a range of them across the order": ("1-3", SORTED_AS_TEXT, [(1, "1"), (4, "2"), (5, "3")]),
    "names from one": ("1,2,3", FROM_ONE, [(0, "1"), (1, "2"), (2, "3")]),
    "a range from one": (" 1 - 3 ", FROM_ONE, [(0, "1"), (1, "2"), (2, "3")]),
    "numbers with zeros": ("08-10", ["10", "08", "09"], [(1, "08"), (2, "09"), (0, "10")]),
    "a number and a letter": ("2-a", ["1", "2", "x", "a"], [(1, "2"), (2, "x"), (3, "a")]),
    "a comma": ('"golden retriever, dog",fox', DOGS, [(0, DOGS[0]), (3, "fox")]),
    "quotes": ('"a ""small"" dog"', DOGS, [(2, DOGS[2])]),
    "quotes inside": ('a "small" dog', DOGS, [(2, DOGS[2])]),
    "dashes": ("black-and-tan coonhound", DOGS, [(1, DOGS[1])]),
    "a name that looks like a range": ("1-3", DOGS, [(4, "1-3")]),
    "a range to it": ("fox-1-3", DOGS, [(3, "fox"), (4, "1-3")]),
    "a range from a name with dashes": ("black-and-tan coonhound-fox", DOGS, [(1, DOGS[1]), (2, DOGS[2]), (3, "fox")]),
    "a name is read before a range": ("a-b", DASHES, [(3, "a-b")]),
    "letters of other scripts": ("Žába,ねこ", ["ねこ", "Žába"], [(1, "Žába"), (0, "ねこ")]),
    "such letters where the locale is ASCII": ("\udcc5\udcbdaba", ["Žaba"], [(0, "Žaba")]),
    "a range to a name with a comma": ('"fox-1, 2"', ["fox", "1, 2"], [(0, "fox"), (1, "1, 2")]),
    "spaces at the ends of a name": ("' x',\" y \"", ["' x'", " y "], [(0, "' x'"), (1, " y ")]),
}


@pytest.mark.parametrize("case", READ)
def test_classes_are_read(case):
    text, names, expected = READ[case]
    assert parse_labels(text, names, len(names) or 10) == expected


REFUSED = {
    "no class": ("Q", LETTERS, "Label 'Q' is not a class of this model; expected a number or one of a, b, c."),
    "nothing": ("", LETTERS, "Label '' is not a class"),
    "nothing after a comma": ("a,", LETTERS, "Label '' is not a class"),
    "a number too high": ("0,3", LETTERS, "Label 3 is out of range; this model has classes 0 to 2."),
    "a number below 0": ("-1", LETTERS, "Label -1 is out of range; this model has classes 0 to 2."),
    "a range too long": ("0-999999999999", LETTERS, "Label 3 is out of range; this model has classes 0 to 2."),
    "a range too high": ("7-9", LETTERS, "Label 7 is out of range"),
    "digits of another script": ("²", LETTERS, "Label '²' is not a class"),
    "a long number": ("9" * 5000, LETTERS, "is not a class"),
    "half a range": ("1-", LETTERS, "Label '1-' is not a class"),
    "a dash": ("-", LETTERS, "Label '-' is not a class"),
    "two dashes": ("1--2", LETTERS, "Label '1--2' is not a class"),
    "numbers backwards": ("2-1", LETTERS, "Label '2-1' is not a class"),
    "names backwards": ("c-a", LETTERS, "runs backwards: 'c' is class 2 of this model and 'a' class 0; write a-c, or"),
    "a name and a number": ("a-2", LETTERS, "Label 'a-2' is not a class"),
    "a number where names are numbers": (
        "0",
        FROM_ONE,
        "Label '0' is not a class of this model; expected one of 1, 2, 3; as some of these are numbers, classes go by "
        "name alone (the class of that number is called '1').",
    ),
    "a range from such a number": ("0-3", FROM_ONE, "Label '0-3' is not a class"),
    "a range over a gap": ("1-4", ["1", "2", "4"], "Label '1-4' counts from 1 to 4, but there is no class 3; list"),
    "a range over a long gap": ("1-999999999", ["1", "999999999"], "but there is no class 2"),
    "a range over two of one number": ("1-2", ["1", "01", "2"], "but there are classes 1 and 01; list"),
    "numbers for names backwards": ("11-9", SORTED_AS_TEXT, "'11-9' is a range that runs backwards; write 9-11."),
    "a range of two readings": ("a-b-c", DASHES, "can be read as 'a' to 'b-c' or 'a-b' to 'c'; write those classes"),
    "a name of two classes": (
        "x",
        ["x", "y", "x"],
        "2 classes of this model are called 'x'; give the number of one, 0 or",
    ),
    "a comma without quotes": ("golden retriever, dog", DOGS, 'one of "golden retriever, dog", black-and-tan'),
    "half a quote": ('"a,b', LETTERS, "is not a list of classes (unexpected end of data); write commas between them"),
    "two lines": ("a\nb", LETTERS, "is not a"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_class_or_could_be_two_is_refused(case):
    text, names, expected = REFUSED[case]
    with pytest.raises(InputError) as error:
        parse_labels(text, names, len(names))
    assert expected in str(error.value)
    assert str(error.value).endswith(".")


def test_one_class_alone_needs_no_quotes():
    assert (
        parse_label("golden retriever, dog", DOGS, 5) == parse_label('"golden retriever, dog"', DOGS, 5) == (0, DOGS[0])
    )
    with pytest.raises(InputError, match="--label is a,b; expected one class"):
        parse_label("a,b", LETTERS, 3)


@pytest.mark.parametrize("names", [LETTERS, SORTED_AS_TEXT, FROM_ONE, DOGS, DASHES, []])
def test_what_is_written_is_read_back(names):
    count = len(names) or 10
    numbers = [0, count - 1, 1]
    assert [label.number for label in parse_labels(written(numbers, names), names, count)] == numbers
    assert [label.number for label in every_class(names, count)] == list(range(count))


def test_the_help_says_how_classes_are_read():
    assert "by name, or by number from 0 where no class has a number for a name" in HELP
