"""The outcomes of an extraction as the changes of one adapter, and the reasons for what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from loratool.adapter.adapter import Change
from loratool.adapter.approximate import placeholder_lora
from loratool.base.pairs import Pair
from loratool.deltas.full import Replace
from loratool.verbs.extract.forms import BESIDE_LORA, LORA, REPLACED
from loratool.verbs.extract.outcomes import Extraction, Outcome

NOT_KEPT: Final = "the rule kept no rank of it"


@dataclass(frozen=True, slots=True)
class ExtractItem:
    """A pair and the `form` in which the output will hold its change; where there is no form, `why` not."""

    pair: Pair
    form: str | None
    why: str = ""


def assemble_changes(
    items: Sequence[ExtractItem], outcomes: Mapping[int, Outcome], work: Extraction
) -> tuple[list[Change], dict[int, str]]:
    """The changes that the output holds, in the base's order, and the reason for each item that is left out, by number."""
    lost = {number: items[number].why or NOT_KEPT for number, outcome in outcomes.items() if outcome.delta is None}
    held = {number for number in outcomes if number not in lost}
    matrices = {items[number].pair.module for number in held if items[number].form == LORA}
    changes: list[Change] = []
    for number in sorted(held):
        item, delta = items[number], outcomes[number].delta
        assert delta is not None
        if item.form == BESIDE_LORA and item.pair.module not in matrices:
            # PEFT and diffusers hold a bias beside a LoRA only. Where the bias changed alone, that LoRA has rank 1 and is 0.
            nothing = placeholder_lora(_weight_shape(item, items), 1, torch.zeros(1, dtype=delta.dense().dtype))
            changes.append(Change(item.pair.module, "weight", nothing))
        changes.append(Change(item.pair.module, item.pair.parameter, delta))
    return changes + _siblings(items, changes, work), lost


def _weight_shape(item: ExtractItem, items: Sequence[ExtractItem]) -> tuple[int, ...]:
    """The shape of the weight beside a bias."""
    return next(
        other.pair.shape for other in items if other.pair.module == item.pair.module and other.pair.parameter == "weight"
    )


def _siblings(items: Sequence[ExtractItem], changes: Sequence[Change], work: Extraction) -> list[Change]:
    """The unchanged parameters of modules that have a replaced one: PEFT's modules_to_save are whole modules."""
    replaced = {change.module for change in changes if change.delta.replaces}
    there = {(change.module, change.parameter) for change in changes}
    return [
        Change(pair.module, pair.parameter, Replace(work.tuned.at(pair.tuned), item.form))
        for item in items
        if (pair := item.pair).module in replaced and item.form in REPLACED and (pair.module, pair.parameter) not in there
    ]
