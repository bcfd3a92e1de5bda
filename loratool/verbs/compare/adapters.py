"""Adapters against each other: module by module under common names, in factored form where they have one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loratool.adapter.adapter import Adapter
from loratool.adapter.rename import RenamedDelta, rename_changes
from loratool.adapter.verify import same_bytes
from loratool.base.base import BaseCheckpoint
from loratool.base.effects import effect_of
from loratool.deltas.base import Delta, to_device
from loratool.deltas.relations import _factors, norm_of, relate_deltas, require_alike
from loratool.deltas.schema import WEIGHT
from loratool.deltas.sums import LazySum, add_deltas
from loratool.errors import NeedsBase, Unsupported, error_context
from loratool.formats.table import Format, format_named
from loratool.keys.identify import format_of
from loratool.keys.resolve import resolve_common_routes
from loratool.numbers.devices import CPU, DevicePool
from loratool.numbers.linalg import Relation
from loratool.numbers.threads import map_on_threads

ModulePlace = tuple[str, str, str, bool]
"""A component's prefix, a path, a parameter, and whether its value is replaced."""


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """One module of two adapters: ‖ΔW‖ of each, ‖ΔW_A − ΔW_B‖, that relative to the larger norm, the cosine of the two, and
    the principal angles between what they write to (`outputs`) and read from (`inputs`), in degrees, if both have factors.

    `identical` says that every number is the same. Norms are 0 where one of them does not change the module, and None where
    only the base could tell them.
    """

    name: str
    identical: bool
    one: float | None
    other: float | None
    difference: float
    relative: float
    cosine: float | None
    outputs: tuple[float, ...] = ()
    inputs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class AlignedAdapters:
    """What several adapters change, under the names of one format; by place, for each adapter."""

    format: Format
    arch: str
    changes: tuple[Mapping[ModulePlace, Delta], ...]

    def name(self, place: ModulePlace) -> str:
        """What the format calls a place."""
        prefix, path, parameter, _ = place
        stem = self.format.stem(prefix, path)
        return stem if parameter == WEIGHT else f"{stem} ({parameter})"

    @property
    def places(self) -> list[ModulePlace]:
        return list(dict.fromkeys(place for changes in self.changes for place in changes))


def align_adapters(adapters: Sequence[Adapter], arch: str | None, base: BaseCheckpoint | None) -> AlignedAdapters:
    """`adapters` under common names: those of the first one's format, or of another's where that has no place for a change.

    Raises `LoratoolError` where they are for different models, or where there is no common form.
    """
    adapters = [_apart(adapter) for adapter in adapters]
    problem: Exception | None = None
    for target in _formats(adapters):
        try:
            found_arch, routes = resolve_common_routes(
                [adapter.keys for adapter in adapters], target, arch, base.layout if base else None
            )
            moved = [rename_changes(adapter.changes, routes) for adapter in adapters]
        except Unsupported as error:
            problem = problem or error
            continue
        found = tuple(dict(_place_changes(adapter, items, base)) for adapter, items in zip(adapters, moved, strict=True))
        return AlignedAdapters(target, found_arch.title, found)
    assert problem
    raise problem


def _apart(adapter: Adapter) -> Adapter:
    """The adapter with stacked experts one by one, as other formats, and some bases, have them."""
    return replace(adapter, changes=tuple(part for change in adapter.changes for part in change.per_expert or (change,)))


def _formats(adapters: Sequence[Adapter]) -> Iterator[Format]:
    """The formats that may serve: the adapters' own, then diffusers', whose modules are the finest."""
    seen = set()
    for adapter in adapters:
        try:
            found = format_of(adapter.keys)
        except Unsupported:
            continue
        if found.name not in seen:
            seen.add(found.name)
            yield found
    if "diffusers" not in seen:
        yield format_named("diffusers")


def _place_changes(
    adapter: Adapter, items: Sequence[RenamedDelta], base: BaseCheckpoint | None
) -> Iterator[tuple[ModulePlace, Delta]]:
    """Each change by its place; several at one place as their sum."""
    found: dict[ModulePlace, list[Delta]] = {}
    for item in items:
        source = item.sources[0]
        if source.optional and not (base and base.targets.find(source.module, item.parameter)):
            continue
        with error_context(f"{adapter.path}: {source}"):
            delta = item.delta
            if base and not delta.additive:
                if len(item.sources) > 1:
                    raise Unsupported("is one of several that make a stacked module, whose weight they do not have")
                delta = effect_of(delta, source.module, item.parameter, base).as_delta(item.parameter)
        replaces = delta.replaces
        found.setdefault((item.prefix, item.path, item.parameter, replaces), []).append(delta)
    for place, deltas in found.items():
        yield place, deltas[0] if len(deltas) == 1 else LazySum(tuple(deltas), (1.0,) * len(deltas), add_deltas)


