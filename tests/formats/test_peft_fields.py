"""Every field of every config that the installed PEFT has is used, harmless or refused: a new one fails here."""

from __future__ import annotations

import dataclasses

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from loratool.formats.peft import HARMLESS, REFUSED_FIELDS, TUNERS, USED, PeftConfig


@pytest.mark.parametrize("kind", sorted(TUNERS))
def test_every_field_of_the_installed_peft_is_in_the_table(kind: str) -> None:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields - USED - HARMLESS - REFUSED_FIELDS.keys() == set(), f"new in PEFT {peft.__version__}"


def test_no_field_is_in_the_table_twice() -> None:
    assert not USED & HARMLESS
    assert not (USED | HARMLESS) & REFUSED_FIELDS.keys()


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_what_is_refused_is_refused_where_it_is_set(name: str) -> None:
    assert PeftConfig.parse({"peft_type": "LORA", name: {"a": 1}}, "config").refusal == REFUSED_FIELDS[name]
    assert not PeftConfig.parse({"peft_type": "LORA", name: None}, "config").refusal


def test_a_method_that_nobody_knows_is_refused_and_a_number_is_not() -> None:
    for value in (True, {"a": 1}, [1]):
        assert "use_new" in PeftConfig.parse({"use_new": value}, "config").refusal
    for value in (False, None, 3, "x", {}, []):
        assert not PeftConfig.parse({"new": value}, "config").refusal


@pytest.mark.parametrize(("kind", "reason"), [("FROD", "is not a kind"), ("SHADOW", "runs a network of its own")])
def test_a_tuner_that_is_not_computed_is_refused_as_such(kind: str, reason: str) -> None:
    # Its fields are its own business, and merging with PEFT, the way out of fields, is none where PEFT cannot.
    assert reason in PeftConfig.parse({"peft_type": kind, "its_own": True}, "config").refusal


def test_a_diagonal_of_one_block_is_a_plain_lora() -> None:
    assert not PeftConfig.parse({"use_bdlora": {"nblocks": 1}}, "config").refusal
    assert PeftConfig.parse({"use_bdlora": {"nblocks": 2}}, "config").refusal == REFUSED_FIELDS["use_bdlora"]
