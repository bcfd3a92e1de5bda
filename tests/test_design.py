"""What the code promises about itself: names with one meaning, kinds that answer for themselves, one public face."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import is_dataclass
from inspect import isfunction
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from click import Context

import loratool
from loratool.cli import cli
from loratool.deltas.registry import CLASSES, class_of

ROOT = Path(loratool.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in FILES}
WHERE_KINDS_ARE_NAMED = ("deltas/", "formats/", "keys/")


IRREGULAR = {
    "made", "found", "told", "said", "held", "kept", "sent", "done", "given", "known", "met", "taken", "gone", "built",
    "brought", "shown", "drawn",
}  # fmt: skip
"""Participles that do not end in -ed."""


def definitions(tree: ast.Module) -> Iterator[str]:
    """The classes and the constants of a module."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_no_class_and_no_public_constant_has_two_meanings() -> None:
    found = Counter(name for tree in TREES.values() for name in definitions(tree))
    classes = {node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    twice = [name for name, count in found.items() if count > 1 and not name.startswith("__")]
    assert [name for name in twice if not name.startswith("_") or name in classes] == []


def is_participle(name: str) -> bool:
    bare = name.strip("_")
    return bare in IRREGULAR or (bare.endswith("ed") and "_" not in bare)


def test_functions_are_verbs_or_nouns() -> None:
    """No function of a module is called by a participle alone; methods may be, whose object is the noun."""
    functions = [node.name for tree in TREES.values() for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [name for name in functions if is_participle(name)] == []
    everything = [node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert sum(map(is_participle, everything)) / len(everything) < 0.03


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


def types_in(annotation: object) -> Iterator[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


def test_every_type_in_a_public_signature_or_report_is_public() -> None:
    names = {name: getattr(loratool, name) for name in loratool.__all__}
    public, hidden = set(names.values()), set()
    for each in public:
        if isfunction(each) or is_dataclass(each):
            hints = get_type_hints(each, localns=names)
            hidden |= {kind for hint in hints.values() for kind in types_in(hint) if kind.__module__.startswith("loratool")}
    assert {kind.__name__ for kind in hidden - public} == set()


def test_the_public_face_is_whole_and_is_imported_when_it_is_used() -> None:
    script = (
        "import loratool, sys; assert 'torch' not in sys.modules; [getattr(loratool, name) for name in loratool.__all__]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    documented = (ROOT.parent / "docs" / "api.md").read_text()
    assert [name for name in loratool.__all__ if f"heading: loratool.{name}\n" not in documented] == []


def test_a_verb_has_one_name_everywhere() -> None:
    """`merge` is verbs/merge, cli/merge.py, tests/verbs/test_merge.py and docs/verbs/merge.md."""
    rooms = {path.stem for path in (ROOT / "verbs").iterdir() if not path.name.startswith("_")} - {"reports"}
    tested = {path.stem.removeprefix("test_") for path in (ROOT.parent / "tests" / "verbs").glob("test_*.py")}
    explained = {path.stem for path in (ROOT.parent / "docs" / "verbs").glob("*.md")}
    commands = set(cli.list_commands(Context(cli)))
    assert {path.stem for path in (ROOT / "cli").glob("*.py")} >= commands
    assert rooms == commands - {"formats"}
    assert explained == commands
    assert tested >= rooms


def test_tests_mirror_the_folders() -> None:
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()} | {"docs", "oracles", "laws", "hostile"}
    folders = {path.name for path in (ROOT.parent / "tests").iterdir() if (path / "__init__.py").exists()}
    assert folders <= rooms


def test_comments_stand_where_somebody_would_wonder() -> None:
    """About three in a hundred lines."""
    comments = lines = 0
    for path in FILES:
        text = path.read_text()
        lines += text.count("\n")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        notes = ("# type:", "# fmt:", "# noqa")
        comments += sum(each.type == tokenize.COMMENT and not each.string.startswith(notes) for each in tokens)
    assert comments / lines > 0.025
