"""compiled programs → what they need, how fast they could be, and what to change where they do not fit.

A bound is the longest of three times, each as if the other two were free: products at the chip's bfloat16 rate, bytes
to and from its memory, bytes sent to other chips. What really happens takes longer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hmar_jax.compile_check import costs
from hmar_jax.compile_check.hlo import Program
from hmar_jax.compile_check.programs import Compiled, Setup, schedule_of
from hmar_jax.compile_check.topology import Topology
from hmar_jax.flops import model_flops, sample_kernel_flops, train_kernel_flops
from pallas_kernels import devices

GIB = 2.0**30
_LISTED = 8
# Activations that each remat policy keeps for a token and block, in widths: with "dots" the input, what was attended to
# and the products (qkv 3, proj 1, fc1 4, fc2 1), with "all" the input.
_KEPT = {"dots": 11, "all": 1}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device while a program runs; parts are None where the compiler refused.

    Attributes:
      total: arguments, outputs that are not aliased to them, temporaries, code and idle.
      idle: what training keeps there and the program does not use: to a sampler, the optimizer's state.
    """

    total: float
    arguments: float | None = None
    outputs: float | None = None
    aliased: float | None = None
    temporaries: float | None = None
    code: float | None = None
    idle: float | None = None

    @classmethod
    def of(cls, compiled: Compiled, resident: float) -> Memory:
        """A program's, where training keeps `resident` bytes on each device."""
        if compiled.executable is None:
            return cls(compiled.needed)
        stats = compiled.executable.memory_analysis()
        names = ("argument", "output", "alias", "temp", "generated_code")
        arguments, outputs, aliased, temporaries, code = (
            float(getattr(stats, f"{name}_size_in_bytes")) for name in names
        )
        idle = max(resident - arguments, 0.0)
        total = arguments + outputs - aliased + temporaries + code + idle
        return cls(total, arguments, outputs, aliased, temporaries, code, idle)


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that one run takes at least for each reason."""

    products: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.products, self.memory, self.network)

    @property
    def reason(self) -> str:
        return max(vars(self), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One program on one device, but for `model_flops`, which are of all devices.

    Attributes:
      name: `train step` or `sampler`. images: that one run of it is about. seconds: that compiling took.
      attention: how it runs. triton: which Triton kernels are in it, or why there are none; empty for devices that
        Triton does not serve. flops: of products, Pallas kernels' too. traffic: bytes to and from memory.
      model_flops: by part, see `flops.model_flops`; empty where no formula is.
    """

    name: str
    images: int
    seconds: float
    fits: bool
    memory: Memory
    attention: str = ""
    triton: str = ""
    flops: float = 0.0
    traffic: float = 0.0
    model_flops: dict[str, float] = dataclasses.field(default_factory=dict)
    mfu: float | None = None
    bound: Bound | None = None
    collectives: dict[str, costs.Collective] = dataclasses.field(default_factory=dict)
    largest: tuple[costs.LargeArray, ...] = ()
    unknown_loops: int = 0


def report(setup: Setup, topology: Topology, compiled: Compiled, sampled: int = 0) -> ProgramReport:
    """What a compiled program tells: of the train step, or of a sampler of `sampled` pictures."""
    name, images = ("sampler", sampled) if sampled else ("train step", setup.config.batch_size)
    chip, memory = topology.chip, Memory.of(compiled, _local_bytes((setup.state, setup.frozen)))
    fits = compiled.executable is not None and memory.total <= chip.usable
    base = ProgramReport(name, images, compiled.seconds, fits, memory)
    if compiled.executable is None:
        return base
    text = compiled.executable.as_text()
    program = Program(text)
    with jax.set_mesh(setup.mesh):
        triton = _triton(text)
        if sampled:
            plan, dtype = schedule_of(setup).plan, setup.config.dtype
            attention, in_kernels = sample_kernel_flops(setup.model, plan, dtype, sampled)
        else:
            attention, in_kernels = train_kernel_flops(setup.config, setup.model)
    flops, traffic = costs.products(program) + in_kernels / setup.mesh.size, costs.traffic(program)
    collectives = costs.collectives(program)
    sent = sum(kind.sent for kind in collectives.values())
    bound = Bound(flops / chip.flops, traffic / chip.bandwidth, sent / chip.network)
    useful_flops = {} if sampled else model_flops(setup.config, setup.model)
    useful = sum(useful_flops.values()) or flops * setup.mesh.size
    return dataclasses.replace(
        base,
        attention=attention,
        triton=triton,
        flops=flops,
        traffic=traffic,
        model_flops=useful_flops,
        mfu=None if sampled else useful / (setup.mesh.size * chip.flops * bound.seconds),
        bound=bound,
        collectives=collectives,
        largest=tuple(costs.largest(program, _LISTED)),
        unknown_loops=len(program.unknown_loops),
    )


