"""Text for people: strings from outside made safe to print, and sizes, counts and tallies made short. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratool.flags import in_flags

LONGEST: Final = 200
LONGEST_MESSAGE: Final = 4000
UNITS: Final = ("bytes", "kB", "MB", "GB", "TB")


def safe(text: object, longest: int = LONGEST) -> str:
    """`text` cut to `longest` characters, with control characters, escapes and bidi overrides made visible."""
    shown = str(text)
    cut = f"{shown[:longest]}…" if len(shown) > longest else shown
    # Not printable are, to Python, also lone surrogates (bytes of a file name that are no UTF-8) and unassigned characters.
    return "".join(character if character.isprintable() else _escape(character) for character in cut)


def is_encodable(text: str) -> bool:
    """Whether `text` can be written as UTF-8: bytes of names and of arguments that are no UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def message(text: str) -> str:
    """The text of an error or a warning in the command line's words (`flags`), made safe."""
    return safe(in_flags(text), LONGEST_MESSAGE)


def size(nbytes: float) -> str:
    """Bytes with a decimal unit: 85.3 MB."""
    # Thousands, as disks and download pages count.
    value, unit = float(nbytes), 0
    # Three digits of 999.5 are 1000 already, which the next unit says in fewer.
    while value >= (1000 if unit == 0 else 999.5) and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}" if unit else f"{int(value)} {UNITS[0]}"


def count(number: int) -> str:
    """A number of things, in millions or billions where it is large: 42.6 M."""
    if number >= 1_000_000_000:
        return f"{number / 1e9:.3g} B"
    return f"{number / 1e6:.3g} M" if number >= 1_000_000 else f"{number:,}"


def histogram(counts: Mapping[Any, int], shown: int = 8) -> str:
    """Values and how often each occurs, the most frequent first: 16 ×700, 8 ×88."""
    # Equal counts in the order of their text, so that a report is the same each time; values may be of any type.
    ordered = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    more = f", {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(f"{safe(value)} ×{times:,}" for value, times in ordered[:shown]) + more


def _escape(character: str) -> str:
    """A character as Python escapes it: \\x1b, \\u202e."""
    return character.encode("unicode_escape", errors="backslashreplace").decode("ascii", errors="backslashreplace")


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts dotted names, the parts that are numbers by their value."""
    # Pairs, since Python compares no number with a word: words (-1) come before numbers.
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
