"""Whether what was written is what was read: the deltas of one file against those of another, in factored form where they
have one, else on a weight of random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from typing import Final

import torch

from loratool.adapter.adapter import Adapter, Change
from loratool.adapter.load import LazyAdapter
from loratool.adapter.rename import cross_link, split_delta, stack_parts, swap_halves
from loratool.archs.links import Link
from loratool.deltas.base import Delta, same_bits
from loratool.deltas.schema import ANY
from loratool.errors import InvalidAdapter, error_context
from loratool.formats.table import Format
from loratool.keys.routes import Route
from loratool.names import Module
from loratool.numbers.linalg import difference_norm, singular_values
from loratool.numbers.threads import map_on_threads

EXACT: Final = 1e-6
"""The relative difference that rounding an alpha, or a scale's product with a factor, to float32 may make."""
LIKE: Final = 1000
"""How wide a dimension is taken that a delta leaves to the weight."""


def verify_adapter(adapter: Adapter, again: LazyAdapter, routes: Mapping[Module, Route], target: Format) -> float:
    """The largest relative difference of a module between `adapter` and `again`, which holds it in another format.

    Raises `InvalidAdapter` where it is more than rounding.
    """

    def one(change: Change) -> float:
        with error_context(change):
            back = _bring_back(change, routes[change.module], target, again)
            error = difference(change.delta, back) if back else _size(change.delta)
            if not error <= EXACT:
                raise InvalidAdapter(f"differs by {error:.2e} when it is read back from {target.title}: nothing is written")
            return error

    return max(map_on_threads(partial(one, change) for change in adapter.changes), default=0.0)


def delta_at(again: LazyAdapter, stem: str, change: Change) -> Delta | None:
    """What `again` has of a change at the module with that stem: of the same parameter, replaced where that replaces."""
    for other in again.changes(stem):
        if other.parameter == change.parameter and other.delta.replaces == change.delta.replaces:
            return other.delta
    return None


def _bring_back(change: Change, way: Route, target: Format, again: LazyAdapter) -> Delta | None:
    """What the source's module is by what was written; None where nothing of it was."""
    written = [delta_at(again, target.stem(way.prefix, path), change) for path, _ in way.targets]
    if way.renames:
        return swap_halves(written[0]) if written[0] and way.swapped else written[0]
    pieces = [
        _piece_of(whole, link, part) for part, (_, link), whole in zip(way.read.parts, way.targets, written, strict=True)
    ]
    link = way.read.link
    if link is None or len(link.parts) == 1:
        return cross_link(pieces[0], link) if pieces[0] else None
    return stack_parts(link, dict(zip(link.parts, pieces, strict=True)))


def _piece_of(whole: Delta | None, link: Link | None, part: str) -> Delta | None:
    """What a module that was written is to one of its parts. Without the ranks of the others it is the source's own factors
    again, which are compared as bytes."""
    return (
        split_delta(cross_link(whole, link), link.sizes)[link.parts.index(part)].without_zero_ranks()
        if whole and link
        else whole
    )


def _size(delta: Delta) -> float:
    """‖ΔW‖, of what is to be zero where it is missing."""
    return float(delta.dense().norm())


def difference(one: Delta, other: Delta) -> float:
    """‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖, 0 where every tensor is the same; of kinds that depend on the weight, on a random one."""
    if same_bytes(one, other):
        return 0.0
    factors = one.factors(), other.factors()
    if one.additive and other.additive and factors[0] and factors[1]:
        up, down = factors[0]
        if up.shape[1] + factors[1][0].shape[1] <= min(len(up), down.shape[1]):
            return _ratio(difference_norm(factors[0], factors[1]), float(singular_values(up, down).norm()))
    if one.additive and other.additive:
        dense = one.dense().double()
        return _ratio(float((dense - other.dense().double().reshape(dense.shape)).norm()), float(dense.norm()))
    return _difference_on_random_weight(one, other)


def same_bytes(one: Delta, other: Delta) -> bool:
    """Whether two deltas hold the same numbers, and the same scale."""
    mine, theirs = one.leaves(), other.leaves()
    return (
        mine.keys() == theirs.keys()
        and one.scale == other.scale
        and all(same_bits(mine[leaf], theirs[leaf]) for leaf in mine)
    )


def _difference_on_random_weight(one: Delta, other: Delta) -> float:
    """The difference on a weight of their shape, whose numbers are drawn anew in the same way each time."""
    shape = _shape([one, other])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    changed, again = one.apply(weight) - weight, other.apply(weight.reshape(_fit(other, shape))).reshape(shape) - weight
    return _ratio(float((changed - again).double().norm()), float(changed.double().norm()))


def _shape(deltas: Iterable[Delta]) -> tuple[int, ...]:
    """The most that the deltas together say of their weight's shape."""
    shapes = [delta.shape for delta in deltas]
    longest = max(shapes, key=len)
    known = (next((shape[i] for shape in shapes if i < len(shape) and shape[i] != ANY), LIKE) for i in range(len(longest)))
    return tuple(known)


def _fit(delta: Delta, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` as a delta of fewer dimensions has it, its kernel flattened."""
    return shape if len(delta.shape) == len(shape) else (shape[0], prod(shape[1:]))


def _ratio(left: float, whole: float) -> float:
    return left / whole if whole else left
