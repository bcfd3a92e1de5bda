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
from loratool.base.base import BaseCheckpoint
from loratool.base.effects import effect_of
from loratool.deltas.base import Delta, to_device
from loratool.deltas.relations import factors_of, norm_of, relate_deltas, relate_each, require_alike, same_bytes
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
"""Where a delta acts: a component's prefix, a module's path, a parameter, and whether the delta replaces the value."""


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """One module of two adapters: ‖ΔW‖ of each, ‖ΔW_A − ΔW_B‖, absolute and relative to the larger norm, the cosine of the
    two deltas, and, if both have factors, the principal angles in degrees between the spaces that the deltas write to
    (`outputs`) and between those that the deltas read from (`inputs`).

    `identical` says that every number is the same. A norm is 0 where the adapter does not change the module, and None where
    only the base could tell it.
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
    """The changes of several adapters under the names of one format: for each adapter, the deltas by place."""

    format: Format
    arch: str
    changes: tuple[Mapping[ModulePlace, Delta], ...]

    def name(self, place: ModulePlace) -> str:
        """The name of a place in the format."""
        prefix, path, parameter, _ = place
        stem = self.format.stem(prefix, path)
        return stem if parameter == WEIGHT else f"{stem} ({parameter})"

    @property
    def places(self) -> list[ModulePlace]:
        """The places that any of the adapters changes, each once, in order."""
        return list(dict.fromkeys(place for changes in self.changes for place in changes))


def align_adapters(adapters: Sequence[Adapter], arch: str | None, base: BaseCheckpoint | None) -> AlignedAdapters:
    """`adapters` under common names: those of the first adapter's format, or of another format where the first has no place
    for a change.

    Raises `LoratoolError` where the adapters are for different models, or where there is no common form.
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
            # If no format serves, the message is about the adapters' own format, which is tried first.
            problem = problem or error
            continue
        found = tuple(dict(_place_changes(adapter, items, base)) for adapter, items in zip(adapters, moved, strict=True))
        return AlignedAdapters(target, found_arch.title, found)
    assert problem
    raise problem


def _apart(adapter: Adapter) -> Adapter:
    """`adapter` with a change for each expert in place of stacked ones, as other formats and some bases have them."""
    return replace(adapter, changes=tuple(part for change in adapter.changes for part in change.per_expert or (change,)))


def _formats(adapters: Sequence[Adapter]) -> Iterator[Format]:
    """The formats that may serve: the adapters' own, then diffusers', whose modules are the parts of all others."""
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
    """The deltas of one adapter by place; several at one place become their sum."""
    found: dict[ModulePlace, list[Delta]] = {}
    for item in items:
        source = item.sources[0]
        # PEFT's (IA)³ multiplies a bias where the layer has one, which the base alone can tell.
        if source.optional and not (base and base.targets.find(source.module, item.parameter)):
            continue
        with error_context(f"{adapter.path}: {source}"):
            delta = item.delta
            # With a base, kinds that depend on the weight become differences, comparable with all other kinds.
            if base and not delta.additive:
                if len(item.sources) > 1:
                    raise Unsupported("is one of several that make a stacked module, whose weight they do not have")
                delta = effect_of(delta, source.module, item.parameter, base).as_delta(item.parameter)
        # Beside a LoRA PEFT may save the weight itself: a value and a difference have no sum, and so no common place.
        replaces = delta.replaces
        found.setdefault((item.prefix, item.path, item.parameter, replaces), []).append(delta)
    for place, deltas in found.items():
        yield place, deltas[0] if len(deltas) == 1 else LazySum(tuple(deltas), (1.0,) * len(deltas), add_deltas)


def compare_modules(found: AlignedAdapters, devices: DevicePool, i: int = 0, j: int = 1) -> list[ModuleComparison]:
    """The comparison of adapters `i` and `j` at every place that either changes, in order."""
    one, other = found.changes[i], found.changes[j]

    def compute(places: Sequence[ModulePlace], device: torch.device) -> list[ModuleComparison]:
        names = [found.name(place) for place in places]
        pairs = [(_delta_on(one.get(place), device), _delta_on(other.get(place), device)) for place in places]
        return _compare_alike(names, pairs)

    def shapes(place: ModulePlace) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(delta.shape if (delta := changes.get(place)) else None for changes in (one, other))

    def nbytes(place: ModulePlace) -> int:
        return max(4 * math.prod(shape) for shape in shapes(place) if shape is not None)

    places = dict.fromkeys([*one, *other])
    return list(devices.map_alike(places, compute, title=found.name, alike=shapes, nbytes=nbytes).values())


