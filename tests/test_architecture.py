"""Imports point downwards, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "iexact_runner"
MODULES = {
    ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def layers() -> list[str]:
    """The layers of the table, from the top."""
    section = (REPOSITORY / "docs" / "architecture.md").read_text().partition("## Layers")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)


def imports(path: Path) -> set[str]:
    """Modules of this package that a module imports anywhere, also late ones."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "iexact_runner":
            base = (node.module or "").removeprefix("iexact_runner").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in MODULES else base)
    return found - {""}


def test_every_module_has_a_layer_and_every_layer_is_there():
    assert {name.partition(".")[0] for name in MODULES} - {""} == set(layers())


def test_imports_point_down():
    order = layers()
    upwards = [
        f"{name} -> {other}"
        for name, path in MODULES.items()
        for other in imports(path)
        if name and order.index(other.partition(".")[0]) < order.index(name.partition(".")[0])
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imports(path) for name, path in MODULES.items()}
    settled: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in settled:
            for other in graph[name]:
                visit(other, (*way, name))
            settled.add(name)

    for name in graph:
        visit(name, ())


def test_no_module_passes_400_lines():
    assert {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 400} == {}
