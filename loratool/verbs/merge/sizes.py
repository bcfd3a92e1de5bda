"""The sizes in config.json that follow from a weight's rows: vocabularies and labels, made true of what a merge writes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Final

from loratool.archs.llm import is_embedding
from loratool.deltas.schema import BIAS, WEIGHT
from loratool.errors import ShapeMismatch, Unsupported
from loratool.files.layout import Layout
from loratool.keys.places import module_of

if TYPE_CHECKING:
    from loratool.verbs.merge.plan import TensorPlan

VOCABULARY: Final = "vocab_size"
_OUTPUTS: Final = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output_projection|output|decoder)")
"""The names of output layers, which have a row for each token."""
_POSITIONS: Final = re.compile(r".*(?:wpe|position\w*)")
_LABELS: Final = re.compile(r"(?:.*\.)?(?:score|classifier|classifier\.out_proj|classification_head\.out_proj|logits_proj)")
"""The names of layers with a row for each label of a classifier."""


def resize_config(layout: Layout, tensors: Iterable[TensorPlan], config: MutableMapping[str, Any]) -> None:
    """Adds to `config`, the entries of config.json that change, those that follow from weights with other rows.

    Raises `ShapeMismatch` where a weight with a row for each token keeps the old number beside one that does not, and
    `Unsupported` where no entry is known that would have to change.
    """
    plans = list(tensors)
    changed = {plan.name: plan for plan in plans if plan.shape != plan.source.shape and plan.name not in layout.left_out}
    for plan in changed.values():
        if not any(term.delta.replaces or term.delta.reshapes for term in plan.terms) or not plan.shape:
            continue
        if plan.name not in layout.tensors and not _has_tokens(module_of(plan.name)[0].path):
            continue  # a head that only an adapter has
        path = module_of(plan.name)[0].path
        before, after = plan.source.shape[0], plan.shape[0]
        if _has_tokens(path):
            _require_same_tokens(layout, plan, [other for other in plans if other.name not in changed])
            _set_vocabulary(layout, before, after, config)
        elif _LABELS.fullmatch(path):
            config.update(label_entries(after))
        elif layout.config and before != after:
            raise Unsupported(
                f"{layout.root}: {plan.name} would have {after} rows in the place of {before}, and no entry of config.json "
                "is known to say so; `Selection(exclude=)` leaves it out"
            )


def require_same_rows(layout: Layout, tensors: Mapping[str, TensorPlan]) -> None:
    """Raises `ShapeMismatch` where a bias gets another number of rows than the weight of its layer has then."""
    for bias in tensors.values():
        stem, _, parameter = bias.name.rpartition(".")
        weight = tensors.get(f"{stem}.{WEIGHT}") if parameter == BIAS and bias.shape != bias.source.shape else None
        # Conv1D's outputs are its columns.
        if weight and bias.shape[0] not in (weight.shape[0], weight.shape[-1]):
            raise ShapeMismatch(
                f"{layout.root}: {bias.name} gets the shape {list(bias.shape)}, but {weight.name} of the same layer has "
                f"{list(weight.shape)}: the adapter is for another model; `Selection(exclude=)` leaves it out"
            )


def _has_tokens(path: str) -> bool:
    return not _POSITIONS.fullmatch(path) and (is_embedding(path) or _OUTPUTS.fullmatch(path) is not None)


def _require_same_tokens(layout: Layout, plan: TensorPlan, others: Iterable[TensorPlan]) -> None:
    """Raises `ShapeMismatch` where another weight with a row for each token keeps its number of rows."""
    left = [
        other.name
        for other in others
        if other.shape[:1] == plan.source.shape[:1] and _has_tokens(module_of(other.name)[0].path)
    ]
    if left:
        raise ShapeMismatch(
            f"{layout.root}: {plan.name} would have {plan.shape[0]} rows, and {left[0]} keeps {plan.source.shape[0]}, "
            "whose new rows the adapter does not hold; save it again with PEFT's save_embedding_layers=True"
        )


def _set_vocabulary(layout: Layout, before: int, after: int, config: MutableMapping[str, Any]) -> None:
    """Sets every entry of config.json that gives the old size of the vocabulary, wherever the model reads it."""
    said = list(_entries(layout.config))
    found = [entries for entries, value in said if value == before] or [entries for entries, _ in said][:1] or [()]
    for entries in found:
        here, there = config, layout.config
        for name in entries:
            there = there[name]
            here = here.setdefault(name, copy.deepcopy(there))
        here[VOCABULARY] = after


def _entries(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Where a config, and the configs in it, give the size of a vocabulary."""
    if VOCABULARY in config:
        yield above, config[VOCABULARY]
    for name, value in config.items():
        # Deeper than a model inside a model's part nothing is nested; a stranger's config might be.
        if isinstance(value, Mapping) and len(above) < 4:
            yield from _entries(value, (*above, name))


def label_entries(count: int) -> dict[str, Any]:
    """The entries of a classifier's config for `count` labels, by transformers' names for them."""
    names = [f"LABEL_{label}" for label in range(count)]
    return {
        "id2label": dict(zip(map(str, range(count)), names, strict=True)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