def _triton(text: str) -> str:
    """The Triton kernels of a program (its text) for the mesh in use, or why it has none."""
    if not devices.is_served_by_triton():
        return ""
    if devices.has_triton():
        calls = text.count('custom_call_target="triton_kernel_call"')
        return f"{calls} calls" if calls else "none"
    return (
        "none, for jax_triton is not installed here; where it is, another program runs, which can be checked after "
        "`pip install -c constraints.txt -e '.[triton]'`"
    )


def state_arrays(setup: Setup) -> list[tuple[float, str]]:
    """Bytes on one device of what is there between steps, summed by kind, the largest first."""
    state = setup.state
    kinds = {
        "trained parameters": state.params,
        "their average": state.ema,
        "optimizer state": state.opt,
        "frozen parameters": setup.frozen,
    }
    sizes = [(_local_bytes(tree), name) for name, tree in kinds.items()]
    return sorted((size for size in sizes if size[0]), reverse=True)


def largest_parameters(setup: Setup, count: int = 5) -> list[tuple[float, str]]:
    """Bytes on one device of the largest parameters, with their paths."""
    leaves = jax.tree.leaves_with_path({**setup.state.params, "frozen": setup.frozen})
    named = [(_local_bytes(leaf), ".".join(str(getattr(k, "key", k)) for k in path)) for path, leaf in leaves]
    return sorted(named, reverse=True)[:count]


def _local_bytes(tree: Any) -> float:
    """Bytes of a tree of placed shapes on one device."""
    return float(
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    )


