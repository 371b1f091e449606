"""optimized HLO text → computations, instructions, and how often a run of the program comes past each of them.

XLA's own cost analysis counts the body of a loop once, and layers run in loops. TPUs and GPUs write the same text with
other habits: a TPU's says nothing of trip counts, and marks arrays in other memory than HBM, `S(1)` for VMEM. Shapes
are those of one device's part.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::((?:\([^)]*\)|[^}(])*))?\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


class Array(NamedTuple):
    """`f32[8,128]{1,0:T(8,128)S(1)}`: dtype, sizes, axes from the fastest on, tiles and memory space."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Of its elements, without padding."""
        return math.prod(self.dims) * self._bits // 8

    @property
    def in_hbm(self) -> bool:
        return "S(" not in self.layout

    @property
    def padded(self) -> int:
        """Bytes with the padding of its tiles, wherever it is."""
        tile = re.match(r"T\(([\d,]+)\)", self.layout)
        if not tile:
            return self.bytes
        sides = numbers(tile[1])
        sizes = [1] * (len(sides) - len(self.dims)) + [self.dims[axis] for axis in reversed(self.order)]
        tiled = [-(-size // side) * side for size, side in zip(sizes[-len(sides) :], sides, strict=True)]
        return math.prod(sizes[: -len(sides)]) * math.prod(tiled) * self._bits // 8

    @property
    def _bits(self) -> int:
        digits = re.match(r"[a-z]+(\d+)", self.dtype)  # bf16, f8e4m3fn; a token has none
        return _BITS.get(self.dtype) or (int(digits[1]) if digits else 0)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """`%name = arrays opcode(operands), rest`; of a parameter or constant, `rest` is its number or value."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """What JAX calls it, such as `jit(train_step)/jvp()/while/body/dot_general`; may be empty."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found[1].replace("\\'", "'") if found else ""

    def attribute(self, name: str) -> str:
        """A word that stands behind `name=`, or nothing."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


class Run(NamedTuple):
    """An instruction, how often it runs, its computation, and the one outside all fusions that it is a part of."""

    instruction: Instruction
    times: int
    computation: str
    outer: str

    @property
    def is_fused(self) -> bool:
        return self.computation != self.outer


class Program:
    """The text, understood.

    Attributes:
      computations: name → its instructions by name, in the order they run. entry: the name of the first.
      unknown_loops: names of loops whose trip count cannot be read: their bodies count once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.unknown_loops: set[str] = set()
        self._sources = _Sources(text)
        current: Computation = {}
        for line in text.splitlines():
            if heading := _COMPUTATION.match(line):
                current = self.computations.setdefault(heading[2], {})
                self.entry = heading[2] if heading[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current[found[2]] = _instruction(line, found)

    @functools.cached_property
    def runs(self) -> list[Run]:
        """Every instruction that the program comes past, those in fusions too."""
        return list(self._walk(self.entry, 1, self.entry))

    def _walk(self, computation: str, times: int, outer: str) -> Iterator[Run]:
        for instruction in self.inside(computation):
            yield Run(instruction, times, computation, outer)
            match instruction.opcode:
                case "while":
                    often = times * self._trip_count(instruction)
                    for part in ("condition", "body"):
                        called = instruction.attribute(part)
                        yield from self._walk(called, often, called)
                case "conditional":
                    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                    names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
                    for called in names or [instruction.attribute(f"{way}_computation") for way in ("true", "false")]:
                        yield from self._walk(called, times, called)
                case "call":
                    called = instruction.attribute("to_apply")
                    yield from self._walk(called, times, called)
                case "fusion" | "async-start":
                    yield from self._walk(instruction.attribute("calls"), times, outer)

    def _trip_count(self, loop: Instruction) -> int:
        """As XLA knows it, or else the one whole number in a condition `count < number`: scans count up from 0."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = list(self.inside(loop.attribute("condition")))
        for fusion in [i for i in condition if i.opcode == "fusion"]:
            condition += self.inside(fusion.attribute("calls"))
        limits = [i.rest for i in condition if i.opcode == "constant" and i.rest.isdigit()]
        if len(limits) == 1 and any(i.opcode == "compare" and "direction=LT" in i.rest for i in condition):
            return int(limits[0])
        self.unknown_loops.add(loop.name)
        return 1

    def inside(self, computation: str) -> list[Instruction]:
        """The instructions of a computation."""
        return list(self.computations.get(computation, {}).values())

    def parameters(self, computation: str) -> dict[int, str]:
        """The names of a computation's parameters by their numbers."""
        return {int(i.rest): i.name for i in self.inside(computation) if i.opcode == "parameter"}

    def root(self, computation: str) -> Instruction | None:
        """What a computation gives."""
        return next((i for i in self.inside(computation) if i.is_root), None)

    def source(self, instruction: Instruction) -> str:
        """`hmar_jax/transformer/blocks.py:119`, the innermost line of ours that it comes from; may be empty."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        return self._sources.line(int(frame[1])) if frame else ""


def numbers(text: str) -> tuple[int, ...]:
    """`"8,128"` → (8, 128)."""
    return tuple(int(number) for number in text.split(",") if number)


def _instruction(line: str, found: re.Match[str]) -> Instruction:
    """A line of a computation, `found` being its start up to the equals sign."""
    start = found.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    arrays = tuple(
        Array(dtype, numbers(dims), numbers(order), layout)
        for dtype, dims, order, layout in _ARRAY.findall(line[start:end])
    )
    opcode, _, _ = line[end + 1 :].partition("(")
    opened = end + 1 + len(opcode)
    closed = _closing(line, opened)
    inside = line[opened + 1 : closed]
    is_leaf = opcode in ("parameter", "constant")
    operands = () if is_leaf else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(found[2], arrays, opcode, operands, inside if is_leaf else line[closed + 1 :], bool(found[1]))


def _closing(line: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(line)


class _Sources:
    """The tables at the top of the text: stack frames → places → files."""

    def __init__(self, text: str):
        self._tables: dict[str, dict[int, str]] = collections.defaultdict(dict)
        table = ""
        for line in text.partition("\n%")[0].splitlines():
            if re.fullmatch(r"[A-Z]\w+", line):
                table = line
            elif row := re.match(r"(\d+) (.*)", line):
                self._tables[table][int(row[1])] = row[2]

    def line(self, frame: int) -> str:
        """The innermost line of this project at or above a stack frame, or nothing."""
        while fields := self._fields("StackFrames", frame):
            place = self._fields("FileLocations", fields["file_location_id"])
            file = self._tables["FileNames"].get(place.get("file_name_id", 0), "")
            if ours := re.search(r'(?:hmar_jax|pallas_kernels)/[^"]*', file):
                return f"{ours[0]}:{place['line']}"
            frame = fields["parent_frame_id"] - 1  # they count from 1 there, and from 0 for none
        return ""

    def _fields(self, table: str, row: int) -> dict[str, int]:
        return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", self._tables[table].get(row, ""))}
