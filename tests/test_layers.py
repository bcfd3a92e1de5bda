"""Imports point one way, what is slow to import stays out of the fast paths, and only the right rooms do what they do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loratool

ROOT = Path(loratool.__file__).parent
LEVELS = (
    {"errors", "flags", "_version"}, {"text"}, {"names"}, {"archs", "formats", "files", "numbers"}, {"deltas"}, {"keys"},
    {"base"}, {"adapter"}, {"verbs"}, {"cli"}, {"__main__"},
)  # fmt: skip
"""The rooms, from the ground up: each imports from those below it, and never from another of its own level."""
WITH_TORCH = ("numbers", "deltas", "base", "adapter", "verbs")
OTHERS_WITH_TORCH = ("files/tensors.py", "files/adapter_writer.py")
WITHOUT_TORCH = (
    "deltas/schema.py",
    "verbs/reports.py",
    "verbs/hash.py",
    "verbs/meta/",
    "verbs/inspect/inspect.py",
    "verbs/inspect/describe.py",
)
"""Of the rooms that import torch, what does not."""
ARROWS = {
    "swap": {"merge", "unmerge"},
    "unmerge": {"merge"},
    "compare": {"merge"},
    "check": {"merge"},
    "meta": {"hash"},
    "report": {"compare", "delta", "hash", "inspect", "resize"},
}
"""The verbs that build on others; no other verb knows of another."""
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def level(name: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if name in rooms)


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "loratool" else {f"loratool.{alias.name}" for alias in node.names}
    return found


@every_file
def test_imports_point_down(path: Path) -> None:
    for other in {name.split(".")[1] for name in imports(path) if name.startswith("loratool.")}:
        allowed = other == room(path)
        assert allowed or level(other) < level(room(path)), f"{name_of(path)} imports {other}"


@every_file
def test_verbs_build_on_few_others(path: Path) -> None:
    own, *rest = path.relative_to(ROOT).with_suffix("").parts
    if own == "verbs":
        others = {name.split(".")[2] for name in imports(path) if name.startswith("loratool.verbs.")}
        assert others - {rest[0], "reports"} <= ARROWS.get(rest[0], set())


@every_file
def test_click_and_rich_live_in_the_command_line_alone(path: Path) -> None:
    if room(path) not in ("cli", "__main__"):
        assert not {name.split(".")[0] for name in imports(path)} & {"click", "rich"}


def is_torchless(path: Path) -> bool:
    name = name_of(path)
    if name.startswith(WITHOUT_TORCH) or path.name == "__init__.py":
        return True
    return room(path) not in WITH_TORCH and name not in OTHERS_WITH_TORCH


def test_what_only_looks_imports_no_torch() -> None:
    """One after the other in one process, with all that they import."""
    names = [
        name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in FILES if is_torchless(path)
    ]
    script = f"""
import importlib, sys
for name in {[name for name in names if name != "__main__"]!r}:
    importlib.import_module(f"loratool.{{name}}")
    if "torch" in sys.modules or "numpy" in sys.modules:
        sys.exit(f"{{name}} imports torch or numpy")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@every_file
def test_nothing_but_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@every_file
def test_packages_hold_a_docstring_and_nothing_else(path: Path) -> None:
    """Or importing a module without torch would import its neighbours' torch."""
    if path.name == "__init__.py" and room(path) not in ("archs", "cli"):
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr)
