"""Heads that only an adapter has: classifiers and reward models that were trained on a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratool.adapter.adapter import Adapter, Change
from loratool.archs.classes import class_facts, class_of_config, head_of
from loratool.errors import Unsupported
from loratool.files.layout import Layout
from loratool.verbs.merge.sizes import label_entries

TASKS: Final[Mapping[str, str]] = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""The task_type of PEFT's configs that ask for a class with a head of its own, and the ending of that class's name."""
_ENDINGS: Final = ("ForCausalLM", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForConditionalGeneration", "Model")
"""The endings of classes without such a head."""


def class_with_head(adapter: Adapter, layout: Layout) -> str:
    """The class that an adapter's head is of, where the base is of another class of the same model; "" where it has none."""
    base, mapped = class_of_config(layout.config), adapter.config.get("auto_mapping")
    named = mapped.get("base_model_class") if isinstance(mapped, dict) else None
    task = TASKS.get(str(adapter.config.get("task_type")))
    stem = next((base.removesuffix(ending) for ending in _ENDINGS if base.endswith(ending)), "")
    name = named if isinstance(named, str) else f"{stem}{task}" if stem and task else ""
    same = class_facts(name).get("type") == class_facts(base).get("type")
    return name if head_of(name) and name != base and same else ""


def head_tensor(change: Change) -> str:
    """The tensor that a change of a head, whose modules every class calls alike, is the value of."""
    return f"{change.module.path}.{change.parameter}"


def is_of_head(change: Change, name: str) -> bool:
    """Whether a change is a value of the head of the class `name`."""
    return change.delta.replaces and head_tensor(change) in head_of(name)


def require_head(layout: Layout, name: str, held: Sequence[Change]) -> None:
    """Raises `Unsupported` where neither the base nor `held`, what the adapter has of the head, has all of it, or where the
    class calls the rest of the model by other names."""
    there = {head_tensor(change) for change in held}
    missing = [each for each in head_of(name) if each not in there and each not in layout.tensors]
    if missing:
        raise Unsupported(
            f"{layout.root}: the adapter was trained as {name}, which has {missing[0]}, and neither it nor the base holds "
            "that: its training began with random numbers that nobody saved; use a base that has it, or save what PEFT "
            "merges while the trained model is still in memory"
        )
    prefix, own = class_facts(name).get("prefix"), class_facts(class_of_config(layout.config)).get("prefix")
    if prefix != own:
        raise Unsupported(
            f"{layout.root}: the adapter was trained as {name}, which calls {own} {prefix}; load the base as that class "
            "with transformers, save it, and merge into that"
        )


def head_config(layout: Layout, name: str, held: Sequence[Change]) -> dict[str, Any]:
    """The entries of config.json that a model of the class `name` with this head has."""
    counts = [change.delta.shape[0] for change in held if change.parameter == "weight"]
    labels = {} if name.endswith("ForQuestionAnswering") or not counts else label_entries(counts[-1])
    said = layout.config.get("id2label")
    # Labels that the base names already, as many as there are, keep their names.
    if labels and isinstance(said, Mapping) and len(said) == counts[-1]:
        labels = {}
    return {"architectures": [name], **labels}


def unread_weights(layout: Layout, name: str) -> list[str]:
    """The base's tensors outside of its base model, its language model's head above all, that the class `name` lacks."""
    prefix = class_facts(name).get("prefix", "")
    # A base whose names are without the prefix is the base model alone, and all of it is read.
    outside = [each for each in layout.tensors if not each.startswith(f"{prefix}.") and each not in head_of(name)]
    return outside if len(outside) < len(layout.tensors) else []
