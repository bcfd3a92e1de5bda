"""Tables, JSON and progress. Everything that comes from a file passes through
`loratool.text.safe` before it reaches a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from loratool.flags import in_flags
from loratool.text import LONGEST_MESSAGE, message, safe

if TYPE_CHECKING:
    from loratool.verbs.reports import Report, TimedReport

NARROWEST: Final = 40
"""The least width of a table, whatever a terminal says of itself."""
SENTENCES: Final = ("warnings", "suspicions", "why", "way", "Finding.what")
"""Fields of reports that hold sentences for people, in which JSON too speaks of flags."""


def warn(text: str) -> None:
    """Prints `warning: …` on stderr."""
    click.echo(f"warning: {message(text)}", err=True)


def show_report(report: Report, *, as_json: bool, quiet: bool) -> bool:
    """Prints a report's warnings and, with `as_json`, the report; returns whether the report is to be printed as text."""
    for warning in report.warnings:
        warn(warning)
    if as_json:
        print_json(report)
    return not as_json and not quiet


def print_json(report: Any) -> None:
    """Prints a report as one JSON document on stdout."""
    # ASCII, so that control characters and half surrogates from files reach no terminal, and any encoding holds it. JSON has
    # no NaN: `_plain` leaves none, and an error is better than a document that no parser takes.
    click.echo(json.dumps(_plain(report), indent=2, allow_nan=False, ensure_ascii=True))


def print_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """Prints a title and lines of "name  what", aligned and folded to the terminal's width."""
    # Imported where text is printed: --json and --quiet need no rich, which is not quick to import.
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, what in facts:
        grid.add_row(Text(f"  {safe(name)}", style="dim"), Text(safe(what, LONGEST_MESSAGE)))
    _show(Text(safe(title), style="bold"), grid)


def print_device(report: TimedReport, *, verbose: bool) -> None:
    """Says on stderr, with `verbose`, where a verb computed, and why there."""
    if verbose:
        click.echo(f"computed on {report.device}: {message(report.device_reason)}", err=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    """Prints a table whose first column takes the width that is left; columns in `numbers` are aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=name != columns[0], overflow="fold")
    for row in rows:
        table.add_row(*(Text(safe(cell)) for cell in row))
    _show(table)


@contextmanager
def progress_bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A callback that draws bytes, rate and time left on stderr; None with `quiet`, and where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        # The total comes with the first call: until a verb has read the headers, nobody knows it.
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(value: Any) -> Any:
    """A report as values of JSON: dataclasses and mappings as objects, numbers that are not finite as null."""
    if dataclasses.is_dataclass(value):
        # What reports have in common comes behind what each one says.
        fields = sorted(dataclasses.fields(value), key=lambda field: field.kw_only is True)
        return {
            field.name: _in_words(type(value).__name__, field.name, _plain(getattr(value, field.name))) for field in fields
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_words(kind: str, name: str, value: Any) -> Any:
    """The value of a field, in the command line's words where the field is one of `SENTENCES`."""
    if name not in SENTENCES and f"{kind}.{name}" not in SENTENCES:
        return value
    return [in_flags(each) for each in value] if isinstance(value, list) else in_flags(value)


def _show(*parts: Any) -> None:
    """Prints what rich renders, without the blanks that rich fills lines with.

    The console never reads markup or emoji into text. Its width is that of the terminal, or of the text without a terminal.
    """
    from rich.console import Console

    # Into a pipe lines go whole, for grep and the like.
    width = max(shutil.get_terminal_size().columns, NARROWEST) if sys.stdout.isatty() else 10_000
    console = Console(markup=False, emoji=False, highlight=False, width=width)
    with console.capture() as capture:
        console.print(*parts, sep="\n")
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))
