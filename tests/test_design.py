"""What the code promises about itself: names with one meaning, kinds that answer for themselves, one public face."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratool
from loratool.deltas.registry import CLASSES, class_of

ROOT = Path(loratool.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in FILES}
WHERE_KINDS_ARE_NAMED = ("deltas/", "formats/", "keys/")


def definitions(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name


def test_no_class_name_has_two_meanings() -> None:
    found = Counter(name for tree in TREES.values() for name in definitions(tree))
    assert [name for name, count in found.items() if count > 1 and not name.startswith("_")] == []


def asks_for_a_kind(node: ast.AST) -> bool:
    """Whether a node tests a delta's class, or compares its kind's name."""
    classes = {class_of(kind).__name__ for kind in CLASSES}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        return bool({name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)} & classes)
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in sides)
    return False


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith(WHERE_KINDS_ARE_NAMED)])
def test_kinds_answer_for_themselves(name: str) -> None:
    assert [node.lineno for node in ast.walk(TREES[name]) if asks_for_a_kind(node)] == []


@pytest.mark.parametrize("kind", CLASSES)
def test_every_kind_has_a_class_of_its_name(kind: str) -> None:
    assert class_of(kind).kind == {"lora bias": "full"}.get(kind, kind)


def test_the_public_face_is_whole_and_is_imported_when_it_is_used() -> None:
    script = (
        "import loratool, sys; assert 'torch' not in sys.modules; [getattr(loratool, name) for name in loratool.__all__]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    documented = (ROOT.parent / "docs" / "api.md").read_text()
    assert [name for name in loratool.__all__ if f"heading: loratool.{name}\n" not in documented] == []
