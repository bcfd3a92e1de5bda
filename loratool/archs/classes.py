"""What transformers knows of its model classes: which models stand inside a model, what each calls its tensors on disk,
which weights are tied, which parameters are stacks of experts.

The facts are transformers' own, read from it by `python -m docs.models` into `transformers.json`, whose members are:

- `transformers`: the version that was read.
- `conversions`: by class or model type, the transforms between names on disk and in memory, in order; or the name of another
  entry that has the same. `archs.memory` applies them.
- `autos`: the class of each model type, by the table of transformers that says it.
- `classes`: by class, its model `type`, the `prefix` of its base model, the weights `tied` to others (target to source, in
  memory's names), what decides whether they are (`ties`), its `parts`, models by path, its `stacks`, and the
  names of its own modules of Conv1D.
- `heads`: by class for labels or spans, the parameters that the language model of the same base lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final

TIE: Final = "tie_word_embeddings"
"""The entry of a config that says whether the output layer is the input embedding."""


@dataclass(frozen=True, slots=True)
class ModelPart:
    """A model inside a model, or the whole (`path` ""): its class, its config, and where that stands in the whole one."""

    path: str
    name: str
    config: Mapping[str, Any]
    entries: tuple[str, ...]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is known of the part's class; empty for a class that transformers does not have."""
        return class_facts(self.name)


@cache
def _file() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(files("loratool.archs").joinpath("transformers.json").read_text("utf-8"))
    return document


def class_facts(name: str) -> Mapping[str, Any]:
    """What `transformers.json` says of a class; empty for one that it does not know."""
    facts: Mapping[str, Any] = _file()["classes"].get(name, {})
    return facts


def head_of(name: str) -> tuple[str, ...]:
    """The parameters that a class for labels or spans has and its base's language model lacks; empty for other classes."""
    return tuple(_file()["heads"].get(name, ()))


def conversion_rows(name: str) -> list[Mapping[str, Any]] | None:
    """The transforms of a class or model type between names on disk and in memory; None where transformers has none."""
    rows: list[Mapping[str, Any]] | str | None = _file()["conversions"].get(name)
    return conversion_rows(rows) if isinstance(rows, str) else rows


def class_of_config(config: Mapping[str, Any]) -> str:
    """The class that a config.json names, "" where it names none; without `architectures`, the bare model of its type."""
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    found = _file()["autos"]["MODEL"].get(config.get("model_type") if isinstance(config.get("model_type"), str) else "")
    return found if isinstance(found, str) else ""


def model_parts(config: Mapping[str, Any]) -> tuple[ModelPart, ...]:
    """The model that a config.json describes, then all models inside it; empty for a class that transformers has not."""
    name = class_of_config(config)
    return tuple(_walk_parts("", name, config, ())) if class_facts(name) else ()


def _walk_parts(path: str, name: str, config: Mapping[str, Any], entries: tuple[str, ...]) -> Iterator[ModelPart]:
    yield ModelPart(path, name, config, entries)
    for inner, (usual, *where) in class_facts(name).get("parts", {}).items():
        own, below = config, entries
        if where:
            entry = config.get(where[0])
            own, below = entry if isinstance(entry, dict) else {}, (*entries, where[0])
        chosen = _chosen_class(usual, own, where[1]) if len(where) > 1 else usual
        yield from _walk_parts(f"{path}.{inner}" if path else inner, chosen, own, below)


