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
    """An input as it was written, which the command resolves itself; the shell completes it as a path."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Has the shell complete a path."""
        return [CompletionItem(incomplete, type="file")]


class InputPath(click.ParamType[Path]):
    """A file or folder to read: a path, hf:ORG/NAME[@REVISION][/FILE], or - for standard input."""

    name = "path"
    shell_complete = InputName.shell_complete

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path of the input on this machine, downloaded or read from standard input where needed."""
        return resolve_input(str(value), ctx)


input_name = InputName()
input_path = InputPath()


def resolve_input(text: str, ctx: click.Context | None = None) -> Path:
    """The path of the input that `text` names. A name on the hub is downloaded; standard input is kept in a temporary file
    until the command ends. Raises `LoratoolError`."""
    if text == STDIN:
        return _spool(ctx or click.get_current_context())
    if hub.is_named(text):
        return hub.fetch(text)
    path = Path(text).expanduser()
    # ORG/NAME without hf: is a path first, so that no command depends on what the hub has.
    if not exists(text) and hub.might_be_named(text):
        try:
            return hub.fetch(text)
        except LoratoolError as error:
            raise LoratoolError(f"{text}: no such file or folder here; and {error}") from error
    # A path that is not there goes on: the reader's own error says more.
    return path


def exists(text: str) -> bool:
    """Whether there is a file or folder called `text`; false where no path can have that name."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        # A name too long, with a NUL in it, or with a ~user that nobody is.
        return False


def expand_inputs(ctx: click.Context, param: click.Parameter, values: Iterable[str]) -> tuple[Path, ...]:
    """The paths that the arguments name, those of a pattern sorted; raises `LoratoolError` for a pattern without a match."""
    paths: list[Path] = []
    for text in values:
        # A name with [brackets] that is there is that file. Other patterns are for shells that expand none, and for quotes.
        if exists(text) or not glob.has_magic(text):
            paths.append(resolve_input(text, ctx))
            continue
        matches = sorted(glob.glob(str(Path(text).expanduser()), recursive=True))
        if not matches:
            raise LoratoolError(f"{text}: matches no file")
        paths += map(Path, matches)
    return tuple(paths)


def _spool(ctx: click.Context) -> Path:
    """Copies standard input to a temporary file, which the end of the command removes, and returns the file's path."""
    # Readers take regular files only, and read them at offsets, which a pipe does not have.
    folder = tempfile.mkdtemp(prefix="loratool-")
    ctx.find_root().call_on_close(lambda: shutil.rmtree(folder, ignore_errors=True))
    path = Path(folder, "stdin")
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path
