"""The command line: parses words into calls of the library and prints what they return."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import warnings
from types import FrameType
from typing import Any, NoReturn

import click

from loratool._version import __version__
from loratool.cli.check import check_command
from loratool.cli.combine import combine_command
from loratool.cli.compare import compare_command
from loratool.cli.completion import install_option, show_option
from loratool.cli.convert import convert_command
from loratool.cli.delta import delta_command
from loratool.cli.edit import edit_command
from loratool.cli.env import env_command
from loratool.cli.extract import extract_command
from loratool.cli.formats import formats_command
from loratool.cli.hash import hash_command
from loratool.cli.inspect import inspect_command
from loratool.cli.merge import merge_command
from loratool.cli.meta import meta_command
from loratool.cli.render import print_json
from loratool.cli.report import report_command
from loratool.cli.resize import resize_command
from loratool.cli.swap import swap_command
from loratool.cli.unmerge import unmerge_command
from loratool.errors import LoratoolError
from loratool.text import message, size

AS_JSON = "loratool.json"
"""The key in a context's notes (`Context.meta`) that says whether JSON is asked for."""
NO_MEMORY = ("can't allocate memory", "failed to map segment", "can't start new thread", "Cannot allocate memory")
"""The words in which torch, the linker and Python say that there is no memory."""


class Failure(click.ClickException):
    """An explained error: `error: …` on stderr, with --json also as a document on stdout; exit code 1."""

    exit_code = 1

    def __init__(self, text: str, *, as_json: bool = False) -> None:
        super().__init__(text)
        self.as_json = as_json

    def show(self, file: Any = None) -> None:
        if self.as_json:
            print_json({"error": message(self.message)})
        click.echo(f"error: {message(self.message)}", err=True)


class Commands(click.Group):
    """A group that ends each of its commands alike: errors explained, interruptions quiet, no traceback at a closed pipe."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # The words themselves tell, since inputs are looked up, and may be missing, before all options are parsed.
        ctx.meta[AS_JSON] = "--json" in args
        try:
            return super().parse_args(ctx, args)
        except LoratoolError as error:
            raise Failure(str(error), as_json=ctx.meta[AS_JSON]) from error

    def invoke(self, ctx: click.Context) -> Any:
        as_json = ctx.meta[AS_JSON]
        try:
            return super().invoke(ctx)
        except LoratoolError as error:
            raise Failure(str(error), as_json=as_json) from error
        except KeyboardInterrupt:
            # 128 and the number of SIGINT, as shells have it.
            ctx.exit(130)
        except BrokenPipeError:
            # Whoever read our output has left.
            _forget_output()
            ctx.exit(0)
        except OSError as error:
            # The disk behind standard output may be full; then Python's flush at exit would fail a second time.
            _forget_output()
            where = f"{error.filename}: " if error.filename else ""
            raise Failure(f"{where}{error.strerror or error}", as_json=as_json) from error
        except (MemoryError, RuntimeError, ImportError) as error:
            # torch raises RuntimeError where it gets no memory, and the linker fails an import for it. All else is a bug,
            # whose traceback is wanted.
            if (needed := short_of_memory(error)) is None:
                raise
            raise Failure(needed, as_json=as_json) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="loratool")
@install_option
@show_option
def cli() -> None:
    """Inspect, merge, extract, convert, combine, resize and compare LoRA adapters and their relatives, in the formats of
    PEFT, kohya, diffusers and others.

    An adapter is a safetensors file or a PEFT folder; a base is a safetensors file, or a folder of Hugging Face or
    diffusers. Either may be on the hub: hf:ORG/NAME. Every command has an example on its own help page.
    """


# The modules of commands are light: each imports its verb, and torch with that, inside its function, so that help, errors
# of usage and completion never wait for torch.
cli.add_command(check_command)
cli.add_command(combine_command)
cli.add_command(compare_command)
cli.add_command(convert_command)
cli.add_command(delta_command)
cli.add_command(edit_command)
cli.add_command(env_command)
cli.add_command(extract_command)
cli.add_command(formats_command)
cli.add_command(hash_command)
cli.add_command(inspect_command)
cli.add_command(merge_command)
cli.add_command(meta_command)
cli.add_command(report_command)
cli.add_command(resize_command)
cli.add_command(swap_command)
cli.add_command(unmerge_command)


def short_of_memory(error: BaseException) -> str | None:
    """The message for an error that means that memory ran out; None for any other error."""
    text = str(error)
    # Only the text tells torch's error apart: its allocator for the CPU raises a plain RuntimeError.
    if not isinstance(error, MemoryError) and not any(mark in text for mark in NO_MEMORY):
        return None
    asked = re.search(r"tried to allocate (\d+) bytes", text)
    needed = f": {size(int(asked[1]))} were needed at once" if asked else ""
    return f"out of memory{needed}; give the process more (ulimit -v, the container's limit), or close other programs"


def main() -> NoReturn:
    """The entry point: SIGTERM and SIGHUP unwind like exceptions, so that outputs are tidied up; they exit with 143, 129."""
    # Windows has no SIGHUP.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminate)
    for stream in (sys.stdout, sys.stderr):
        # Names may hold characters that the terminal's encoding lacks: an escape is better than a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _silence_libraries()
    sys.exit(cli())


def _silence_libraries() -> None:
    """Keeps warnings and log lines of other libraries, which show paths of source files, from standard error, unless they
    are asked for (`python -W`, PYTHONWARNINGS)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # With a handler, logging does not print what nobody handles.
    logging.getLogger().addHandler(logging.NullHandler())


def _forget_output() -> None:
    """Sends what Python still holds for standard output nowhere, so that the flush at exit does not fail."""
    with contextlib.suppress(OSError):  # it is no file where somebody else runs us
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
