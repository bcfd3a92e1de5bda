"""Imports point one way, what is slow to import stays out of the fast paths, and only the right rooms do what they do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import loratool

ROOT = Path(loratool.__file__).parent
LEVELS = {
    "errors": 0, "text": 0, "names": 1, "schema": 1, "formats": 2, "archs": 3, "files": 3, "keys": 3,
    "numbers": 4, "deltas": 5, "base": 6, "adapter": 6, "verbs": 7, "cli": 8, "__main__": 9,
}  # fmt: skip
"""The rooms, from the ground up: each imports from those of its own level and below."""
NOT_YET = {
    ("files/hashes.py", "keys"), ("files/hub.py", "keys"), ("keys/resolve.py", "adapter"), ("keys/resolve.py", "deltas"),
    ("numbers/factor.py", "files"),
}  # fmt: skip
"""Imports that point up until the definitions that they are for have their own rooms."""
WITH_TORCH = ("numbers", "deltas", "base", "adapter", "verbs")
TORCHLESS = (
    *("verbs/inspect/inspect.py", "verbs/inspect/describe.py", "verbs/inspect/block_map.py"),
    *("verbs/meta/meta.py", "verbs/meta/private.py"),
)
"""Of the rooms that import torch, what does not."""
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
            allowed = (str(path.relative_to(ROOT)), parts[1]) in NOT_YET
            assert allowed or LEVELS[parts[1]] <= LEVELS[room(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_click_and_rich_live_in_the_command_line_alone(path: Path) -> None:
    if room(path) not in ("cli", "__main__"):
        assert not {name.split(".")[0] for name in imports(path, top_level=False)} & {"click", "rich"}


def is_torchless(path: Path) -> bool:
    return room(path) not in WITH_TORCH or str(path.relative_to(ROOT)) in TORCHLESS or path.name == "__init__.py"


@pytest.mark.parametrize("path", list(filter(is_torchless, FILES)), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_only_looks_imports_no_torch(path: Path) -> None:
    if str(path.relative_to(ROOT)) in ("files/tensors.py", "keys/resolve.py", "deltas/__init__.py"):
        pytest.skip("deals in tensors")
    assert not {name.split(".")[0] for name in imports(path, top_level=True)} & {"torch", "numpy"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_but_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
