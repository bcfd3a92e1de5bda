"""How deltas on one weight are related: norms, inner products and angles, from factors where the deltas have them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loratool.deltas.base import Delta, same_bits, scale_or_one
from loratool.deltas.lora import LoRA
from loratool.errors import ShapeMismatch
from loratool.numbers.linalg import Factors, Relation, difference_norm, relation, relations


def relate_deltas(one: Delta, other: Delta, *, angles: bool = True) -> Relation | None:
    """How two deltas are related, from their factors where that is less work than from their products; None where only the
    weight could tell."""
    if not (one.additive and other.additive):
        return None
    require_alike([one, other])
    if factors := _small_factors(one, other):
        return relation(*factors, angles=angles)
    return _dense(one.dense().double().flatten(), other.dense().double().flatten())


def relate_each(pairs: Sequence[tuple[Delta, Delta]]) -> list[Relation | None]:
    """`relate_deltas` of pairs whose deltas change weights of one shape, where their factors tell and are of one shape with
    those of other pairs: found together. None for all others."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    factors: dict[int, tuple[Factors, Factors]] = {}
    for number, (one, other) in enumerate(pairs):
        if not (one.additive and other.additive and _sides(one) == _sides(other)):
            continue
        if both := _small_factors(one, other):
            factors[number] = both
            groups.setdefault(tuple(factor.shape for pair in both for factor in pair), []).append(number)
    found: list[Relation | None] = [None] * len(pairs)
    for numbers in groups.values():
        together = relations(*([factors[number][side] for number in numbers] for side in (0, 1)))
        for number, each in zip(numbers, together, strict=True):
            found[number] = each
    return found


def _small_factors(one: Delta, other: Delta) -> tuple[Factors, Factors] | None:
    """The factors of two deltas on one weight, where both have them and Gram matrices of these are smaller than ΔW."""
    mine, theirs = factors_of(one), factors_of(other)
    if mine is None or theirs is None or mine[0].shape[1] + theirs[0].shape[1] > min(_sides(one)):
        return None
    return mine, theirs


def require_alike(deltas: Sequence[Delta]) -> None:
    """Raises `ShapeMismatch` unless all `deltas` change weights of one shape, whether or not their kernels are flattened."""
    shapes = {_sides(delta): delta.shape for delta in deltas}
    if len(shapes) > 1:
        shown = " and of ".join(str(list(shape)) for shape in shapes.values())
        raise ShapeMismatch(f"changes weights of {shown}: the adapters are for other models")


def _sides(delta: Delta) -> tuple[int, int]:
    """The rows and columns of a delta as a matrix, with its kernel flattened; a single number is one of one row."""
    return math.prod(delta.shape[:1]), math.prod(delta.shape[1:])


def factors_of(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Exact (up, down) of a delta; for a LoRA with the scale in float64, so that no small change is rounded away."""
    made = delta.materialise()
    if isinstance(made, LoRA) and made.mid is None:
        return made.up.flatten(1).double() * scale_or_one(made.scale), made.down.flatten(1)
    return made.factors()


def _dense(one: Tensor, other: Tensor) -> Relation:
    inner, difference = float(one @ other), float((one - other).norm())
    return Relation(float(one.norm()), float(other.norm()), inner, difference)


def norm_of(delta: Delta) -> float:
    """‖ΔW‖ of an additive delta."""
    found = relate_deltas(delta, delta, angles=False)
    # There is no result for deltas that depend on the weight, and this one is additive.
    assert found
    return found.one


def norm_and_distance(delta: Delta, other: Delta) -> tuple[float, float]:
    """‖ΔW‖ of an additive delta, and the distance of another from it, in float64: from factors where both have them."""
    factors, others = delta.factors(), other.factors()
    if factors and others:
        # ‖ΔW‖ is the distance to a delta of rank 0.
        up, down = factors
        return difference_norm(factors, (up[:, :0], down[:0])), difference_norm(factors, others)
    dense = delta.dense().double()
    return float(dense.norm()), float((dense - other.dense().double()).norm())


def same_bytes(one: Delta, other: Delta) -> bool:
    """Whether two deltas hold the same numbers, and the same scale."""
    mine, theirs = one.leaves(), other.leaves()
    return (
        mine.keys() == theirs.keys()
        and one.scale == other.scale
        and all(same_bits(mine[leaf], theirs[leaf]) for leaf in mine)
    )
