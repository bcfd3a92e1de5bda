"""For which architecture an adapter is to be converted: the one that is asked for, the base's, or all that explain it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.archs import ARCHS, Arch, arch_named
from loratool.archs.links import Link
from loratool.errors import AmbiguousFile, LoratoolError, Unsupported, first_few
from loratool.files.layout import Layout
from loratool.formats.table import LLM, Format, format_named
from loratool.keys.detect import break_ties, is_language_model, matching_archs
from loratool.keys.identify import archs_of_adapters
from loratool.keys.listing import AdapterKeys
from loratool.keys.places import inputs_of
from loratool.keys.routes import (
    Route,
    arch_without_table,
    is_spelled_as,
    language_model,
    route_modules,
    routes_keeping_names,
    without_table,
)
from loratool.names import CONTAINER, ORIGINAL, UNET, Module

OF_DIFFUSERS: Final = ("transformer.", "unet.", "prior.", CONTAINER)
"""Prefixes that tell that modules whose architecture has no table are in the naming of diffusers."""
OF_ORIGINALS: Final = ("diffusion_model.", "model.diffusion_model.", "net.")
"""Prefixes that tell that such modules are in the naming of the original."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What the user says of an adapter: its architecture, the format it is in, and a checkpoint that has its names."""

    arch: str | None = None
    source: str | None = None
    base: Layout | None = None


def resolve_routes(adapters: Sequence[AdapterKeys], target: Format, wanted: Hints) -> tuple[Arch, dict[Module, Route]]:
    """The one architecture that all `adapters` are for, and where each module goes in `target`.

    Raises `AmbiguousFile` where several architectures explain the modules and have them go different ways, and
    `LoratoolError` where there is no way.
    """
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.modules))
    where = " and ".join(str(adapter.path) for adapter in adapters)
    found = _candidates(adapters, modules, target, wanted)
    routes: list[tuple[Arch, dict[Module, Route]]] = []
    problems: list[LoratoolError] = []
    # All candidates are tried: which one is right matters only where two of them rename the modules differently.
    for candidate in found:
        try:
            route = _agree(modules, candidate, target)
        except LoratoolError as error:
            problems.append(error)
            continue
        if not any(route == other for _, other in routes):
            routes.append((candidate, route))
    if not routes:
        raise problems[0]
    if len(routes) > 1:
        titles = " or ".join(f"{candidate.title} (`arch={candidate.name!r}`)" for candidate, _ in routes)
        raise AmbiguousFile(f"{where}: may be for {titles}, which {target.title} spells differently; choose one")
    return routes[0]


def resolve_common_routes(
    adapters: Sequence[AdapterKeys], target: Format, arch: str | None, base: Layout | None
) -> tuple[Arch, dict[Module, Route]]:
    """`resolve_routes` by the adapters' own names or, where these do not settle the architecture, by the names of a base
    that the caller has for another reason."""
    try:
        return resolve_routes(adapters, target, Hints(arch))
    except LoratoolError:
        if base is None:
            raise
        return resolve_routes(adapters, target, Hints(arch, None, base))


def _agree(modules: Sequence[Module], arch: Arch, target: Format) -> dict[Module, Route]:
    """Where modules go: each keeps its own name if all names are right and no two of them are of one module."""
    # Two adapters may each spell one module rightly, CLIP with and without `text_model.`; the output needs one name.
    routes, kept = route_modules(modules, arch, target), routes_keeping_names(modules, arch, target)
    names: dict[tuple[str, tuple[tuple[str, Link | None], ...]], set[str]] = {}
    for module, route in routes.items():
        names.setdefault((route.prefix, route.targets), set()).add(module.stem)
    return kept if all(len(stems) == 1 for stems in names.values()) else routes


def _candidates(adapters: Sequence[AdapterKeys], modules: Sequence[Module], target: Format, wanted: Hints) -> list[Arch]:
    """The architectures to try: what the user says, else what the base is, else all whose tables explain the names; of these
    only such as have the modules spelled as the format `wanted.source`, if there is one."""
    if wanted.arch:
        found = [arch_named(wanted.arch)]
    # A language model has no table, so that its base could only repeat the adapter's own names.
    elif wanted.base and not is_language_model(modules):
        found = _of_base(wanted.base, modules, target)
    else:
        found = archs_of_adapters(adapters) or [_without_table(adapters, modules, target)]
    if wanted.source is None:
        return found
    source = format_named(wanted.source)
    spelled = [arch for arch in found if is_spelled_as(modules, arch, source)]
    if not spelled:
        raise LoratoolError(
            f"{adapters[0].path}: is not spelled as {source.title} spells it; `loratool inspect` shows how it is"
        )
    return spelled


