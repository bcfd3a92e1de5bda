"""Names in memory and names on disk: transformers' own conversions of a class, applied to the names of a checkpoint.

PEFT's adapters speak of modules in memory, checkpoints of tensors on disk; transformers converts between the two when it
loads and saves a model. Source: transformers core_model_loading.py and conversion_mapping.py, whose tables are in
`transformers.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loratool.archs.classes import ModelPart, conversion_rows, model_parts, scopes_of

_EXPERT: Final = re.compile(r"(?<=experts\.)\d+(?=\.)")
"""The number of an expert, which no conversion looks at: experts are renamed by the first of each kind."""

ConversionStep = tuple[str, Mapping[str, Any]]
"""An operation of transformers on tensors, by its class's name, and its settings."""


@dataclass(frozen=True, slots=True)
class NameTransform:
    """A transform of transformers: names that match one of `sources` behind one of `scopes` are renamed by `targets`.

    Without `steps` it renames; with steps it makes the tensors named by all of `targets` from those of all `sources`. A
    `group` renames each source by its own target, if any name matches the first one. `offset` is added to a number on the
    way.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    steps: tuple[ConversionStep, ...]
    pattern: re.Pattern[str]
    scopes: tuple[str, ...] = ("",)
    group: bool = False
    offset: int = 0

    def rename(self, name: str) -> tuple[str, int] | None:
        """The new name and the number of the source that matched; None where none does."""
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        if scope is None:
            return None
        rest = name[len(scope) :]
        found = self.pattern.search(rest)
        if not found:
            return None
        number = next(int(group[1:]) for group, text in found.groupdict().items() if text is not None)
        target = self.targets[number if self.group else 0]
        if "\\1" in target:
            text = found[self.pattern.groupindex[f"g{number}"] + 1]
            target = target.replace("\\1", str(int(text) + self.offset) if self.offset else text)
        return scope + rest.replace(found[0], target, 1), number


@dataclass(frozen=True, slots=True)
class MemoryTensors:
    """The tensors in memory that are called `names`, made by `steps` from tensors on disk: for each pattern of the
    transform, those that match it, in order. `config` is that of the whole model."""

    names: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    steps: tuple[ConversionStep, ...] = ()


def transforms_of(config: Mapping[str, Any], *, saving: bool = False) -> tuple[NameTransform, ...]:
    """The transforms by which transformers loads the model that a config.json describes, in order; for `saving`, back."""
    parts = model_parts(config)
    if not parts:
        return ()
    prefix = parts[0].facts.get("prefix", "")
    rows = [
        (row, scopes_of(part.path, prefix))
        for part, conversions in _conversions(parts)
        for row in conversions
        # What was not there when the model was loaded is not put there when it is saved.
        if not (saving and row.get("prefix"))
    ]
    if not saving:
        rows += [(row, ("",)) for row in conversion_rows("legacy") or ()]
        return tuple(_transform(row["from"], row["to"], row, scopes) for row, scopes in rows)
    back = [(row.get("back", (row["to"], row["from"])), row, scopes) for row, scopes in reversed(rows)]
    return tuple(_transform(sources, targets, row, scopes) for (sources, targets), row, scopes in back)


def _conversions(parts: Iterable[ModelPart]) -> Iterator[tuple[ModelPart, Sequence[Mapping[str, Any]]]]:
    """The conversions of each part that has some, unless a part around it has had the same already."""
    # As transformers' get_model_conversion_mapping: by class, else by model type.
    seen: dict[str, list[str]] = {}
    for part in parts:
        kind = part.facts.get("type", "")
        if _is_inside(part.path, seen.get(part.name, ())):
            continue
        rows, by_class = conversion_rows(part.name), True
        if rows is None and not _is_inside(part.path, seen.get(kind, ())):
            rows, by_class = conversion_rows(kind), False
        if rows is None:
            continue
        yield part, rows
        for name in {part.name} if by_class else {part.name, kind}:
            seen.setdefault(name, []).append(part.path)


def _is_inside(path: str, outer: Iterable[str]) -> bool:
    return any(not other or path.startswith(f"{other}.") for other in outer)


def _transform(
    sources: Sequence[str], targets: Sequence[str], row: Mapping[str, Any], scopes: tuple[str, ...]
) -> NameTransform:
    """A row of the table as a transform, with the pattern that transformers compiles from its sources."""
    branches = []
    # The longest first, and each up to the end of a name: `weight` is not `weight_scale`.
    for number, source in sorted(enumerate(sources), key=lambda item: -len(item[1])):
        pattern = source.replace("*.", r".*\.")
        end = r"(?!\w)" if re.search("[a-zA-Z0-9]$", pattern) else ""
        branches.append(f"(?P<g{number}>{pattern}{end})")
    return NameTransform(
        tuple(sources),
        tuple(targets),
        tuple((name, settings) for name, settings in row.get("steps", ())),
        re.compile("|".join(branches)),
        scopes,
        row.get("group", False),
        row.get("offset", 0),
    )


def tensors_in_memory(config: Mapping[str, Any], names: Iterable[str]) -> Iterator[MemoryTensors]:
    """What the tensors of a checkpoint become in memory, for those that have another name there or are made of several."""
    transforms = transforms_of(config)
    if not transforms:
        return
    # One expert speaks for all: their names differ by a number.
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_EXPERT.sub("0", name), []).append(name)
    renamed = dict(zip(kinds, _rename_all(list(kinds), [each for each in transforms if not each.steps]), strict=True))
    converters = [each for each in transforms if each.steps]
    made: dict[tuple[str, int], list[list[str]]] = {}
    for kind, memory in renamed.items():
        used = next(((i, found) for i, each in enumerate(converters) if (found := each.rename(memory))), None)
        if used is None:
            yield from _renamed_experts(kind, memory, kinds[kind])
            continue
        number, (target, source) = used
        sources = made.setdefault((target, number), [[] for _ in converters[number].sources])
        sources[source] += kinds[kind]
    for (target, number), matching in made.items():
        converter = converters[number]
        before, _, after = target.partition(converter.targets[0])
        whole = tuple(before + each + after for each in converter.targets)
        yield MemoryTensors(whole, tuple(tuple(sorted(each, key=_natural)) for each in matching), converter.steps)


def _rename_all(names: list[str], transforms: Iterable[NameTransform]) -> list[str]:
    """All `names` after all of `transforms`, one transform after the other."""
    for transform in transforms:
        found = [transform.rename(name) for name in names]
        if transform.group and not any(each and each[1] == 0 for each in found):
            continue
        names = [each[0] if each else name for name, each in zip(names, found, strict=True)]
    return names


def _renamed_experts(kind: str, memory: str, names: Iterable[str]) -> Iterator[MemoryTensors]:
    """The tensors of one kind under their names in memory, each with its own expert's number."""
    if kind == memory:
        return
    for name in names:
        number = _EXPERT.search(name)
        yield MemoryTensors((_EXPERT.sub(number[0], memory) if number else memory,), ((name,),))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key by which numbers in names count as numbers."""
    return [(int(part), "") if part.isdecimal() and len(part) < 20 else (0, part) for part in re.split(r"(\d+)", name)]


def name_on_disk(config: Mapping[str, Any], name: str) -> str:
    """What transformers calls a tensor in memory when it saves the model: the name of a tensor that a checkpoint lacks."""
    (found,) = _rename_all([name], [each for each in transforms_of(config, saving=True) if not each.steps])
    # Not every conversion leads back: what would be loaded as another tensor keeps its name in memory.
    (again,) = _rename_all([found], [each for each in transforms_of(config) if not each.steps])
    return found if again == name else name
