"""The command line: parses words into calls of the library and prints what they return."""
# ruff: noqa: E402  signals and streams first: what is imported next takes time, and may be interrupted

from __future__ import annotations

from loratool.cli.interrupts import prepare_program

prepare_program()

import contextlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
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
from loratool.cli.render import print_json, warn
from loratool.cli.report import report_command
from loratool.cli.resize import resize_command
from loratool.cli.swap import swap_command
from loratool.cli.unmerge import unmerge_command
from loratool.errors import LoratoolError
from loratool.text import LONGEST_MESSAGE, message, safe, size

AS_JSON = "loratool.json"
"""The key in a context's notes (`Context.meta`) that says whether JSON is asked for."""
INTERRUPTED = 130
"""The exit code of Ctrl-C: 128 and the number of SIGINT, as shells have it."""
NO_MEMORY = ("can't allocate memory", "failed to map segment", "can't start new thread", "Cannot allocate memory")
"""The words in which torch, the linker and Python say that there is no memory."""


TORCH_BYTES = 700 << 20
"""The address space that importing torch takes at least; with less it may loop without end."""


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
        with _words_made_safe():
            try:
                return super().parse_args(ctx, args)
            except LoratoolError as error:
                raise Failure(str(error), as_json=ctx.meta[AS_JSON]) from error
            except KeyboardInterrupt:
                ctx.exit(INTERRUPTED)
            except OSError as error:
                raise _output_failure(error, as_json=ctx.meta[AS_JSON]) from error

    def invoke(self, ctx: click.Context) -> Any:
        as_json = ctx.meta[AS_JSON]
        try:
            with _words_made_safe():
                return super().invoke(ctx)
        except LoratoolError as error:
            raise Failure(str(error), as_json=as_json) from error
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has left.
            _forget_output()
            ctx.exit(0)
        except OSError as error:
            raise _output_failure(error, as_json=as_json) from error
        except (MemoryError, RuntimeError, ImportError) as error:
            # torch raises RuntimeError where it gets no memory, and the linker fails an import for it. All else is a bug,
            # whose traceback is wanted.
            if (needed := short_of_memory(error)) is None:
                raise
            raise Failure(needed, as_json=as_json) from error


def _output_failure(error: OSError, *, as_json: bool) -> Failure:
    """The failure for an error of the system that no verb explains."""
    # The disk behind standard output may be full; then Python's flush at exit would fail a second time.
    _forget_output()
    where = f"{error.filename}: " if error.filename else ""
    return Failure(f"{where}{error.strerror or error}", as_json=as_json)


@contextlib.contextmanager
def _words_made_safe() -> Iterator[None]:
    """Makes errors of usage, in which click repeats what was typed, safe to print: names of files may hold escapes."""
    try:
        yield
    except click.UsageError as error:
        text = "\n".join(safe(line, LONGEST_MESSAGE) for line in error.format_message().splitlines())
        raise click.UsageError(text, error.ctx) from error


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


class _NoRoomForTorch(MetaPathFinder):
    """Ends the import of torch before it begins, where it would crash or hang for want of address space."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Raises `MemoryError` for torch; has nothing to say of any other module."""
        if fullname == "torch":
            raise MemoryError


def _watch_address_space() -> None:
    """Looks at the limit of the process's address space (ulimit -v), which nothing is left to look at once torch fails."""
    try:
        import resource
    except ImportError:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < TORCH_BYTES:
        sys.meta_path.insert(0, _NoRoomForTorch())


def main() -> NoReturn:
    """The entry point: signals unwind like exceptions, so that outputs are tidied up; they exit with 130, 143, 129."""
    for stream in (sys.stdout, sys.stderr):
        # Names may hold characters that the terminal's encoding lacks: an escape is better than a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _silence_libraries()
    _watch_address_space()
    try:
        code = cli(standalone_mode=True)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as ended:
        code = ended.code
    # All is done: what comes now could only show a traceback of Python's own end.
    with contextlib.suppress(ValueError):  # no main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except OSError:
        _forget_output()
        code = code or 1
    sys.exit(code)


def _silence_libraries() -> None:
    """Keeps warnings and log lines of other libraries, which show paths of source files, from standard error, unless they
    are asked for (`python -W`, PYTHONWARNINGS)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # With a handler, logging does not print what nobody handles. loratool's own warnings are printed as all others are.
    logging.getLogger().addHandler(logging.NullHandler())
    own = logging.Handler()
    own.emit = lambda record: warn(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("loratool").addHandler(own)


def _forget_output() -> None:
    """Sends what Python still holds for standard output nowhere, so that the flush at exit does not fail."""
    with contextlib.suppress(OSError):  # it is no file where somebody else runs us
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
