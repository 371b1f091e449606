"""a compiled program → what one run of it moves, multiplies and keeps on a device."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from hmar_jax.compile_check.hlo import Array, Instruction, Program, Run, numbers

# What a ring sends of an array of n devices: all-reduce goes round twice.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
# They name or order what is there already; a `-done` only waits for what its `-start` has been counted for.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "add-dependency",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather", "slice-start")
# What neither computes nor says more of an array than what it was made from.
_FORMS = ("bitcast", "copy", "convert", "reshape", "transpose", "reduce-precision")
_KEEPING = ("dynamic_update_slice", "broadcast_in_dim", "while", "convert_element_type", "reshape", "transpose")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a kind.

    Attributes:
      count: of them in a run. payload: bytes of the whole arrays that they reduce, gather or exchange.
      sent: bytes that a device sends for them, as rings do.
    """

    count: int
    payload: int
    sent: float


def collectives(program: Program) -> dict[str, Collective]:
    """Kind → the sums of its collectives, the kind with the most bytes first."""
    sums: dict[str, Collective] = {}
    for run in _collective_runs(program):
        kind, size = _kind(run.instruction), group_size(run.instruction)
        own = program.computations[run.computation]
        payload = sum(array.bytes for name in run.instruction.operands if name in own for array in own[name].arrays)
        if kind == "all-gather":
            payload *= size
        if _is_scattered(run):
            kind = "reduce-scatter"
        old = sums.get(kind, Collective(0, 0, 0.0))
        sent = old.sent + run.times * payload * _SENT[kind](size)
        sums[kind] = Collective(old.count + run.times, old.payload + run.times * payload, sent)
    return dict(sorted(sums.items(), key=lambda item: -item[1].payload))


def _collective_runs(program: Program) -> Iterator[Run]:
    """Each collective once: on a TPU the fusions that start it, run beside it and end it all have it inside."""
    seen = set()
    for run in program.runs:
        channel = re.search(r"channel_id=(\d+)", run.instruction.rest)
        key = (channel[1] if channel else run.instruction.name, run.outer)
        if _kind(run.instruction) in _SENT and key not in seen:
            seen.add(key)
            yield run


def _kind(instruction: Instruction) -> str:
    return instruction.opcode.removesuffix("-start")


def _is_scattered(run: Run) -> bool:
    """Whether an all-reduce is a reduce-scatter, as a TPU writes it: in a fusion that keeps a slice."""
    return run.computation.startswith("all-reduce-scatter")


def group_size(collective: Instruction) -> int:
    """How many devices take part, from `replica_groups` in any of its three notations; 2 where it does not say."""
    rest = collective.rest
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'([^']+)'", named[2]))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(numbers(listed[1]))
    return 2


# ------------------------------------------------------------------------------------------------------- traffic


def traffic(program: Program) -> int:
    """Bytes read from and written to HBM, every instruction or fusion reading its operands anew."""
    moved = sum(run.times * _bytes_moved(program, run) for run in program.runs if not run.is_fused)
    for run in _collective_runs(program):
        if run.is_fused:  # fusions are not charged for collectives, which several of them mention
            own = program.computations[run.computation]
            given = sum(_in_hbm(own[name]) for name in run.instruction.operands if name in own)
            moved += run.times * (given + (0 if _is_scattered(run) else _in_hbm(run.instruction)))
    return moved


def _bytes_moved(program: Program, run: Run) -> int:
    instruction, own = run.instruction, program.computations[run.computation]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or "AllocateBuffer" in instruction.rest:
        return 0
    if opcode == "fusion":
        called = instruction.attribute("calls")
        given, root = program.parameters(called), program.root(called)
        sizes = {i: _in_hbm(own[name]) for i, name in enumerate(operands) if name in own and i in given}
        read = sum(_bytes_read(program, called, given[i], size) for i, size in sizes.items() if size)
        return read + (_bytes_written(program, called, root, instruction.arrays) if root else 0)
    if opcode in _SLICES:
        part = instruction.arrays[1 if opcode == "slice-start" else 0]
        read = part.padded if operands[0] in own and _in_hbm(own[operands[0]]) else 0
        return read + (part.padded if part.in_hbm else 0)
    if opcode == "dynamic-update-slice":
        return 2 * _in_hbm(own[operands[1]]) if operands[1] in own else 0
    made = instruction.arrays[:1] if opcode == "copy-start" else instruction.arrays
    read = sum(_in_hbm(own[name]) for name in dict.fromkeys(operands) if name in own)
    return read + sum(array.padded for array in made if array.in_hbm)


