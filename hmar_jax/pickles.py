"""a pickle → plain Python data and NumPy arrays, without calling anything that the pickle names.

A pickle is a program whose operations import and call what they name, so that loading one from a stranger may run any
code. Here its operations are interpreted one by one. A name must be among those that the caller admits, and what is
called is the caller's stand-in for it. The memory used is bounded by the file's size.
"""

from __future__ import annotations

import pickletools
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hmar_jax.errors import InputError

_MOST_OPERATIONS = 3_000_000  # seconds; a checkpoint of a thousand tensors with its optimizer has some 200,000
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
        if not isinstance(shape, tuple) or not isinstance(dtype, _DType | None):
            raise TypeError
        self._data, self._order, self.shape, self.dtype = data, order, shape, str(dtype)

    def build(self, state: Any) -> None:
        """Fills an empty array with what NumPy stores: (version, shape, dtype, whether column-major, bytes)."""
        _, shape, dtype, fortran, data = state
        self.__init__(data, dtype, shape, "F" if fortran else "C")  # type: ignore[misc]

    def read(self) -> np.ndarray:
        """The array's values; ValueError where it holds no plain numbers, or not as many as its shape says."""
        if not re.fullmatch(r"[<>|=][biufc]\d{1,2}", self.dtype):
            raise ValueError(f"an array of dtype {self.dtype:.40}")
        data = self._data.encode("latin-1") if isinstance(self._data, str) else self._data
        return np.frombuffer(data, self.dtype).reshape(self.shape, order=self._order)


class _DType:
    """`numpy.dtype(code)`, whose byte order follows in `build`."""

    def __init__(self, code: str, *_: Any):
        self._code, self._order = code[:8], "|"

    def build(self, state: Any) -> None:
        self._order = state[1][:1]

    def __str__(self) -> str:
        return self._order + self._code


def _named_only(*_: Any) -> None:
    """Stands for what a pickle needs the name of alone, and for what is of no interest."""


def _first(*args: Any) -> Any:
    return args[0] if args else []


_NUMPY: dict[str, Callable[..., Any]] = {
    "dtype": _DType,
    "ndarray": _named_only,
    "core.multiarray._reconstruct": lambda *_: Array(),
    "core.multiarray.scalar": _named_only,
    "core.numeric._frombuffer": Array,
}
# Of what Python and NumPy themselves write into pickles: sets become lists, byte strings may stay text in Latin-1.
PLAIN: Mapping[str, Callable[..., Any]] = {
    **{f"numpy.{name}": stand_in for name, stand_in in _NUMPY.items()},
    **{f"numpy._{name}": stand_in for name, stand_in in _NUMPY.items() if name.startswith("core.")},
    **{f"{builtins}.{name}": _first for builtins in ("builtins", "__builtin__") for name in ("set", "bytearray")},
    "_codecs.encode": _first,
    "collections.OrderedDict": lambda pairs=(): {_key(name): value for name, value in pairs},
    "collections.defaultdict": lambda *_: {},
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
            return _Interpreter(find, where, persistent).run(stream)
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{where} is damaged ({type(error).__name__} in its pickle); copy or save it again.") from None


def _key(value: Any) -> Any:
    """A key of a dictionary: what cannot be one cheaply, such as a deeply nested tuple, becomes one without a name."""
    return value if isinstance(value, str | int | float | None) else object()


class _Interpreter:
    """The operations of a pickle, which work on a stack. A mark on it is where a list of arguments begins."""

    def __init__(self, find: Callable[[str], Callable[..., Any] | None], where: str, persistent: Callable[[Any], Any]):
        self._find, self._where, self._persistent = find, where, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._operations = 0

    def run(self, stream: BinaryIO) -> Any:
        for operation, value, _ in pickletools.genops(stream):
            self._operations += 1
            if self._operations > _MOST_OPERATIONS:
                raise InputError(f"{self._where} has a pickle of too many operations; save its state dict alone.")
            if operation.name == "STOP":
                return self._stack.pop()
            self._do(operation.name, value)
        raise EOFError

    def _do(self, name: str, value: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
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
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[int(value)] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[int(value)])
            case "GLOBAL":
                stack.append(self._global(*value.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self._global(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                called, args = self._pop(2)
                self._operations += sum(len(arg) for arg in args if isinstance(arg, list))  # which are copied
                stack.append(called.stand_in(*args))
            case "BUILD":
                (state,) = self._pop(1)
                if hasattr(stack[-1], "build"):  # else: attributes of a dictionary or a tensor, which have no use here
                    stack[-1].build(state)
            case "PERSID" | "BINPERSID":
                stack.append(self._persistent(value if name == "PERSID" else stack.pop()))
            case _ if isinstance(value, int | float | str | bytes | bytearray) and not name.startswith("EXT"):
                stack.append(value)
            case _:
                raise InputError(f"{self._where} has the operation {name} in its pickle; save its state dict alone.")

    def _global(self, module: str, name: str) -> Global:
        whole = f"{module}.{name}"
        stand_in = self._find(whole)
        if stand_in is None:
            raise InputError(
                f"{self._where} is refused: it holds {ascii(whole)[1:-1]:.80}, which is no tensor or plain data and "
                "could run any code when loaded; save its state dict alone, with torch.save or as .safetensors."
            )
        return Global(whole, stand_in)

    def _set_items(self, items: list[Any]) -> None:
        self._top(dict).update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise TypeError
        return self._stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError
        popped = self._stack[-count:]
        del self._stack[-count:]
        return popped

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        popped = self._stack[start:]
        del self._stack[start:]
        return popped
