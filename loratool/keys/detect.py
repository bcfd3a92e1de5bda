"""Which base architecture an adapter or a checkpoint is for: the one whose table explains every module. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.archs import ARCHS, Arch
from loratool.archs.llm import is_decoder, is_meta
from loratool.errors import first_few
from loratool.names import WHOLE, Module

NamedWidth = tuple[Module, int | None]
"""A module and the width of its input, where the shapes tell it."""

_DECODER: Final = "a decoder-only language model"
VERSION_KEYS: Final = ("ss_base_model_version", "modelspec.architecture")
"""Where trainers say what a file is for; believed only where names and shapes leave several."""


@dataclass(frozen=True, slots=True)
class Detection:
    """The architecture's name, or None; `title` for people, `reason` in words, `candidates` where several fit."""

    arch: str | None
    title: str
    reason: str
    candidates: tuple[str, ...] = ()


def detect(modules: Sequence[NamedWidth], metadata: Mapping[str, str] | None = None) -> Detection:
    """The architecture whose table explains `modules`: by names, then shapes, then `metadata`; none where several fit."""
    if not modules:
        return Detection(None, "unknown", "there are no modules to go by")
    if verdict := _language_model([module for module, _ in modules]):
        return verdict
    complete, fitting = matching_archs(modules)
    chosen, why = break_ties(fitting, modules, metadata or {})
    if len(chosen) > 1:
        titles = tuple(arch.title for arch in chosen)
        return Detection(None, "undecided", f"{len(titles)} tables explain all {len(modules)} modules alike", titles)
    if chosen:
        rivals = [arch.title for arch in complete if arch not in fitting]
        shapes = f"; the shapes rule out {first_few(rivals, 3)}" if rivals else ""
        return Detection(chosen[0].name, chosen[0].title, f"its table explains all {len(modules)} modules{shapes}{why}")
    return _unknown(complete, [module for module, _ in modules])


def matching_archs(modules: Sequence[NamedWidth]) -> tuple[list[Arch], list[Arch]]:
    """The architectures whose tables have all the names of `modules`, and those among them that no shape rules out."""
    named = archs_by_name([module for module, _ in modules])
    return named, [arch for arch in named if not _is_contradicted(arch, modules)]


def archs_by_name(modules: Sequence[Module]) -> list[Arch]:
    """The architectures whose tables have all the names of `modules`, whatever the shapes are."""
    return [arch for arch in ARCHS if all(arch.readings_of(module) for module in modules)]


def break_ties(fitting: list[Arch], modules: Sequence[NamedWidth], metadata: Mapping[str, str]) -> tuple[list[Arch], str]:
    """The architectures among `fitting` that the metadata names, else those whose every module of a kind is there; with the
    reason in words, "" where nothing was decided."""
    if len(fitting) < 2:
        return fitting, ""
    for key in VERSION_KEYS:
        said = metadata.get(key, "").lower()
        # The longest beginning counts: what begins with FLUX.2's `flux2` begins with FLUX.1's `flux` too.
        lengths = [_longest(arch, said) for arch in fitting]
        named = [arch for arch, length in zip(fitting, lengths, strict=True) if 0 < length == max(lengths)]
        if named and len(named) < len(fitting):
            return named, f"; {key} is {said!r}"
    # Trainers choose kinds of layers and take them in every block, so that the number of blocks tells models apart.
    covered = [arch for arch in fitting if _is_covered(arch, [module for module, _ in modules])]
    if covered and len(covered) < len(fitting):
        return covered, "; it has every module of these kinds, and no other table's"
    return fitting, ""


def _longest(arch: Arch, said: str) -> int:
    """The length of the longest of the architecture's `versions` that `said` begins with, 0 without one."""
    return max((len(version) for version in arch.versions if said.startswith(version)), default=0)


def is_language_model(modules: Sequence[Module]) -> bool:
    """Whether `modules` are those of a decoder-only language model, in Hugging Face's names or in Meta's."""
    paths = [module.path for module in modules]
    return all(module.component == WHOLE for module in modules) and (all(map(is_decoder, paths)) or is_meta(paths))


def _language_model(modules: Sequence[Module]) -> Detection | None:
    if not is_language_model(modules):
        return None
    whose = "Meta's Llama names them" if is_meta(module.path for module in modules) else "Hugging Face names a decoder's"
    return Detection("llm", _DECODER, f"all {len(modules)} modules are named as {whose}")


def _unknown(complete: Sequence[Arch], modules: Sequence[Module]) -> Detection:
    if complete:
        titles = first_few([arch.title for arch in complete], 3)
        return Detection(None, "unknown", f"the names are those of {titles}, the shapes are not")
    left = {arch: [module for module in modules if not arch.readings_of(module)] for arch in ARCHS}
    # A table that leaves most modules over shares a few common names, and would only mislead.
    closest = min(left, key=lambda arch: len(left[arch]))
    if len(left[closest]) > len(modules) / 2:
        return Detection(None, "unknown", "no architecture's table explains the module names")
    names = first_few(map(str, left[closest]), 3)
    return Detection(None, "unknown", f"{closest.title} comes closest, and leaves {len(left[closest])} over: {names}")


def _is_contradicted(arch: Arch, modules: Iterable[NamedWidth]) -> bool:
    """Whether the input width of any module fits none of the components of `arch` that have its name."""
    for module, width in modules:
        owners = [owner for owner, _ in arch.readings_of(module)]
        if width is not None and owners and all(owner.contradicts(module.path, width) for owner in owners):
            return True
    return False


def _is_covered(arch: Arch, modules: Iterable[Module]) -> bool:
    """Whether `modules` are all that `arch` has of their kinds, a kind being a name without its numbers."""
    have: dict[tuple[str, str], Counter[str]] = {}
    for module in modules:
        component, reading = arch.readings_of(module)[0]
        have.setdefault((component.name, reading.naming), Counter())[_kind(reading.path)] += 1
    # Counted in the naming that the names were read in: stacks are fewer than their parts.
    for (component_name, naming), kinds in have.items():
        whole = Counter(map(_kind, _paths_in_naming(arch, component_name, naming)))
        if any(count != whole[kind] for kind, count in kinds.items()):
            return False
    return True


def _paths_in_naming(arch: Arch, name: str, naming: str) -> Iterable[str]:
    """The module paths that `naming` has for the component `name`; in that of diffusers the parts of any other naming."""
    component = arch.component(name)
    assert component is not None
    links = component.links.get(naming)
    if links is not None:
        return (link.whole for link in links)
    return (part for link in next(iter(component.links.values())) for part in link.parts)


def _kind(path: str) -> str:
    """A module path without its numbers, alike for the same layer of all blocks."""
    return re.sub(r"\d+", "#", path)