def resolve_base_routes(
    modules: Sequence[Module], found: Sequence[Arch], target: Format
) -> tuple[Arch, dict[Module, Route], dict[Module, str]]:
    """Chooses among the architectures that a base may be the one that has most of `modules`: returns it, where each of its
    modules goes in `target`, and why the others have no place there.

    Raises `AmbiguousFile` where two architectures have as many modules and name them differently.
    """
    routes: list[tuple[Arch, dict[Module, Route], dict[Module, str]]] = []
    for arch in found:
        reasons: dict[Module, str] = {}
        # One by one: `route_modules` raises at the first module without a place, and each needs its own reason.
        for module in modules:
            try:
                route_modules([module], arch, target)
            except LoratoolError as error:
                reasons[module] = str(error)
        route = route_modules([module for module in modules if module not in reasons], arch, target)
        routes.append((arch, route, reasons))
    best = min(len(reasons) for *_, reasons in routes)
    first, *others = [route for route in routes if len(route[2]) == best]
    if any(_names(other[1]) != _names(first[1]) for other in others):
        titles = " or ".join(f"{arch.title} (`arch={arch.name!r}`)" for arch, *_ in (first, *others))
        raise AmbiguousFile(f"the base may be {titles}, which {target.title} spells differently; choose one")
    return first


def _names(routes: Mapping[Module, Route]) -> dict[Module, tuple[str, tuple[str, ...], bool]]:
    """What modules become in the output: equal for two architectures whose tables rename alike, whatever else they hold."""
    return {
        module: (route.prefix, tuple(path for path, _ in route.targets), route.renames and not route.swaps_halves)
        for module, route in routes.items()
    }


def archs_of_base(layout: Layout, modules: Sequence[Module], wanted: str | None) -> list[Arch]:
    """The architectures that a base may be: the one `wanted`, else those that explain the base, else one without a table, in
    which `modules` are called what they are called already."""
    if wanted:
        return [arch_named(wanted)]
    inputs = inputs_of(layout)
    if is_language_model([module for module, _ in inputs]):
        return [language_model(modules)]
    named, fitting = matching_archs(inputs)
    # Where no shapes fit, the names still tell how to rename.
    return (
        break_ties(fitting, inputs, {})[0]
        or named
        or [arch_without_table(modules, "base", f"the model in {layout.root.name}")]
    )


def _of_base(layout: Layout, modules: Sequence[Module], target: Format) -> list[Arch]:
    """The architectures of the base; where no table explains it, one of its own names, for formats of its naming only."""
    named = [module for module, _ in inputs_of(layout)]
    found = archs_of_base(layout, named, None)
    if found[0] in ARCHS:
        return found
    if found[0].name == LLM:
        # Norms too are called what Hugging Face calls them.
        return [arch_without_table([*modules, *named], LLM, found[0].title)]
    # Folders have diffusers' names and single files the original's; without a table none become the others.
    if (ORIGINAL in target.namings) == layout.is_folder and any(module.component == UNET for module in named):
        raise Unsupported(
            f"{layout.root}: has no table here, and its names are {'diffusers' if layout.is_folder else 'the original'}'s, "
            f"which {target.title} does not use"
        )
    return found


def _without_table(adapters: Sequence[AdapterKeys], modules: Sequence[Module], target: Format) -> Arch:
    """An architecture of the file's own names, for the format that the file is in or, if its names are dotted, one of the
    same naming; raises `LoratoolError` where the names cannot be carried over."""
    # Adapters that tables explain one by one, but none together, are for different models.
    alone = [(adapter.path, found[0].title) for adapter in adapters if (found := archs_of_adapters([adapter]))]
    if alone and len(adapters) > 1:
        shown = ", ".join(f"{path} is for {title}" for path, title in alone)
        raise LoratoolError(f"no one model has the modules of all: {shown}; `arch=` names it where that is wrong")
    own = without_table(modules)
    if is_spelled_as(modules, own, target):
        return own
    expected = OF_ORIGINALS if ORIGINAL in target.namings else OF_DIFFUSERS
    strange = [module for module in modules if not module.stem.startswith(expected) or "." not in module.path]
    if strange:
        raise LoratoolError(
            f"no table explains {first_few(map(str, strange), 2)}, so what {target.title} calls them is unknown; "
            "`arch=` says for which model they are, `base=` gives a file that has their names"
        )
    return own
