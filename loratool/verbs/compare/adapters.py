"""Adapters against each other: module by module under common names, in factored form where they have one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loratool.adapter.adapter import Adapter
from loratool.adapter.rename import Moved, renamed
from loratool.adapter.verify import same_bytes
from loratool.base.base import Weights
from loratool.base.effects import effect_of
from loratool.deltas.base import Delta, moved
from loratool.deltas.relations import _factors, norm_of, related, require_alike
from loratool.deltas.schema import WEIGHT
from loratool.deltas.sums import Combined, summed
from loratool.errors import NeedsBase, Unsupported, about
from loratool.formats.table import Format, format_named
from loratool.keys.identify import format_of
from loratool.keys.resolve import choose_common
from loratool.numbers.devices import CPU, Lanes
from loratool.numbers.linalg import Relation
from loratool.numbers.threads import results

Place = tuple[str, str, str, bool]
"""A component's prefix, a path, a parameter, and whether its value is replaced."""


@dataclass(frozen=True, slots=True)
class Compared:
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
class Aligned:
    """What several adapters change, under the names of one format; by place, for each adapter."""

    format: Format
    arch: str
    changes: tuple[Mapping[Place, Delta], ...]

    def name(self, place: Place) -> str:
        """What the format calls a place."""
        prefix, path, parameter, _ = place
        stem = self.format.stem(prefix, path)
        return stem if parameter == WEIGHT else f"{stem} ({parameter})"

    @property
    def places(self) -> list[Place]:
        return list(dict.fromkeys(place for changes in self.changes for place in changes))


def aligned(adapters: Sequence[Adapter], arch: str | None, base: Weights | None) -> Aligned:
    """`adapters` under common names: those of the first one's format, or of another's where that has no place for a change.

    Raises `LoratoolError` where they are for different models, or where there is no common form.
    """
    adapters = [_apart(adapter) for adapter in adapters]
    problem: Exception | None = None
    for target in _formats(adapters):
        try:
            found_arch, ways = choose_common(
                [adapter.keys for adapter in adapters], target, arch, base.layout if base else None
            )
            moved = [renamed(adapter.changes, ways) for adapter in adapters]
        except Unsupported as error:
            problem = problem or error
            continue
        found = tuple(dict(_placed(adapter, items, base)) for adapter, items in zip(adapters, moved, strict=True))
        return Aligned(target, found_arch.title, found)
    assert problem
    raise problem


def _apart(adapter: Adapter) -> Adapter:
    """The adapter with stacked experts one by one, as other formats, and some bases, have them."""
    return replace(adapter, changes=tuple(part for change in adapter.changes for part in change.apart or (change,)))


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


def _placed(adapter: Adapter, items: Sequence[Moved], base: Weights | None) -> Iterator[tuple[Place, Delta]]:
    """Each change by its place; several at one place as their sum."""
    found: dict[Place, list[Delta]] = {}
    for item in items:
        source = item.sources[0]
        if source.optional and not (base and base.targets.find(source.module, item.parameter)):
            continue
        with about(f"{adapter.path}: {source}"):
            delta = item.delta
            if base and not delta.additive:
                if len(item.sources) > 1:
                    raise Unsupported("is one of several that make a stacked module, whose weight they do not have")
                delta = effect_of(delta, source.module, item.parameter, base).as_delta(item.parameter)
        replaces = delta.replaces
        found.setdefault((item.prefix, item.path, item.parameter, replaces), []).append(delta)
    for place, deltas in found.items():
        yield place, deltas[0] if len(deltas) == 1 else Combined(tuple(deltas), (1.0,) * len(deltas), summed)


def compared(found: Aligned, on: Lanes, i: int = 0, j: int = 1) -> list[Compared]:
    """Every place that one of two of the adapters changes, in order."""
    one, other = found.changes[i], found.changes[j]

    def at(place: Place) -> Compared:
        name, mine, theirs = found.name(place), one.get(place), other.get(place)
        return on.one(name, lambda device: _compared(name, _there(mine, device), _there(theirs, device)))

    return results(partial(at, place) for place in dict.fromkeys([*one, *other]))


def _there(delta: Delta | None, device: torch.device) -> Delta | None:
    """A delta, computed, on a device."""
    return moved(delta.made(), device) if delta and device != CPU else delta


def _compared(name: str, one: Delta | None, other: Delta | None) -> Compared:
    with about(name):
        if one is None or other is None:
            return _alone(name, one, other)
        found = related(one, other)
        identical = any(same_bytes(form, other) for form in one.forms())
        if found is None:
            if not identical:
                kinds = " and ".join(dict.fromkeys((one.kind, other.kind)))
                raise NeedsBase(f"how far deltas of kind {kinds} are apart depends on the weight; pass `base=`")
            return Compared(name, True, None, None, 0.0, 0.0, None)
    return _of_relation(name, found, identical=identical)


def _alone(name: str, one: Delta | None, other: Delta | None) -> Compared:
    """A module that only one of two adapters changes."""
    present = one or other
    assert present
    if not present.additive:
        raise NeedsBase(f"what a delta of kind {present.kind}, that only one of them has, changes depends on the weight")
    norm = norm_of(present)
    relative = 1.0 if norm else 0.0
    return Compared(name, False, norm if one else 0.0, norm if other else 0.0, norm, relative, None)


def _of_relation(name: str, found: Relation, *, identical: bool) -> Compared:
    largest = max(found.one, found.other)
    product = found.one * found.other
    return Compared(
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


def inner_products(aligned: Aligned, on: Lanes) -> Tensor:
    """⟨ΔW_i, ΔW_j⟩ of all adapters, summed over all places: (n, n) in float64."""
    changes = aligned.changes

    def one(place: Place, device: torch.device) -> Tensor:
        deltas = [_there(mine.get(place), device) for mine in changes]
        if not all(delta is None or delta.additive for delta in deltas):
            raise NeedsBase(f"{aligned.name(place)}: is of a kind that depends on the weight; pass `base=`")
        require_alike([delta for delta in deltas if delta])
        held = [_held(delta) if delta else None for delta in deltas]
        table = torch.zeros(len(changes), len(changes), dtype=torch.float64)
        for i, mine in enumerate(held):
            for j, theirs in enumerate(held[: i + 1]):
                if mine and theirs:
                    table[i, j] = table[j, i] = _inner(mine, theirs)
        return table

    tables = results(partial(on.one, aligned.name(place), partial(one, place)) for place in aligned.places)
    return torch.stack(tables).sum(dim=0)


Held = tuple[Tensor, Tensor | None]
"""Factors in float64, or the whole difference and None."""


def _held(delta: Delta) -> Held:
    factors = _factors(delta)
    if factors and 2 * factors[0].shape[1] <= min(delta.shape[0], math.prod(delta.shape[1:])):
        return factors[0].double(), factors[1].double()
    return delta.dense().double().reshape(delta.shape[0], -1), None


def _inner(one: Held, other: Held) -> Tensor:
    """⟨one, other⟩ of two differences, of which either may be factored."""
    if one[1] is None:
        one, other = other, one
    if one[1] is None:
        return (one[0] * other[0]).sum()
    if other[1] is None:
        return ((one[0].T @ other[0]) * one[1]).sum()
    return ((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum()
