"""Inputs as people have them: a path with ~, a pattern, a name on the hub, standard input."""

from __future__ import annotations

import glob
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from loratool.errors import LoratoolError
from loratool.files import hub

STDIN = "-"


class InputName(click.ParamType[str]):
    """What names an input, as it was written; the shell completes paths."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Has the shell complete a path."""
        return [CompletionItem(incomplete, type="file")]


class InputPath(click.ParamType[Path]):
    """A file or folder to read: a path, hf:ORG/NAME[@REVISION][/FILE], or - for standard input."""

    name = "path"
    shell_complete = InputName.shell_complete

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path where it lies."""
        return resolve_input(str(value), ctx)


input_name = InputName()
input_path = InputPath()


def resolve_input(text: str, ctx: click.Context | None = None) -> Path:
    """The path of what `text` names. What is on the hub is downloaded, what comes by standard input is kept in a temporary
    file until the command ends. Raises `LoratoolError`."""
    if text == STDIN:
        return _spool(ctx or click.get_current_context())
    if hub.is_named(text):
        return hub.fetch(text)
    path = Path(text).expanduser()
    if not exists(text) and hub.might_be_named(text):
        try:
            return hub.fetch(text)
        except LoratoolError as error:
            raise LoratoolError(f"{text}: no such file or folder here; and {error}") from error
    return path


def exists(text: str) -> bool:
    """Whether there is a file or folder of that name; what can be no name is none."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def expand_inputs(ctx: click.Context, param: click.Parameter, values: Iterable[str]) -> tuple[Path, ...]:
    """Every path that the arguments name, a pattern's in order; raises `LoratoolError` for one that matches nothing."""
    paths: list[Path] = []
    for text in values:
        if exists(text) or not glob.has_magic(text):
            paths.append(resolve_input(text, ctx))
            continue
        matches = sorted(glob.glob(str(Path(text).expanduser()), recursive=True))
        if not matches:
            raise LoratoolError(f"{text}: matches no file")
        paths += map(Path, matches)
    return tuple(paths)


def _spool(ctx: click.Context) -> Path:
    folder = tempfile.mkdtemp(prefix="loratool-")
    ctx.find_root().call_on_close(lambda: shutil.rmtree(folder, ignore_errors=True))
    path = Path(folder, "stdin")
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path
