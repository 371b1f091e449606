"""The import rule: rooms import from earlier rooms alone, without circles. Files and functions are short."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hmar_jax", "pallas_kernels")
ROOMS = """
arrays config errors failures files images labels params progress_bar resize scales timing xla
networks tokenizer transformer
data formats parallel sampling
flops model
bulk
plots
evaluation
app sweep training
bench compile_check
commands
"""
LINE = {room: line for line, rooms in enumerate(ROOMS.strip().splitlines()) for room in rooms.split()}


@functools.cache
def trees():
    """Dotted name → what Python parses of it, of every module but the configs."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if "configs" not in file.parts]
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files)
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in zip(names, files, strict=True)}


@functools.cache
def imports():
    """Module → those of ours that it imports anywhere, in functions and under TYPE_CHECKING too.

    Without `hmar_jax/__init__.py`, which gives names of its rooms when they are first used, and `__main__.py`.
    """
    found = {}
    for name in trees().keys() - {"hmar_jax", "hmar_jax.__main__"}:
        nodes = list(ast.walk(trees()[name]))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                whole = (f"{node.module}.{alias.name}" for alias in node.names)
                named |= {one if one in trees() else node.module for one in whole}
        found[name] = named & trees().keys()
    return found


def room(name):
    return name.split(".")[1]


def pairs():
    """Every import of one module of `hmar_jax` by another."""
    return [
        (importer, other)
        for importer, others in imports().items()
        for other in others
        if importer.startswith("hmar_jax.") and other.startswith("hmar_jax.")
    ]


def circles(graph):
    """The nodes that reach themselves."""
    reach = {node: others & graph.keys() for node, others in graph.items()}
    for middle in graph:
        for node in graph:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    return sorted(node for node in graph if node in reach[node])


def test_rooms_import_from_earlier_rooms_alone():
    assert len(pairs()) > 300
    assert [(a, b) for a, b in pairs() if LINE[room(b)] > LINE[room(a)]] == []


def test_the_package_itself_is_imported_by_commands_alone():
    assert {room(name) for name, others in imports().items() if "hmar_jax" in others} == {"commands"}


def test_kernels_import_nothing_of_the_package():
    kernels = {other for name, others in imports().items() if name.startswith("pallas_kernels") for other in others}
    assert {name.partition(".")[0] for name in kernels} == {"pallas_kernels"}


def test_there_are_no_circles():
    rooms = {name: {room(b) for a, b in pairs() if room(a) == name} - {name} for name in LINE}
    assert circles(rooms) == []
    assert circles({name: others for name, others in imports().items() if name.startswith("hmar_jax")}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == ["b", "c", "d"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_is_a_package(package):
    """One without __init__.py can be imported from a checkout, and is missing from a wheel."""
    folders = {file.parent for file in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_files_have_400_lines_and_functions_60_at_most():
    ours = {name: tree for name, tree in trees().items() if name.startswith("hmar_jax") and tree.body}
    functions = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in ours.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(functions) > 500
    assert {name: tree.body[-1].end_lineno for name, tree in ours.items() if tree.body[-1].end_lineno > 400} == {}
    assert {name: lines for name, lines in functions.items() if lines > 60} == {}