def _chosen_class(usual: str, config: Mapping[str, Any], table: str) -> str:
    """The class of a part whose model type the config may choose; the `usual` one where it says nothing."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind == class_facts(usual).get("type"):
        return usual
    found = _file()["autos"][table].get(kind, usual)
    return found if isinstance(found, str) else usual


@dataclass(frozen=True, slots=True)
class TiedWeights:
    """Tensors in memory that a model's class makes one, by `names`; `entries` lead to what in its config says so.

    `said` is whether the config ties them, None where nothing is known of the class; with `always` the config cannot untie
    them.
    """

    names: tuple[str, ...]
    entries: tuple[tuple[str, ...], ...] = (("tie_word_embeddings",),)
    said: bool | None = None
    always: bool = False


def tied_weights(config: Mapping[str, Any]) -> tuple[TiedWeights, ...]:
    """The weights that the class in a config.json makes one, of all models inside it."""
    parts = model_parts(config)
    found: list[TiedWeights] = []
    for part in parts:
        # Patterns of names, which detection models have for the heads of all their layers, are not followed.
        tied = [tuple(name.strip("^$") for name in pair) for pair in part.facts.get("tied", {}).items()]
        pairs = [pair for pair in tied if all(map(_PLAIN.fullmatch, pair))]
        for group in _join_sets([{_inside(part.path, name) for name in pair} for pair in pairs]):
            found.append(_tie(part, parts, group))
    return tuple(_merge_ties(found))


_PLAIN: Final = re.compile(r"[A-Za-z0-9_.]+")
"""A name of one tensor, and no pattern of several."""


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _join_sets(groups: Iterable[set[str]]) -> list[set[str]]:
    """Sets of names, those joined that share one."""
    found: list[set[str]] = []
    for group in groups:
        apart = [each for each in found if not each & group]
        found = [*apart, group.union(*(each for each in found if each & group))]
    return found


def _tie(part: ModelPart, parts: Iterable[ModelPart], names: set[str]) -> TiedWeights:
    """The tie of `names`, which the class of `part` declares."""
    ways = part.facts.get("ties", ())
    entries = [
        (*part.entries, TIE),
        *((*part.entries, way) for way in ways if way in part.config and way.startswith("tie_")),
    ]
    said = part.config.get(TIE, "default" in ways)
    said = any(part.config.get(way, False) is True for way in ways if way.startswith("tie_")) or said
    # Configs of a language model inside another say it again, and programs read either.
    for inner in parts:
        holds = inner.entries != part.entries and any(name.startswith(f"{inner.path}.") for name in names)
        if holds and inner.config and inner.path.startswith(part.path):
            entries.append((*inner.entries, TIE))
            said = said or (inner.entries[-1] in ways and inner.config.get(TIE) is True)
    always = "always" in ways
    return TiedWeights(tuple(sorted(names)), tuple(dict.fromkeys(entries)), said=bool(said) or always, always=always)


def _merge_ties(ties: Iterable[TiedWeights]) -> Iterator[TiedWeights]:
    """The ties, those made one that share a tensor: a model and one inside it may tie a weight to several others."""
    rest = list(ties)
    for names in _join_sets([set(tie.names) for tie in rest]):
        same = [tie for tie in rest if set(tie.names) <= names]
        entries = dict.fromkeys(entry for tie in same for entry in tie.entries)
        said, always = any(tie.said for tie in same), any(tie.always for tie in same)
        yield TiedWeights(tuple(sorted(names)), tuple(entries), said, always)


def is_stack_transposed(config: Mapping[str, Any], parameter: str) -> bool | None:
    """Whether a stack of experts lies as (experts, in, out) in memory, and PEFT takes it so; None for what is no stack.

    `parameter` ends with the names of the holder and of the parameter.
    """
    ending = ".".join(parameter.split(".")[-2:])
    for part in model_parts(config):
        stacks = part.facts.get("stacks", ())
        if ending in stacks:
            return False
        if f"^{ending}" in stacks:
            return True
    return None


def conv1d_names(config: Mapping[str, Any]) -> list[tuple[str, frozenset[str]]] | None:
    """By what the paths of a part's modules begin with, the last names of those of transformers' Conv1D, whose weights lie
    as (in, out); None for a class that transformers has not."""
    parts = model_parts(config)
    prefix = parts[0].facts.get("prefix", "") if parts else ""
    own = [(part.path, frozenset(part.facts["conv1d"])) for part in parts if "conv1d" in part.facts]
    return [(scope, names) for path, names in own for scope in scopes_of(path, prefix)] if parts else None


def scopes_of(path: str, prefix: str) -> tuple[str, ...]:
    """What a part's names begin with: its path, with and without the prefix of the whole's base model."""
    if not path:
        return ("",)
    inner = path.removeprefix(prefix).removeprefix(".")
    inner = f"{inner}." if inner else ""
    return (f"{prefix}.{inner}", inner) if prefix else (inner,)
