"""PEFT's patterns: the same answers as PEFT's rule, and an end in time whatever the pattern is."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import InvalidConfig
from loratool.formats.patterns import PatternMap

PATH = "model.layers.0." + "a" * 60
SLOW = (
    "a?" * 30 + "a" * 30 + "z", "(a|aa)" * 40 + "z", "(a+)+z", "((a{1000}){1000}){1000}", "(?:a|b|ab)*" * 20 + "z",
    "(" * 500 + "a" + ")*" * 500 + "z", "a{0,50}" * 100 + "z", r"(.*)(.*)(.*)(.*)\1\2\3\4z", "a{e<=40}z",
)  # fmt: skip
pieces = st.sampled_from(["a", "b", "_1", ".", r"\.", "a.b", "^", "$", "[ab]", "(a|b)", "a*", "a?b"])
patterns = st.lists(pieces, min_size=1, max_size=4).map("".join)
paths = st.lists(st.sampled_from(["a", "b", "_1", "ab", "aab"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(patterns, max_size=5, unique=True), paths)
def test_the_first_pattern_that_matches_by_pefts_rule_counts(keys: list[str], path: str) -> None:
    try:
        wanted = next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)
    except re.error:
        return
    assert PatternMap({key: key for key in keys}, "config").value_of(path, None) == wanted


@pytest.mark.parametrize("pattern", SLOW, ids=range(len(SLOW)))
def test_no_pattern_takes_long(pattern: str) -> None:
    found = PatternMap({pattern: 1}, "config")
    for number in range(20):
        with suppress(InvalidConfig):
            assert found.value_of(f"{PATH}{number}", 0) in (0, 1)


def test_thousands_of_names_take_a_moment() -> None:
    names = {rf"^model\.layers\.{number}.mlp": number for number in range(20_000)}
    found = PatternMap(names, "config")
    assert [found.value_of(f"model.layers.{number}.mlp", -1) for number in range(20_000)] == list(range(20_000))
    assert found.value_of("x.model.layers.1.mlp", -1) == -1