def _delta_on(delta: Delta | None, device: torch.device) -> Delta | None:
    """`delta`, computed and moved, where `device` is another than the CPU."""
    return to_device(delta.materialise(), device) if delta and device != CPU else delta


def _compare_alike(names: Sequence[str], pairs: Sequence[tuple[Delta | None, Delta | None]]) -> list[ModuleComparison]:
    """The comparisons at places whose deltas are of one shape; those of products of factors are found together."""
    # One by one where there is one alone, so that its errors have its name.
    both = [(one, other) for one, other in pairs if one and other]
    known = iter(relate_each(both)) if len(both) > 1 else None
    return [
        _compare_module(name, one, other, next(known) if known and one and other else None)
        for name, (one, other) in zip(names, pairs, strict=True)
    ]


def _compare_module(name: str, one: Delta | None, other: Delta | None, known: Relation | None = None) -> ModuleComparison:
    """The comparison of two deltas at one place, whose relation may be `known` already; raises `NeedsBase` where it depends
    on the weight."""
    with error_context(name):
        if one is None or other is None:
            return _alone(name, one, other)
        found = known or relate_deltas(one, other)
        # Converted adapters hold the same numbers under other leaves: every equivalent form counts.
        identical = any(same_bytes(form, other) for form in one.equivalent_forms())
        if found is None:
            if not identical:
                kinds = " and ".join(dict.fromkeys((one.kind, other.kind)))
                raise NeedsBase(f"how far deltas of kind {kinds} are apart depends on the weight; pass `base=`")
            return ModuleComparison(name, True, None, None, 0.0, 0.0, None)
    return _of_relation(name, found, identical=identical)


def _alone(name: str, one: Delta | None, other: Delta | None) -> ModuleComparison:
    """The comparison at a place that only one of two adapters changes: all of it is difference."""
    present = one or other
    assert present
    if not present.additive:
        raise NeedsBase(f"what a delta of kind {present.kind}, that only one of them has, changes depends on the weight")
    norm = norm_of(present)
    relative = 1.0 if norm else 0.0
    return ModuleComparison(name, False, norm if one else 0.0, norm if other else 0.0, norm, relative, None)


def _of_relation(name: str, found: Relation, *, identical: bool) -> ModuleComparison:
    """The comparison from norms, inner product and angles."""
    # Where every number is the same, any difference that was computed is rounding.
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
    """The table of ⟨ΔW_i, ΔW_j⟩ of all pairs of adapters, summed over all places: (n, n) in float64."""
    changes = aligned.changes

    def one(place: ModulePlace, device: torch.device) -> Tensor:
        deltas = [_delta_on(mine.get(place), device) for mine in changes]
        if not all(delta is None or delta.additive for delta in deltas):
            raise NeedsBase(f"{aligned.name(place)}: is of a kind that depends on the weight; pass `base=`")
        require_alike([delta for delta in deltas if delta])
        held = [_operand(delta) if delta else None for delta in deltas]
        table = torch.zeros(len(changes), len(changes), dtype=torch.float64)
        for i, mine in enumerate(held):
            for j, theirs in enumerate(held[: i + 1]):
                if mine and theirs:
                    table[i, j] = table[j, i] = _inner(mine, theirs)
        return table

    pieces = (partial(devices.run_one, aligned.name(place), partial(one, place)) for place in aligned.places)
    tables = map_on_threads(pieces, threads=devices.threads)
    return torch.stack(tables).sum(dim=0)


Operand = tuple[Tensor, Tensor | None]
"""One delta as an operand of an inner product, in float64: its factors (up, down), or the whole matrix and None."""


def _operand(delta: Delta) -> Operand:
    """The factors of a delta, or the whole matrix where a second delta of this rank would make that the lesser work."""
    factors = factors_of(delta)
    if factors and 2 * factors[0].shape[1] <= min(math.prod(delta.shape[:1]), math.prod(delta.shape[1:])):
        return factors[0].double(), factors[1].double()
    return delta.dense().double().reshape(math.prod(delta.shape[:1]), -1), None


def _inner(one: Operand, other: Operand) -> Tensor:
    """⟨one, other⟩ of two deltas, of which each is factored or whole."""
    # With a factored delta first: ⟨UD, W⟩ is the sum of UᵀW ∘ D, and ⟨UD, VE⟩ that of UᵀV ∘ DEᵀ, which is rank by rank.
    if one[1] is None:
        one, other = other, one
    if one[1] is None:
        return (one[0] * other[0]).sum()
    if other[1] is None:
        return ((one[0].T @ other[0]) * one[1]).sum()
    return ((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum()
