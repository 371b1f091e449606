"""What benchmarks share: rows measured one by one and written as they go; what a profile says."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

from hmar_jax.errors import InputError, printable
from hmar_jax.files import check_files, check_kind, check_pictures, json_files, note_replaced, write_whole, writing

GIB = 2.0**30


class Kernel(NamedTuple):
    """One of a profile: the program's operation, which may be a CUDA graph, the kernel's own name, seconds."""

    operation: str
    name: str
    seconds: float


def prepare_reports(folder: Path, what: str, head: str, endings: Sequence[str] = (".json", ".md")) -> list[Path]:
    """Makes the folder of a benchmark's files, before all the measuring, and names those that will be replaced.

    Args:
      folder, what: the files are FOLDER/WHAT.json and so on. head: what the page begins with.

    Returns:
      The files, in the order of the endings.

    Raises:
      InputError: one is there already and no benchmark wrote it, or the folder may not be written.
    """
    files = {ending: folder / f"{what}{ending}" for ending in endings}
    check_files("--output", files.values())
    check_kind("--output", files[".json"], _is_report, "a report of a benchmark")
    check_kind("--output", files[".md"], lambda page: page.startswith(head.encode()), "a report of this benchmark")
    check_pictures("--output", [file for ending, file in files.items() if ending == ".png"])
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    note_replaced(files.values())
    return list(files.values())


def _is_report(content: bytes) -> bool:
    return {"device", "versions"} <= json_files.parse(content, "It", "write it again").keys()


def check_memory(entries: int, what: str) -> None:
    """InputError where arrays of so many float32 entries are more than this machine's memory.

    A GPU or TPU says so itself; on a CPU the system would rather end the process, or another one.
    """
    needed, here = 4 * entries, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > here:
        raise InputError(f"{what} takes {needed / GIB:.4g} GiB, and this machine has {here / GIB:.4g}; choose less.")


def device_name() -> str:
    """What one of the devices here is."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)" if on_cpu else jax.devices()[0].device_kind


def measure_all[Row](
    what: str,
    folder: Path,
    measures: Mapping[str, Callable[[], Row]],
    *,
    facts: Mapping[str, Any],
    as_lines: Callable[[Row], str],
    as_json: Callable[[Row], dict[str, Any]],
    as_page: Callable[[list[Row]], str],
) -> None:
    """Prints each row as it is measured and writes all so far, so that what was measured outlives a crash.

    Args:
      what: `train` or `sample`. folder: where to write `what`.json and .md; it exists.
      measures: setting → measures its row. facts: what else the JSON is to hold.

    Raises:
      InputError: the device cannot run a setting.
    """
    import jax

    found: list[Row] = []
    with tqdm.tqdm(measures.items(), desc=f"bench {what}", disable=None, leave=False) as bar:
        for name, measure in bar:
            bar.set_postfix_str(printable(name, 80))
            try:
                found.append(measure())
            except jax.errors.JaxRuntimeError as error:
                said = printable(str(error).partition("\n")[0], 100)
                raise InputError(
                    f"This device cannot run {printable(name, 100)} ({said}); choose a smaller --batch."
                ) from None
            gc.collect()  # this row's weights, before the next one's are made
            bar.write(as_lines(found[-1]))
            report = {"device": device_name(), "versions": versions(), **facts, "rows": [as_json(row) for row in found]}
            write_whole(folder / f"{what}.json", (json.dumps(report, indent=1) + "\n").encode())
            write_whole(folder / f"{what}.md", as_page(found).encode())


def versions() -> dict[str, str]:
    """Of what is measured, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "jax-triton", "torch", "triton", "libtpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def program_bytes(compiled: Any) -> int:
    """Memory of a compiled program, arguments and all."""
    used = compiled.memory_analysis()
    return used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes


def profile(run: Callable[[], Any]) -> list[Kernel]:
    """What the first device did in a run, in the order in which it began; nothing where the profiler has no device."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    planes = [plane for plane in data.planes if "/device:" in plane.name]
    lines = [line for line in (planes[0].lines if planes else ()) if line.name.startswith(("Stream", "XLA Ops"))]
    events = sorted((event for line in lines for event in line.events), key=lambda event: event.start_ns)
    return [Kernel(str(dict(e.stats).get("hlo_op", e.name)), e.name, e.duration_ns * 1e-9) for e in events]


def origins(program: str) -> dict[str, str]:
    """Operation, as `plain` names it, → where it was traced, of a program's optimized HLO."""
    found = re.findall(r"^\s*(?:ROOT )?%([\w.\-]+) = .*?op_name=\"([^\"]*)\"", program, re.MULTILINE)
    return {plain(name): where for name, where in found}


def plain(operation: str) -> str:
    """An operation's name as XLA names its kernel; a profile may give the whole line of HLO."""
    return re.sub(r"\W", "_", operation.partition(" = ")[0].lstrip("%"))
