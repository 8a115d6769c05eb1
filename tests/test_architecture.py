"""Imports go one way: no cycle between files, and each subpackage imports only those below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "smezo_pl"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# What each part may import beside itself. `import smezo_pl` alone (its version) is open to all.
ALLOWED = {
    "optim": set(),
    "tasks": set(),
    "models": set(),
    "saving": set(),
    "strategies": {"models"},
    "data": {"tasks", "models"},
    "scoring": {"optim", "tasks", "data"},
    "trajectory": {"optim"},
    "methods": {"optim", "data", "models", "scoring"},
    "module": {"optim", "tasks", "data", "scoring", "models", "methods", "strategies", "saving", "trajectory"},
    "callbacks": {"optim", "models", "data", "scoring", "trajectory"},
    "run_folder": {"callbacks", "trajectory"},
    "interrupts": set(),
    "parser": {"optim"},
    "cli": {"optim", "data", "methods", "module", "callbacks", "run_folder", "interrupts", "parser", "strategies"},
    "commands": {
        *[
            "optim",
            "data",
            "models",
            "saving",
            "methods",
            "module",
            "trajectory",
            "callbacks",
            "cli",
            "parser",
            "scoring",
            "tasks",
        ]
    },
    "__main__": {"commands"},
}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it: lazy imports and those for types count too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names if node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {
    name: {other for other in imported(path) if other in MODULES and other not in (name, "smezo_pl")}
    for name, path in MODULES.items()
    if name != "smezo_pl"  # it only names where the public names are
}


def test_no_two_files_import_each_other() -> None:
    """Also not by way of others: what always both imports and is imported by something that is left is in a cycle."""
    left = dict(GRAPH)
    while True:
        needed = {other for name in left for other in left[name]}
        free = [name for name in left if not left[name] & left.keys() or name not in needed]
        if not free:
            break
        for name in free:
            del left[name]
    assert not left, f"among these files is an import cycle: {sorted(left)}"


@pytest.mark.parametrize("part", sorted({name.split(".")[1] for name in GRAPH}))
def test_each_part_imports_only_those_below_it(part: str) -> None:
    found = {
        other.split(".")[1]
        for name, others in GRAPH.items()
        if name.split(".")[1] == part
        for other in others
        if other.split(".")[1] != part
    }
    assert found <= ALLOWED[part], f"{part} imports {sorted(found - ALLOWED[part])}"
