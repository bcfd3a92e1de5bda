"""Every exception that loratool raises on purpose; anything else is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar


class LoratoolError(Exception):
    """The root of all errors here; a message says what was met, what was expected and what to do."""


class InvalidFile(LoratoolError):
    """A file that is not what it should be: broken, truncated, of another type, or unreadable."""


class InvalidConfig(LoratoolError):
    """A JSON file beside the tensors (``adapter_config.json``, an index) that cannot be trusted."""


class InvalidAdapter(LoratoolError):
    """Factors that do not make up a delta: a missing half, unlike ranks, an alpha that is no number."""


class UnmatchedModules(LoratoolError):
    """Modules of an adapter, or parameters of one checkpoint, that the other side has no weight for."""


class ShapeMismatch(LoratoolError):
    """A delta whose shape is not that of its weight."""


class NonFinite(LoratoolError):
    """NaN or Inf where a number has to be."""


class NeedsBase(LoratoolError):
    """A delta that is no fixed matrix, without the base that has the weight: what the delta adds depends on that weight."""


class Unsupported(LoratoolError):
    """Something recognised that cannot be done; the message says why, and what to do instead."""


class UnknownName(LoratoolError):
    """A format, an architecture, a method, a rule, a dtype or a program that there is not; the message lists those that
    there are."""


class AmbiguousFile(LoratoolError):
    """A file that can be read in several ways which differ; the message says how to choose."""


class OutputError(LoratoolError):
    """An output that cannot be written, or must not be written."""


_T = TypeVar("_T")


def look_up(table: Mapping[str, _T], name: str, what: str) -> _T:
    """The row of `table` called `name`; raises `UnknownName`, which lists all rows, where there is none."""
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name), table, n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise UnknownName(f"there is no {what} called {name!r}{guess}; there are {', '.join(table)}")


def first_few(names: Iterable[str], shown: int = 5) -> str:
    """The first few names and how many more there are, for an error's message."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


@contextmanager
def error_in_file(path: object) -> Iterator[None]:
    """Puts the name of a file before the message of an error that does not mention the file yet."""
    try:
        yield
    except LoratoolError as error:
        if str(path) in str(error):
            raise
        # The same type, by which callers tell errors apart: every one of them takes just a message.
        raise type(error)(f"{path}: {error}") from error


@contextmanager
def error_context(what: object) -> Iterator[None]:
    """Puts `what`, the subject of an error, before its message."""
    try:
        yield
    except LoratoolError as error:
        raise type(error)(f"{what}: {error}") from error
