"""Which base architecture an adapter or a checkpoint is for: the one whose table explains every module. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.archs import ARCHS, Arch
from loratool.archs.llm import is_decoder
from loratool.errors import some
from loratool.formats.prefixes import WHOLE
from loratool.names import Module, flat

Input = tuple[Module, int | None]
"""A module and the width of its input, where the shapes tell it."""

DECODER: Final = "a decoder-only language model"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The architecture's name, or None; `title` for people, `reason` in words, `candidates` where several fit."""

    arch: str | None
    title: str
    reason: str
    candidates: tuple[str, ...] = ()


def detect(modules: Sequence[Input]) -> Verdict:
    """Explains `modules` by each architecture's table; shapes break ties, and what nothing decides stays open."""
    if not modules:
        return Verdict(None, "unknown", "there are no modules to go by")
    if all(is_decoder(module.path) for module, _ in modules):
        return Verdict("llm", DECODER, f"all {len(modules)} modules are named as Hugging Face names a decoder's")
    left = {arch: _unexplained(arch, modules) for arch in ARCHS}
    complete = [arch for arch, modules_left in left.items() if not modules_left]
    fitting = [arch for arch in complete if not _contradicted(arch, modules)]
    if len(fitting) == 1:
        rivals = [arch.title for arch in complete if arch is not fitting[0]]
        shapes = f"; the shapes rule out {', '.join(rivals)}" if rivals else ""
        return Verdict(fitting[0].name, fitting[0].title, f"its table explains all {len(modules)} modules{shapes}")
    if fitting:
        titles = tuple(arch.title for arch in fitting)
        return Verdict(None, "undecided", f"{len(titles)} tables explain every module alike", titles)
    return _unknown(left, complete, len(modules))


def _unknown(left: Mapping[Arch, list[Module]], complete: Sequence[Arch], count: int) -> Verdict:
    if complete:
        titles = ", ".join(arch.title for arch in complete)
        return Verdict(None, "unknown", f"the names are those of {titles}, the shapes are not")
    closest = min(left, key=lambda arch: len(left[arch]))
    if len(left[closest]) > count / 2:
        return Verdict(None, "unknown", "no architecture's table explains the module names")
    names = some(map(str, left[closest]), 3)
    return Verdict(None, "unknown", f"{closest.title} comes closest, and leaves {len(left[closest])} over: {names}")


def _unexplained(arch: Arch, modules: Iterable[Input]) -> list[Module]:
    return [module for module, _ in modules if not any(_knows(arch, module))]


def _knows(arch: Arch, module: Module) -> list[str]:
    """The components of `arch` that have `module`; one named in its prefix, or any where none is named."""
    path = flat(module.path)
    return [
        component.name
        for component in arch.components
        if module.component in (WHOLE, component.name)
        and (path in component.known or f"text_model_{path}" in component.known)
    ]


def _contradicted(arch: Arch, modules: Iterable[Input]) -> bool:
    """Whether a module's input width fits none of the components of `arch` that know its name."""
    for module, width in modules:
        owners = [owner for name in _knows(arch, module) if (owner := arch.component(name))]
        if width is not None and owners and all(owner.contradicts(module.path, width) for owner in owners):
            return True
    return False
