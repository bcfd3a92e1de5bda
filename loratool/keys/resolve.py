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
OF_ORIGINALS: Final = ("diffusion_model.", "model.diffusion_model.", "net.")
"""Prefixes that tell the naming of modules whose architecture has no table."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What the user says of an adapter: its architecture, the format it is in, and a checkpoint that has its names."""

    arch: str | None = None
    source: str | None = None
    base: Layout | None = None


def resolve_routes(adapters: Sequence[AdapterKeys], target: Format, wanted: Hints) -> tuple[Arch, dict[Module, Route]]:
    """The architecture that `adapters` are for, all the same one, and where each module goes in `target`.

    Raises `AmbiguousFile` where several architectures explain the modules and have them go different ways, and
    `LoratoolError` where there is no way.
    """
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.modules))
    where = " and ".join(str(adapter.path) for adapter in adapters)
    found = _candidates(adapters, modules, target, wanted)
    routes: list[tuple[Arch, dict[Module, Route]]] = []
    problems: list[LoratoolError] = []
    for candidate in found:
        try:
            way = _agree(modules, candidate, target)
        except LoratoolError as error:
            problems.append(error)
            continue
        if not any(way == other for _, other in routes):
            routes.append((candidate, way))
    if not routes:
        raise problems[0]
    if len(routes) > 1:
        titles = " or ".join(f"{candidate.title} (`arch={candidate.name!r}`)" for candidate, _ in routes)
        raise AmbiguousFile(f"{where}: may be for {titles}, which {target.title} spells differently; choose one")
    return routes[0]


def resolve_common_routes(
    adapters: Sequence[AdapterKeys], target: Format, arch: str | None, base: Layout | None
) -> tuple[Arch, dict[Module, Route]]:
    """`resolve_routes` by the adapters' own names or, where these do not settle it, by those of a base that is there for
    another reason."""
    try:
        return resolve_routes(adapters, target, Hints(arch))
    except LoratoolError:
        if base is None:
            raise
        return resolve_routes(adapters, target, Hints(arch, None, base))


def _agree(modules: Sequence[Module], arch: Arch, target: Format) -> dict[Module, Route]:
    """Where modules go, each under its own name where that is right, and where no two adapters have two for one module."""
    routes, kept = route_modules(modules, arch, target), routes_keeping_names(modules, arch, target)
    names: dict[tuple[str, tuple[tuple[str, Link | None], ...]], set[str]] = {}
    for module, way in routes.items():
        names.setdefault((way.prefix, way.targets), set()).add(module.stem)
    return kept if all(len(stems) == 1 for stems in names.values()) else routes


def _candidates(adapters: Sequence[AdapterKeys], modules: Sequence[Module], target: Format, wanted: Hints) -> list[Arch]:
    if wanted.arch:
        found = [arch_named(wanted.arch)]
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
    """Of the architectures that a base may be, the one that has most of `modules`; where each goes in `target`, and why the
    others have no place there. Raises `AmbiguousFile` where two have them go different ways."""
    routes: list[tuple[Arch, dict[Module, Route], dict[Module, str]]] = []
    for arch in found:
        reasons: dict[Module, str] = {}
        for module in modules:
            try:
                route_modules([module], arch, target)
            except LoratoolError as error:
                reasons[module] = str(error)
        way = route_modules([module for module in modules if module not in reasons], arch, target)
        routes.append((arch, way, reasons))
    best = min(len(reasons) for *_, reasons in routes)
    first, *others = [way for way in routes if len(way[2]) == best]
    if any(_names(other[1]) != _names(first[1]) for other in others):
        titles = " or ".join(f"{arch.title} (`arch={arch.name!r}`)" for arch, *_ in (first, *others))
        raise AmbiguousFile(f"the base may be {titles}, which {target.title} spells differently; choose one")
    return first


def _names(routes: Mapping[Module, Route]) -> dict[Module, tuple[str, tuple[str, ...], bool]]:
    """What modules become, whichever table says so."""
    return {
        module: (way.prefix, tuple(path for path, _ in way.targets), way.renames and not way.swapped)
        for module, way in routes.items()
    }


def archs_of_base(layout: Layout, modules: Sequence[Module], wanted: str | None) -> list[Arch]:
    """What a base may be: the architecture that is `wanted`, those that explain it, or one without a table that calls
    `modules` what the base calls them."""
    if wanted:
        return [arch_named(wanted)]
    inputs = inputs_of(layout)
    if is_language_model([module for module, _ in inputs]):
        return [language_model(modules)]
    named, fitting = matching_archs(inputs)
    return (
        break_ties(fitting, inputs, {})[0]
        or named
        or [arch_without_table(modules, "base", f"the model in {layout.root.name}")]
    )


def _of_base(layout: Layout, modules: Sequence[Module], target: Format) -> list[Arch]:
    """The base's architecture; where none explains it, its own names, which only formats of its naming can use."""
    named = [module for module, _ in inputs_of(layout)]
    found = archs_of_base(layout, named, None)
    if found[0] in ARCHS:
        return found
    if found[0].name == LLM:
        # Norms too are called what Hugging Face calls them.
        return [arch_without_table([*modules, *named], LLM, found[0].title)]
    if (ORIGINAL in target.namings) == layout.is_folder and any(module.component == UNET for module in named):
        raise Unsupported(
            f"{layout.root}: has no table here, and its names are {'diffusers' if layout.is_folder else 'the original'}'s, "
            f"which {target.title} does not use"
        )
    return found


def _without_table(adapters: Sequence[AdapterKeys], modules: Sequence[Module], target: Format) -> Arch:
    """An architecture of the file's own names, for its own format or, if they are dotted, one of the same naming."""
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
