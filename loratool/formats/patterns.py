"""PEFT's maps from patterns to numbers (rank_pattern, alpha_pattern), whose patterns are a stranger's regular expressions.

Source: PEFT utils/other.py (get_pattern_key): the first pattern counts for which re.match(rf"(.*\\.)?({pattern})$", path)
finds something. Names, as most patterns are, are looked up, however many there are. All other patterns are matched by the
package `regex`, which gives up when a time is over: no look at a pattern tells how long it will take.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from math import prod
from typing import Any, Final

import regex  # type: ignore[import-untyped]

from loratool.errors import InvalidConfig

SECONDS_TO_MATCH: Final = 1.0
"""The time that all patterns of a map may take together, over all modules."""
LARGEST_PATTERN: Final = 100_000
"""Letters of a pattern that is no name, times all counts in its braces: `regex` writes repetitions out."""
_COUNTS: Final = re.compile(r"\{[\d,]+\}")
_FUZZY: Final = re.compile(r"\{[^}\d,]")
"""Braces that mean themselves to Python's own patterns, and something else to those of `regex`."""
_NAME: Final = re.compile(r"(\^?)((?:[\w-]|\.|\\\.)+)\$?", re.ASCII)
"""A pattern that is a name: a dot is any letter in it, and an escaped dot a dot."""
_ANY: Final = "\0"
"""In a name: what stands for any letter."""


class PatternMap:
    """A map from patterns to values; `where` names it in errors."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._values = list(values.values())
        self._known: dict[str, int | None] = {}
        self._left = SECONDS_TO_MATCH
        # By length, and the places in it that may be any letter: the names with these places blanked, and their numbers.
        self._names: dict[int, dict[tuple[int, ...], dict[tuple[str, bool], int]]] = {}
        self._others: list[tuple[int, str]] = []
        self._compiled: dict[int, regex.Pattern[str]] = {}
        for number, pattern in enumerate(values):
            self._add(number, pattern)

    def __bool__(self) -> bool:
        return bool(self._values)

    def value_of(self, path: str, default: Any) -> Any:
        """The value of the first pattern that matches `path`; raises `InvalidConfig` where that takes too long, or one is no
        regular expression."""
        if path not in self._known:
            self._known[path] = self._first(path)
        number = self._known[path]
        return default if number is None else self._values[number]

    def _add(self, number: int, pattern: str) -> None:
        found = _NAME.fullmatch(pattern)
        if not found:
            self._others.append((number, pattern))
            return
        letters = re.sub(r"\\\.|\.", lambda dot: "." if dot[0] == r"\." else _ANY, found[2])
        places = tuple(place for place, letter in enumerate(letters) if letter == _ANY)
        # The first of two equal patterns counts.
        self._names.setdefault(len(letters), {}).setdefault(places, {}).setdefault((letters, bool(found[1])), number)

    def _first(self, path: str) -> int | None:
        """The number of the first pattern that matches, if any."""
        best = self._first_name(path)
        started = time.monotonic()
        for number, pattern in self._others:
            if best is not None and number > best:
                break
            try:
                matches = self._matches(number, pattern, path)
            finally:
                self._left -= time.monotonic() - started
                started = time.monotonic()
            if matches:
                return number
        return best

    def _first_name(self, path: str) -> int | None:
        best: int | None = None
        # A name may begin behind each dot.
        starts = (0, *(found.end() for found in re.finditer(r"\.", path)))
        for start in starts:
            rest = path[start:]
            for places, names in self._names.get(len(rest), {}).items():
                letters = list(rest)
                for place in places:
                    letters[place] = _ANY
                text = "".join(letters)
                for key in ((text, False), *(((text, True),) if start == 0 else ())):
                    number = names.get(key)
                    if number is not None and (best is None or number < best):
                        best = number
        return best

    def _matches(self, number: int, pattern: str, path: str) -> bool:
        try:
            if number not in self._compiled:
                # What Python's own takes for no pattern is none to PEFT, too.
                re.compile(pattern)
                counts = [int(digits) for braces in _COUNTS.findall(pattern) for digits in re.findall(r"\d+", braces)]
                size = len(pattern) * prod(max(count, 1) for count in counts)
                if size > LARGEST_PATTERN or _FUZZY.search(pattern):
                    raise InvalidConfig(self._too_intricate(pattern))
                self._compiled[number] = regex.compile(rf"(.*\.)?({pattern})$")
            return self._compiled[number].match(path, timeout=max(self._left, 0.001)) is not None
        except TimeoutError as error:
            raise InvalidConfig(self._too_intricate(pattern)) from error
        except (re.error, regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise InvalidConfig(f"{self.where}: pattern {pattern[:100]!r} is not a regular expression: {error}") from error

    def _too_intricate(self, pattern: str) -> str:
        return f"{self.where}: pattern {pattern[:100]!r} is too intricate to be matched in time; list module names instead"
