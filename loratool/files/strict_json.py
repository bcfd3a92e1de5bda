"""Reads JSON from strangers, which has one meaning and bounded costs, or is an error. Pure: no file is read."""

from __future__ import annotations

import json
import math
from typing import Any

from loratool.errors import InvalidConfig, first_few


def strict_json(raw: bytes) -> Any:
    """Reads JSON; raises `InvalidConfig` for duplicate keys, NaN, lone surrogates, giant integers and bottomless nesting."""
    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        # A lone surrogate may hide behind an escape; it could be neither printed nor written again.
        if b"\\u" in raw:
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise InvalidConfig("is nested too deeply") from error
    except UnicodeError as error:
        raise InvalidConfig("is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InvalidConfig(f"is not JSON: {error.msg} at character {error.pos}") from error
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python keeps the last of two values of a key and other readers the first: they would see different files.
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        raise InvalidConfig(f"has duplicate keys: {first_few(map(repr, twice))}")
    return found


def _integer(text: str) -> int | float:
    if text == "-0":
        return -0.0  # no natural number to the reference parser either
    # The largest unsigned 64-bit integer has 20 digits; Python takes quadratic time for longer ones.
    if len(text) > 20:
        raise InvalidConfig(f"has an integer of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    # Python reads 1e999 as infinity, and would write it as a word that is not JSON.
    if math.isinf(number := float(text)):
        raise InvalidConfig(f"has the number {text[:20]}, which is too large")
    return number


def _no_constant(text: str) -> float:
    raise InvalidConfig(f"has the value {text}, which is not JSON")