def compare_modules(found: AlignedAdapters, devices: DevicePool, i: int = 0, j: int = 1) -> list[ModuleComparison]:
    """Every place that one of two of the adapters changes, in order."""
    one, other = found.changes[i], found.changes[j]

    def at(place: ModulePlace) -> ModuleComparison:
        name, mine, theirs = found.name(place), one.get(place), other.get(place)
        return devices.run_one(
            name, lambda device: _compare_module(name, _is_there(mine, device), _is_there(theirs, device))
        )

    return map_on_threads(partial(at, place) for place in dict.fromkeys([*one, *other]))


def _is_there(delta: Delta | None, device: torch.device) -> Delta | None:
    """A delta, computed, on a device."""
    return to_device(delta.materialise(), device) if delta and device != CPU else delta


def _compare_module(name: str, one: Delta | None, other: Delta | None) -> ModuleComparison:
    with error_context(name):
        if one is None or other is None:
            return _alone(name, one, other)
        found = relate_deltas(one, other)
        identical = any(same_bytes(form, other) for form in one.equivalent_forms())
        if found is None:
            if not identical:
                kinds = " and ".join(dict.fromkeys((one.kind, other.kind)))
                raise NeedsBase(f"how far deltas of kind {kinds} are apart depends on the weight; pass `base=`")
            return ModuleComparison(name, True, None, None, 0.0, 0.0, None)
    return _of_relation(name, found, identical=identical)


def _alone(name: str, one: Delta | None, other: Delta | None) -> ModuleComparison:
    """A module that only one of two adapters changes."""
    present = one or other
    assert present
    if not present.additive:
        raise NeedsBase(f"what a delta of kind {present.kind}, that only one of them has, changes depends on the weight")
    norm = norm_of(present)
    relative = 1.0 if norm else 0.0
    return ModuleComparison(name, False, norm if one else 0.0, norm if other else 0.0, norm, relative, None)


def _of_relation(name: str, found: Relation, *, identical: bool) -> ModuleComparison:
    largest = max(found.one, found.other)
    product = found.one * found.other
    return ModuleComparison(
        name,
        identical,
        found.one,
        found.other,
        0.0 if identical else found.difference,
        0.0 if identical or not largest else found.difference / largest,
        max(-1.0, min(1.0, found.inner / product)) if product else None,
        found.outputs,
        found.inputs,
    )


def inner_products(aligned: AlignedAdapters, devices: DevicePool) -> Tensor:
    """⟨ΔW_i, ΔW_j⟩ of all adapters, summed over all places: (n, n) in float64."""
    changes = aligned.changes

    def one(place: ModulePlace, device: torch.device) -> Tensor:
        deltas = [_is_there(mine.get(place), device) for mine in changes]
        if not all(delta is None or delta.additive for delta in deltas):
            raise NeedsBase(f"{aligned.name(place)}: is of a kind that depends on the weight; pass `base=`")
        require_alike([delta for delta in deltas if delta])
        held = [_changes_at(delta) if delta else None for delta in deltas]
        table = torch.zeros(len(changes), len(changes), dtype=torch.float64)
        for i, mine in enumerate(held):
            for j, theirs in enumerate(held[: i + 1]):
                if mine and theirs:
                    table[i, j] = table[j, i] = _inner(mine, theirs)
        return table

    tables = map_on_threads(partial(devices.run_one, aligned.name(place), partial(one, place)) for place in aligned.places)
    return torch.stack(tables).sum(dim=0)


ChangesByPlace = tuple[Tensor, Tensor | None]
"""Factors in float64, or the whole difference and None."""


def _changes_at(delta: Delta) -> ChangesByPlace:
    factors = _factors(delta)
    if factors and 2 * factors[0].shape[1] <= min(delta.shape[0], math.prod(delta.shape[1:])):
        return factors[0].double(), factors[1].double()
    return delta.dense().double().reshape(delta.shape[0], -1), None


def _inner(one: ChangesByPlace, other: ChangesByPlace) -> Tensor:
    """⟨one, other⟩ of two differences, of which either may be factored."""
    if one[1] is None:
        one, other = other, one
    if one[1] is None:
        return (one[0] * other[0]).sum()
    if other[1] is None:
        return ((one[0].T @ other[0]) * one[1]).sum()
    return ((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum()