# ------------------------------------------------------------------------------------------------- what to change


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change, on top of those before it, and the estimated bytes of one device after it."""

    change: str
    estimate: float
    enough: bool


class _Load(NamedTuple):
    """Bytes of one device: state that `fsdp` splits, state that it does not, and all else."""

    split: float
    whole: float
    activations: float


def remedies(setup: Setup, topology: Topology, needed: float) -> list[Remedy]:
    """What saves memory, in the order to try it and each as little as it takes, up to what is estimated to be enough.

    An estimate, not a compilation: of `needed` bytes, those of the trained state shrink with `fsdp`, what layers keep
    for the backward pass with the remat policy, and activations with the examples that a device works off at once.
    """
    state = _local_bytes((setup.state, setup.frozen))
    whole = _local_bytes(setup.frozen)
    load, found = _Load(state - whole, whole, max(needed - state, 0.0)), list[Remedy]()
    for kind in (_remats, _wider_fsdp, _smaller_parts, _more_chips):
        for change, after in kind(setup, load):
            if sum(after) <= topology.chip.usable:
                return [*found, Remedy(change, sum(after), True)]
        if kind(setup, load) and sum(after) < 0.99 * sum(load):
            load = after
            found.append(Remedy(change, sum(after), False))
    return found


def _remats(setup: Setup, load: _Load) -> list[tuple[str, _Load]]:
    if setup.model.transformer is None or setup.config.remat == "all":
        return []
    saved = kept_bytes(setup, setup.config.remat) - kept_bytes(setup, "all")
    after = load._replace(activations=load.activations - min(saved, 0.9 * load.activations))
    return [("--config.remat=all, which recomputes layers in the backward pass", after)]


def _wider_fsdp(setup: Setup, load: _Load) -> list[tuple[str, _Load]]:
    now = setup.mesh.shape["fsdp"]
    return [
        (
            f"--config.mesh.fsdp={wider}, which splits parameters and optimizer",
            load._replace(split=load.split * now / wider),
        )
        for wider in _doublings(now, setup.ways)
        if setup.ways % wider == 0
    ]


def _smaller_parts(setup: Setup, load: _Load) -> list[tuple[str, _Load]]:
    examples = setup.config.batch_size // setup.config.accumulate // setup.ways
    gradients = _local_bytes(setup.state.params)
    return [
        (
            f"--config.accumulate={parts * setup.config.accumulate}, which works a batch off in parts",
            load._replace(activations=load.activations / parts + gradients),
        )
        for parts in _doublings(1, examples)
        if examples % parts == 0
    ]


def _more_chips(setup: Setup, load: _Load) -> list[tuple[str, _Load]]:
    return [
        (
            f"{times * setup.mesh.size} such chips, split by fsdp",
            load._replace(split=load.split / times, activations=load.activations / times),
        )
        for times in _doublings(1, 64)
    ]


def kept_bytes(setup: Setup, remat: str) -> float:
    """Bytes of activations that one device's trained layers keep for the backward pass under a remat policy."""
    transformer, config = setup.model.transformer, setup.config
    if transformer is None:
        return 0.0
    blocks = transformer.branch_depth if config.stage == "masked" else transformer.depth
    tokens = config.batch_size / config.accumulate / setup.ways * setup.model.ladder.length
    return jnp.dtype(config.dtype).itemsize * float(_KEPT[remat]) * transformer.width * tokens * blocks


def _doublings(start: int, limit: int) -> list[int]:
    """2·start, 4·start … up to `limit`."""
    return [start * 2**i for i in range(1, 20) if start * 2**i <= limit]


# ------------------------------------------------------------------------------------------------------ as text


def as_json(setup: Setup, topology: Topology, programs: Sequence[ProgramReport], advice: Sequence[Remedy]) -> Any:
    """All of it as JSON types: bytes, seconds, FLOPs."""
    return {
        "topology": topology.name,
        "chip": vars(topology.chip),
        "mesh": dict(setup.mesh.shape),
        "stage": setup.config.stage,
        "sides": list(setup.model.ladder.sides),
        "batch_size": setup.config.batch_size,
        "remat": setup.config.remat,
        "versions": {"jax": jax.__version__},
        "state": {name: size for size, name in state_arrays(setup)},
        "programs": [dataclasses.asdict(program) for program in programs],
        "remedies": [dataclasses.asdict(remedy) for remedy in advice],
    }


def text(setup: Setup, topology: Topology, programs: Sequence[ProgramReport], advice: Sequence[Remedy]) -> str:
    """The report for a terminal."""
    config, chip, shape = setup.config, topology.chip, setup.mesh.shape
    mesh = " × ".join(f"{name} {size}" for name, size in shape.items() if size > 1) or "one device"
    each = config.batch_size / setup.ways
    rates = f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s, network {chip.network / 1e9:.0f} GB/s"
    lines = [
        f"{topology.name}: {setup.mesh.size} × {chip.name}, {mesh}; {chip.usable / GIB:.2f} of {chip.hbm / GIB:.0f} "
        f"GiB usable, {rates}",
        f"stage {config.stage}, {setup.model.image_size} pixels, L={setup.model.ladder.length}, batch "
        f"{config.batch_size} ({each:g} a device), {config.dtype}, remat {config.remat}, accumulate "
        f"{config.accumulate}",
        "",
        "State, a device: " + ", ".join(f"{name} {_size(size)}" for size, name in state_arrays(setup)),
        "  largest: " + ", ".join(f"{name} {_size(size)}" for size, name in largest_parameters(setup)),
    ]
    for program in programs:
        lines += ["", *_program_lines(program, setup.mesh.size, chip)]
    if topology.slices > 1:
        lines += ["", "The bound takes the network between slices to be as fast as that within one, which it is not."]
    if advice:
        lines += ["", f"It does not fit in {chip.usable / GIB:.2f} GiB. What to change, estimated, not compiled:"]
        for remedy in advice:
            verdict = "fits" if remedy.enough else "not enough alone"
            lines.append(f"  {remedy.change}: about {_size(remedy.estimate)}, {verdict}")
    return "\n".join(lines)