def _is_collective(instruction: Instruction) -> bool:
    return _kind(instruction) in _SENT or "AsyncCollective" in instruction.rest


def _in_hbm(instruction: Instruction) -> int:
    """Padded bytes of what an instruction gives, as far as it is in HBM."""
    return sum(array.padded for array in instruction.arrays if array.in_hbm)


def _bytes_read(program: Program, computation: str, name: str, whole: int) -> int:
    """Bytes that a fused computation reads of an operand of `whole` bytes: less, where it takes slices of it."""
    total = 0
    for user in program.inside(computation):
        if name not in user.operands or user.opcode == "tuple" or _is_collective(user):
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            total += user.arrays[0].padded
        elif user.opcode == "bitcast":
            total += _bytes_read(program, computation, user.name, whole)
        elif user.opcode == "fusion":
            called = user.attribute("calls")
            inner = program.parameters(called)
            total += sum(
                _bytes_read(program, called, inner[i], whole) for i, n in enumerate(user.operands) if n == name
            )
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return whole
    return min(total, whole)


def _bytes_written(program: Program, computation: str, root: Instruction, arrays: tuple[Array, ...]) -> int:
    """Bytes that a fused computation writes: of arrays changed in place what changes, of those passed on nothing."""
    own = program.computations[computation]
    if root.opcode == "tuple" and len(root.operands) == len(arrays):
        pairs = [(own[name], array) for name, array in zip(root.operands, arrays, strict=True)]
        return sum(_bytes_written(program, computation, producer, (array,)) for producer, array in pairs)
    while root.opcode == "bitcast" and root.operands[0] in own:
        root = own[root.operands[0]]
    inner = program.root(root.attribute("calls")) if root.opcode == "fusion" else None
    if inner is not None:
        return _bytes_written(program, root.attribute("calls"), inner, arrays)
    if root.opcode == "parameter" or _is_collective(root) or not any(array.in_hbm for array in arrays):
        return 0
    if root.opcode == "dynamic-update-slice":
        return sum(array.padded for array in own[root.operands[1]].arrays)
    return sum(array.padded for array in arrays if array.in_hbm)


# ------------------------------------------------------------------------------------------------------ products


def products(program: Program) -> float:
    """FLOPs of matrix products and convolutions, fused, plain or a library's; nothing of what Pallas kernels do."""
    return sum(
        run.times * _product_flops(run.instruction, program.computations[run.computation]) for run in program.runs
    )


def _product_flops(instruction: Instruction, own: dict[str, Instruction]) -> float:
    """Of one instruction: 0 if it is no product."""
    library = re.search(r'custom_call_target="__(cublas|cudnn\$conv(\w*))', instruction.rest)
    if instruction.opcode not in ("dot", "convolution") and not library:
        return 0.0
    (left, right), made = (own[name].arrays[0] for name in instruction.operands[:2]), instruction.arrays[0]
    if instruction.opcode == "dot" or (library and library[1] == "cublas"):
        return _dot_flops(instruction, left, made)
    # A gradient's call has the labels and the window of the convolution that it belongs to.
    match library and library[2]:
        case "BackwardInput":
            return _convolution_flops(instruction, made, right, left)
        case "BackwardFilter":
            return _convolution_flops(instruction, left, made, right)
    return _convolution_flops(instruction, left, right, made)


def _dot_flops(instruction: Instruction, left: Array, made: Array) -> float:
    axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.rest)
    contracted = math.prod(left.dims[axis] for axis in numbers(axes[1].replace('"', ""))) if axes else 1
    return 2.0 * math.prod(made.dims) * contracted


