"""Imports point one way, what is slow to import stays out of the fast paths, and only the right rooms do what they do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import loratool

ROOT = Path(loratool.__file__).parent
LEVELS = {
    "errors": 0, "text": 0, "names": 1, "strict": 1, "header": 1, "schema": 1,
    "locks": 1, "output": 2, "formats": 2, "archs": 3, "clones": 3, "layout": 3,
    "hub": 4, "targets": 4, "detect": 4, "routes": 4, "linalg": 4, "krylov": 4, "rounding": 4, "pickles": 4,
    "devices": 4, "workers": 4, "residuals": 4, "checkpoint": 4, "ranks": 5, "deltas": 5,
    "adapter": 6, "ops": 7, "pages": 8, "cli": 9, "__main__": 10,
}  # fmt: skip
TORCHLESS = frozenset(
    [
        "errors",
        "names",
        "strict",
        "header",
        "schema",
        "formats",
        "archs",
        "layout",
        "targets",
        "detect",
        "routes",
        "output",
        "locks",
        "clones",
        "hub",
        "text",
        "cli",
    ]
)
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    for name in imports(path, top_level=False):
        parts = name.split(".")
        if parts[0] == "loratool" and len(parts) > 1:
            assert LEVELS[parts[1]] <= LEVELS[room(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_click_and_rich_live_in_the_command_line_alone(path: Path) -> None:
    if room(path) not in ("cli", "__main__"):
        assert not {name.split(".")[0] for name in imports(path, top_level=False)} & {"click", "rich"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) in TORCHLESS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_what_inspect_needs_imports_no_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path, top_level=True)} & {"torch", "numpy"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_but_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
