"""Messages of the library speak of its arguments; the command line says flags, which exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import loratool
from loratool.cli import cli
from loratool.flags import REFERENCE, in_flags

ROOT = Path(loratool.__file__).parent
BELOW = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] not in ("cli", "flags.py")]
OTHERS = ("--max-lora-rank", "--target", "check --fix")
"""vLLM's, Musubi's, and what a history calls a fix."""
FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


def texts(path: Path) -> Iterator[str]:
    """The strings of a module but its docstrings; what an f-string inserts is 'x'."""
    tree = ast.parse(path.read_text())
    told = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (told | parts):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "'x'" for part in node.values)


def flags(command: click.Command) -> set[str]:
    own = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    if not isinstance(command, click.Group):
        return own
    context = click.Context(command)
    below = (command.get_command(context, name) for name in command.list_commands(context))
    return own.union(*(flags(each) for each in below if each))


REFERENCES = sorted({found for path in BELOW for text in texts(path) for found in REFERENCE.findall(text)})


def test_there_are_references() -> None:
    assert len(REFERENCES) > 25


@pytest.mark.parametrize("reference", REFERENCES)
def test_every_argument_in_a_message_is_a_flag(reference: str) -> None:
    shown = in_flags(f"`{reference}`")
    assert shown != f"`{reference}`"
    mentioned = FLAG.findall(shown)
    assert mentioned
    assert set(mentioned) <= flags(cli)


@pytest.mark.parametrize("path", [path for path in BELOW if "report" not in path.parts], ids=lambda path: path.name)
def test_the_library_speaks_of_no_flag(path: Path) -> None:
    for text in texts(path):
        assert not set(re.findall(r"(?:\bcheck |(?<![\w-]))(?:--[a-z][a-z-]*|-o\b)", text)) - set(OTHERS), text


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("pass `base=`", "pass --base"),
        ("`to='kohya'`, or comfyui, has", "--to kohya, or comfyui, has"),
        ("pass `overwrite=True` to replace it", "pass --overwrite to replace it"),
        ("`Selection(exclude=('*.bias', '*norm*'))` leaves", "--exclude '*.bias' --exclude '*norm*' leaves"),
        ("`resize(rule=Rule('rank', 5, steps=CONSUMERS['vllm'].ranks))`", "loratool resize --rank 5 --round-ranks vllm"),
        ("`scale=('OUT*', nan)`: x", "--scale OUT*=nan: x"),
        ("`loratool inspect` and `git lfs pull`", "`loratool inspect` and `git lfs pull`"),
        ("a file called `x=(`", "a file called `x=(`"),
    ],
)
def test_what_a_reference_becomes(said: str, shown: str) -> None:
    assert in_flags(said) == shown


@pytest.mark.parametrize(
    "text",
    [
        "use `strength=0.8` or `print(1)`",
        "`to=" + "-" * 500 + "1`",
        "`to=" + "1+" * 900 + "1`",
        "`to=0x" + "f" * 5000 + "`",
        "`base=(`",
        "`" * 100_000,
    ],
)
def test_text_of_others_stays_what_it_is(text: str) -> None:
    assert in_flags(text) == text


def test_the_number_one_is_a_value_and_true_is_none() -> None:
    assert in_flags("`resize(rule=Rule('rank', 1))`") == "loratool resize --rank 1"
    assert in_flags("`overwrite=True`") == "--overwrite"
    assert in_flags("add `Rule(most=)`") == "add --max-rank"
