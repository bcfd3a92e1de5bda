"""Inputs as people have them: a path with ~, a pattern, a name on the hub, standard input."""

from __future__ import annotations

import glob
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import click
from click.shell_completion import CompletionItem

from loratool.errors import LoratoolError
from loratool.files import hub
from loratool.files.header import BASE_HEADER_BYTES, tensors_size
from loratool.files.paths import path_of

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
    path = path_of(text)
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
        return path_of(text).exists()
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
        matches = sorted(glob.glob(str(path_of(text)), recursive=True))
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
        for block in _safetensors_blocks(sys.stdin.buffer):
            file.write(block)
    return path


def _safetensors_blocks(stream: BinaryIO) -> Iterator[bytes]:
    """The bytes of a stream as far as its safetensors header says that the file goes, and one more, which tells that it goes
    on; of any other stream the first few, by which the reader says what it is."""
    prefix = stream.read(8)
    yield prefix
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= BASE_HEADER_BYTES:
        yield stream.read(64)
        return
    header = stream.read(length)
    yield header
    left = tensors_size(header)
    while left > 0 and (block := stream.read(min(left, 1 << 20))):
        yield block
        left -= len(block)
    yield stream.read(1)
