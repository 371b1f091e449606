"""a pickle → plain Python data and NumPy arrays, without calling anything that the pickle names.

A pickle is a program whose operations import and call what they name, so that loading one from a stranger may run any
code. Here its operations are interpreted one by one. A name must be among those that the caller admits, and what is
called is the caller's stand-in for it. The memory used is bounded by the file's size.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hmar_jax.errors import InputError, reason

_MOST_OPERATIONS = 1_000_000  # seconds; a checkpoint of a thousand tensors with its optimizer has some 200,000
_LONGEST = 2**28  # bytes of a pickle; one with the arrays of a VGG16 in it has 59 MB
_LONGEST_KEY = 1000  # letters of a dictionary's key; long ones that are equal take long to compare
_MOST_AXES, _LONGEST_AXIS = 32, 2**48
_NUMBERS = re.compile(r"[<>|=](b1|[iu][1248]|f[248]|c8|c16)")  # dtypes of arrays that are read
# What an interpreter of damaged operations runs into.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, MemoryError, struct.error)


class Global(NamedTuple):
    """What a pickle names, e.g. `collections.OrderedDict`, and what is called in its stead."""

    name: str
    stand_in: Callable[..., Any]


class Array:
    """A NumPy array in a pickle.

    Attributes:
      shape: of the array. dtype: of its numbers as NumPy calls it, e.g. `<f4`.
    """

    def __init__(self, data: Any = b"", dtype: Any = None, shape: Any = (0,), order: Any = "C"):
        if not isinstance(dtype, _DType | None):
            raise TypeError
        self._data, self._order, self.shape, self.dtype = data, order, numbers(shape), str(dtype)

    def build(self, state: Any) -> None:
        """Fills an empty array with what NumPy stores: (version, shape, dtype, whether column-major, bytes)."""
        _, shape, dtype, fortran, data = state
        self.__init__(data, dtype, shape, "F" if fortran else "C")  # type: ignore[misc]

    @property
    def dtype_name(self) -> str:
        """`float32` and the like; the code itself where it is not of plain numbers."""
        return np.dtype(self.dtype).name if _NUMBERS.fullmatch(self.dtype) else self.dtype

    def read(self) -> np.ndarray:
        """The array's values; ValueError where it holds no plain numbers, or not as many as its shape says."""
        if not _NUMBERS.fullmatch(self.dtype):
            raise ValueError(f"an array of dtype {self.dtype}")
        data = self._data.encode("latin-1") if isinstance(self._data, str) else self._data
        if not isinstance(data, bytes | bytearray) or self._order not in ("C", "F"):
            raise ValueError("an array without its numbers")
        return np.frombuffer(data, self.dtype).reshape(self.shape, order=self._order)


class _DType:
    """`numpy.dtype(code)`, whose byte order follows in `build`."""

    def __init__(self, code: Any, *_: Any):
        if not isinstance(code, str):
            raise TypeError
        self._code, self._order = code[:8], "|"

    def build(self, state: Any) -> None:
        if not isinstance(state[1], str):
            raise TypeError
        self._order = state[1][:1]

    def __str__(self) -> str:
        return self._order + self._code


def _named_only(*_: Any) -> None:
    """Stands for what a pickle needs the name of alone, and for what is of no interest."""


def _first(*args: Any) -> Any:
    return args[0] if args else []


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for name, value in pairs:
        _put(made, name, value)
    return made


def _put(into: dict[Any, Any], key: Any, value: Any) -> None:
    """Sets an item. A key that is not cheap to hash, such as a deeply nested tuple, becomes one without a name."""
    if (isinstance(key, str) and len(key) > _LONGEST_KEY) or (isinstance(key, int) and key.bit_length() > 64):
        raise ValueError("a key of a dictionary that is too long")
    key = key if isinstance(key, str | int | float | None) else object()
    if key in into:  # as no program writes it
        raise ValueError("a dictionary with one key twice")
    into[key] = value


def numbers(value: Any) -> tuple[int, ...]:
    """A shape, or something else of whole numbers of 0 or more, of a length and a size that an array may have."""
    if not isinstance(value, tuple | list) or len(value) > _MOST_AXES:
        raise ValueError("a shape that is none")
    if not all(type(number) is int and 0 <= number < _LONGEST_AXIS for number in value):
        raise ValueError("a number where no such number can be")
    return tuple(value)


_NUMPY: dict[str, Callable[..., Any]] = {
    "dtype": _DType,
    "ndarray": _named_only,
    "core.multiarray._reconstruct": lambda *_: Array(),
    "core.multiarray.scalar": _named_only,
    "core.numeric._frombuffer": Array,
}
_TYPES = ("bool", "int", "long", "float", "complex", "str", "list", "dict", "tuple")  # e.g. `defaultdict(int)` has one
_BUILTINS = dict.fromkeys(_TYPES, _named_only) | dict.fromkeys(("set", "frozenset", "bytearray"), _first)
# Of what Python and NumPy themselves write into pickles: sets become lists, byte strings may stay text in Latin-1.
PLAIN: Mapping[str, Callable[..., Any]] = {
    **{f"numpy.{name}": stand_in for name, stand_in in _NUMPY.items()},
    **{f"numpy._{name}": stand_in for name, stand_in in _NUMPY.items() if name.startswith("core.")},
    **{f"{module}.{name}": x for module in ("builtins", "__builtin__") for name, x in _BUILTINS.items()},
    "_codecs.encode": _first,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda *_: {},
    "collections.deque": lambda *_: [],
}