def _convolution_flops(instruction: Instruction, inputs: Array, kernel: Array, made: Array) -> float:
    """Two for every pair of an input and a weight; padding makes none. A TPU's matrix products are convolutions too."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if not labels:
        return 0.0
    of_input, of_kernel, of_output = labels.groups()
    total = 2.0 * kernel.dims[of_kernel.index("i")] * made.dims[of_output.index("b")] * made.dims[of_output.index("f")]
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    for i, axis in enumerate(sorted(label for label in of_output if label.isdigit())):
        places = (inputs, of_input), (kernel, of_kernel), (made, of_output)
        sizes = (array.dims[of_array.index(axis)] for array, of_array in places)
        given = {name: int(value.split("x")[i].partition("_")[0]) for name, value in fields.items()}
        steps = (given.get(name, 1) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        total *= _taps(*sizes, *steps, given.get("pad", 0))
    return total


@functools.cache
def _taps(inputs: int, weights: int, outputs: int, stride: int, spread: int, reach: int, pad: int) -> int:
    """Pairs of an output and a weight along one axis that meet an input."""
    end = (inputs - 1) * spread
    places = (o * stride + w * reach - pad for o in range(outputs) for w in range(weights))
    return sum(0 <= place <= end and place % spread == 0 for place in places)


# ------------------------------------------------------------------------------------------------- largest arrays


@dataclasses.dataclass(frozen=True)
class LargeArray:
    """An array in HBM: padded bytes, `f32[8,128]`, what JAX calls it, and the line of ours that it comes from."""

    bytes: int
    shape: str
    name: str
    source: str


def largest(program: Program, count: int) -> list[LargeArray]:
    """The largest arrays that a program makes, one of each shape; they need not all be there at once."""
    sizes: dict[str, int] = collections.defaultdict(int)
    producers: dict[str, list[Instruction]] = collections.defaultdict(list)
    for run in program.runs:
        opcode = run.instruction.opcode
        if run.is_fused or opcode in _FREE or opcode.endswith("-start"):
            continue
        for i, array in enumerate(run.instruction.arrays):
            if array.in_hbm:
                sizes[str(array)] = max(sizes[str(array)], array.padded)
            producers[str(array)].append(_producer_of(program, run, i))
    rows = []
    for shape in sorted(sizes, key=lambda shape: -sizes[shape])[:count]:
        named = {(shorten(producer.op_name), program.source(producer)) for producer in producers[shape]}
        # What computes it says more than what keeps it, and a line of ours more than none.
        name, source = max(sorted(named), key=lambda it: (bool(it[1]), not it[0].endswith(_KEEPING), bool(it[0])))
        rows.append(LargeArray(sizes[shape], shape, name, source))
    return rows


def _producer_of(program: Program, run: Run, index: int) -> Instruction:
    """What computed an output: seen through in-place updates, fusions and changes of form."""
    own, found = program.computations[run.computation], run.instruction
    if found.opcode == "fusion":
        called = found.attribute("calls")
        inside, root = program.computations.get(called, {}), program.root(called)
        if root is None:
            return found
        inner = inside.get(root.operands[index], root) if root.opcode == "tuple" else root
        inner = _operand_below(inside, inner)
        if inner.opcode != "parameter":
            return inner if inner.op_name else found
        outside = found.operands[int(inner.rest)] if int(inner.rest) < len(found.operands) else ""
        return _operand_below(own, own.get(outside, found))
    return _operand_below(own, found)


def _operand_below(own: dict[str, Instruction], instruction: Instruction) -> Instruction:
    """The instruction whose result this one only keeps or gives another form."""
    while True:
        at = 1 if instruction.opcode == "dynamic-update-slice" else 0
        seen_through = instruction.opcode in _FORMS or at
        if not seen_through or len(instruction.operands) <= at or instruction.operands[at] not in own:
            return instruction
        instruction = own[instruction.operands[at]]


def shorten(op_name: str) -> str:
    """`jit(step)/transpose(jvp())/while/body/checkpoint/dot_general` → `backward, layer: dot_general`."""
    last = op_name.rpartition("/")[2].rstrip(")")
    way = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""
    where = ", ".join(part for part in (way, "layer" if "/while/body" in op_name else "") if part)
    return f"{where}: {last}" if where and last else last
