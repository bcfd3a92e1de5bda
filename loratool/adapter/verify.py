"""Compares an adapter with what was written of it, delta by delta: as bytes, in factored form, as matrices, or on a weight
of random numbers."""

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
from loratool.deltas.base import Delta
from loratool.deltas.relations import same_bytes
from loratool.deltas.schema import ANY
from loratool.errors import InvalidAdapter, error_context
from loratool.formats.table import Format
from loratool.keys.routes import Route
from loratool.names import Module
from loratool.numbers.linalg import difference_norm, singular_values
from loratool.numbers.threads import map_on_threads

EXACT: Final = 1e-6
"""The relative difference that rounding an alpha, or a scale's product with a factor, to float32 may make: each rounding
is at most 2⁻²⁴, some 6e-8, and a few follow each other."""
UNKNOWN_WIDTH: Final = 1000
"""The width of a random weight in a dimension that the deltas leave to the weight."""


def verify_adapter(adapter: Adapter, again: LazyAdapter, routes: Mapping[Module, Route], target: Format) -> float:
    """The largest relative difference of a change between `adapter` and `again`, the same adapter in the format `target`.

    Raises `InvalidAdapter` where a difference is more than rounding.
    """

    def one(change: Change) -> float:
        with error_context(change):
            back = _bring_back(change, routes[change.module], target, again)
            # Ranks that add nothing are left out on the way: a delta of which nothing is there is right if it was zero.
            error = relative_difference(change.delta, back) if back else _size(change.delta)
            # So, and not `error > EXACT`: a NaN is refused too.
            if not error <= EXACT:
                raise InvalidAdapter(f"differs by {error:.2e} when it is read back from {target.title}: nothing is written")
            return error

    return max(map_on_threads(partial(one, change) for change in adapter.changes), default=0.0)


def delta_at(again: LazyAdapter, stem: str, change: Change) -> Delta | None:
    """The delta in `again` at the module called `stem` that answers to `change`: on the same parameter, and in the weight's
    place where the change's is; None where there is none."""
    for other in again.changes(stem):
        if other.parameter == change.parameter and other.delta.replaces == change.delta.replaces:
            return other.delta
    return None


def _bring_back(change: Change, route: Route, target: Format, again: LazyAdapter) -> Delta | None:
    """The delta of the source's module, put together from what was written; None where nothing of it was."""
    written = [delta_at(again, target.stem(route.prefix, path), change) for path, _ in route.targets]
    # The way of `rename_changes`, backwards: a name alone, else cut what was written into diffusers' parts and stack those.
    if route.renames:
        return swap_halves(written[0]) if written[0] and route.swaps_halves else written[0]
    pieces = [
        _piece_of(whole, link, part) for part, (_, link), whole in zip(route.read.parts, route.targets, written, strict=True)
    ]
    link = route.read.link
    if link is None or len(link.parts) == 1:
        return cross_link(pieces[0], link) if pieces[0] else None
    return stack_parts(link, dict(zip(link.parts, pieces, strict=True)))


def _piece_of(whole: Delta | None, link: Link | None, part: str) -> Delta | None:
    """The delta of one `part` of a module that was written as `whole`. Once the ranks of the other parts are left out, the
    source's own factors are there again, to be compared as bytes."""
    return (
        split_delta(cross_link(whole, link), link.sizes)[link.parts.index(part)].without_zero_ranks()
        if whole and link
        else whole
    )


def _size(delta: Delta) -> float:
    """‖ΔW‖ of a delta that was not written, and so has to be zero."""
    return float(delta.dense().norm())


def relative_difference(one: Delta, other: Delta) -> float:
    """‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖, 0 where every tensor is the same; of kinds that depend on the weight, on a random one."""
    # From the cheapest comparison to the dearest: bytes, factors, matrices, the effect on a weight.
    if same_bytes(one, other):
        return 0.0
    factors = one.factors(), other.factors()
    if one.additive and other.additive and factors[0] and factors[1]:
        up, down = factors[0]
        # Ranks of both together: from as many as the matrix has sides on, factors are no saving.
        if up.shape[1] + factors[1][0].shape[1] <= min(len(up), down.shape[1]):
            return _ratio(difference_norm(factors[0], factors[1]), float(singular_values(up, down).norm()))
    if one.additive and other.additive:
        # Some formats flatten kernels, so that the shapes may differ.
        dense = one.dense().double()
        return _ratio(float((dense - other.dense().double().reshape(dense.shape)).norm()), float(dense.norm()))
    return _difference_on_random_weight(one, other)


def _difference_on_random_weight(one: Delta, other: Delta) -> float:
    """The relative difference of what two deltas do to a random weight, which is the same in every run."""
    shape = _shape([one, other])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    changed, again = one.apply(weight) - weight, other.apply(weight.reshape(_fit(other, shape))).reshape(shape) - weight
    return _ratio(float((changed - again).double().norm()), float(changed.double().norm()))


def _shape(deltas: Iterable[Delta]) -> tuple[int, ...]:
    """The shape of the weight as far as the deltas together tell it, `LIKE` in dimensions that none of them knows."""
    # The longest has the kernel that the others flatten; each dimension is taken from whichever delta has it.
    shapes = [delta.shape for delta in deltas]
    longest = max(shapes, key=len)
    known = (
        next((shape[i] for shape in shapes if i < len(shape) and shape[i] != ANY), UNKNOWN_WIDTH)
        for i in range(len(longest))
    )
    return tuple(known)


def _fit(delta: Delta, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` as `delta` has it, with the kernel flattened where the delta has fewer dimensions."""
    return shape if len(delta.shape) == len(shape) else (shape[0], prod(shape[1:]))


def _ratio(left: float, whole: float) -> float:
    # Beside a delta of zeros a difference is counted as it is.
    return left / whole if whole else left