def _program_lines(program: ProgramReport, devices: int, chip: Any) -> list[str]:
    memory = program.memory
    verdict = "fits" if program.fits else "DOES NOT FIT"
    lines = [
        f"{program.name}, {program.images} images: {_size(memory.total)} a device of {_size(chip.usable)}, {verdict}"
        f" (compiled in {program.seconds:.0f} s)"
    ]
    if program.name == "sampler" and not program.fits:
        lines.append("  draw fewer pictures at once, by fewer sample_labels, or none while training: sample_every=0")
    if memory.arguments is None:
        return [*lines, "  the compiler refused it; see the state above for what is known"]
    assert program.bound is not None and memory.outputs is not None and memory.aliased is not None
    assert memory.temporaries is not None and memory.code is not None and memory.idle is not None
    lines.append(
        f"  memory: arguments {_size(memory.arguments)}, outputs {_size(memory.outputs - memory.aliased)} more, "
        f"temporaries {_size(memory.temporaries)}, code {_size(memory.code)}, idle "
        f"state {_size(memory.idle)}"
    )
    for array in program.largest:
        origin = ", ".join(part for part in (array.name, array.source) if part)
        lines.append(f"    {_size(array.bytes):>10}  {array.shape:28} {origin}")
    sums = [f"{kind} ×{c.count} {_size(c.payload)}" for kind, c in program.collectives.items()]
    lines.append(f"  collectives: {', '.join(sums) or 'none'}")
    if program.attention:
        lines.append(f"  attention runs as {program.attention}")
    if program.triton:
        lines.append(f"  Triton kernels: {program.triton}")
    if program.model_flops:
        parts = ", ".join(f"{name} {flops / 1e12:.4g}" for name, flops in program.model_flops.items())
        lines.append(f"  model TFLOPs: {sum(program.model_flops.values()) / 1e12:.4g} ({parts})")
    bound = program.bound
    lines.append(
        f"  bound: {1e3 * bound.seconds:.4g} ms by {bound.reason} (products {1e3 * bound.products:.4g}, memory "
        f"{1e3 * bound.memory:.4g}, network {1e3 * bound.network:.4g} ms)"
        + (f", so MFU at most {program.mfu:.0%}" if program.mfu is not None else "")
        + f"; {program.images / bound.seconds:.4g} images/s on {devices} device{'s' if devices > 1 else ''}"
    )
    if program.unknown_loops:
        lines.append(f"  {program.unknown_loops} loops of unknown length count once")
    return lines


def markdown(setup: Setup, topology: Topology, programs: Sequence[ProgramReport], config: str) -> str:
    """A table of one row a program."""
    titles = ["config", "topology", "mesh", "program", "GiB a chip", "of", "collectives GiB", "bound ms", "by"]
    titles += ["MFU at most", "compile s"]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    mesh = " × ".join(f"{name} {size}" for name, size in setup.mesh.shape.items() if size > 1) or "1"
    for program in programs:
        moved = sum(kind.payload for kind in program.collectives.values()) / GIB
        bound = [f"{1e3 * program.bound.seconds:.4g}", program.bound.reason] if program.bound else ["", ""]
        mfu = "" if program.mfu is None else f"{program.mfu:.0%}"
        cells = [
            config, topology.name, mesh, program.name, f"{program.memory.total / GIB:.2f}",
            f"{topology.chip.usable / GIB:.2f}", f"{moved:.2f}" if program.bound else "", *bound, mfu,
            f"{program.seconds:.0f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _size(count: float) -> str:
    """`1.50 GiB`, `12.3 MiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= 1000 / 1024 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