def load(
    stream: BinaryIO,
    find: Callable[[str], Callable[..., Any] | None],
    where: str,
    persistent: Callable[[Any], Any] = _named_only,
) -> Any:
    """Interprets one pickle, from where the stream stands up to the pickle's end.

    Args:
      find: a name with its module → what stands for it, None where it is refused.
      where: the file, to begin the sentences of errors.
      persistent: what a persistent id stands for.

    Returns:
      Dicts, lists, tuples, strings, bytes and numbers, `Array`, and what the stand-ins return.

    Raises:
      InputError: the pickle names what is not admitted, or is damaged.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in what is no text
            return _Interpreter(find, where, persistent).run(_Rest(stream))
    except InputError:
        raise
    except _DAMAGE as error:
        why = reason(error) if isinstance(error, ValueError) else type(error).__name__
        raise InputError(f"{where} is damaged ({why} in its pickle); copy or save it again.") from None


class _Rest:
    """What is left of a stream. A pickle may ask for any number of bytes, and memory is taken for all of them."""

    def __init__(self, stream: BinaryIO):
        self._stream, start = stream, stream.tell()
        self._end = min(stream.seek(0, io.SEEK_END), start + _LONGEST)
        stream.seek(start)

    def read(self, count: int) -> bytes:
        return self._stream.read(min(count, self._end - self._stream.tell()))

    def readline(self) -> bytes:
        return self._stream.readline(self._end - self._stream.tell())


_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
# The operations whose argument is put on the stack as it is.
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip


class _Interpreter:
    """The operations of a pickle, which work on a stack. A mark on it is where a list of arguments begins."""

    def __init__(self, find: Callable[[str], Callable[..., Any] | None], where: str, persistent: Callable[[Any], Any]):
        self._find, self._where, self._persistent = find, where, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._operations = 0

    def run(self, stream: _Rest) -> Any:
        for operation, value, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            self._count(1)
            if operation.name == "STOP":
                (made,) = self._stack
                if self._marks:
                    raise IndexError
                return made
            self._do(operation.name, value)
        raise EOFError

    def _count(self, operations: int) -> None:
        self._operations += operations
        if self._operations > _MOST_OPERATIONS:
            raise InputError(f"{self._where} has a pickle of too many operations; save its state dict alone.")

    def _do(self, name: str, value: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(value)
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
            return
        match name:
            case "PROTO" | "FRAME":
                if name == "PROTO" and value > 5:
                    raise ValueError(f"its protocol is {value}")
            case "MARK":
                self._marks.append(len(stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[int(value)] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[int(value)])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "LIST" | "FROZENSET":
                stack.append(self._since_mark())
            case "DICT":
                items = self._since_mark()
                stack.append({})
                self._set_items(items)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self._pop(1) if name == "APPEND" else self._since_mark()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                self._set_items(self._pop(2) if name == "SETITEM" else self._since_mark())
            case "POP" if not self._marks or self._marks[-1] < len(stack):
                stack.pop()
            case "POP" | "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(self._top())
            case "GLOBAL":
                stack.append(self._global(*value.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self._global(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                called, args = self._pop(2)
                stack.append(self._called(called, args))
            case "BUILD":
                (state,) = self._pop(1)
                if isinstance(self._top(), Array | _DType):  # others have attributes that are of no use here
                    stack[-1].build(state)
            case "PERSID" | "BINPERSID":
                (value,) = [value] if name == "PERSID" else self._pop(1)
                stack.append(self._persistent(value))
            case _:
                raise InputError(f"{self._where} has the operation {name} in its pickle; save its state dict alone.")

    def _called(self, called: Any, args: Any) -> Any:
        """What the stand-in for a global makes of a tuple of arguments."""
        if not isinstance(called, Global) or not isinstance(args, tuple):
            raise TypeError
        # A stand-in may go through all that it is given, which the memo lets be there again and again.
        self._count(len(args) + sum(len(arg) for arg in args if isinstance(arg, tuple | list | dict)))
        return called.stand_in(*args)

    def _global(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        whole = f"{module}.{name}"
        stand_in = self._find(whole) if len(whole) <= _LONGEST_KEY else None
        if stand_in is None:
            raise InputError(
                f"{self._where} is refused: it holds {ascii(whole[:80])[1:-1]:.80}, which is no tensor or plain data "
                "and could run any code when loaded; save its state dict alone, with torch.save or as .safetensors."
            )
        return Global(whole, stand_in)

    def _set_items(self, items: list[Any]) -> None:
        into = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(into, key, value)

    def _top(self, kind: type = object) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise IndexError
        if not isinstance(self._stack[-1], kind):
            raise TypeError
        return self._stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) - count < (self._marks[-1] if self._marks else 0):
            raise IndexError
        popped = self._stack[-count:]
        del self._stack[-count:]
        return popped

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        popped = self._stack[start:]
        del self._stack[start:]
        return popped
