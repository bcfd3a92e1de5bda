"""The terms on one tensor as sums over its rows: the factors of terms that share rows are stacked into one product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from loratool.numbers.devices import send
from loratool.verbs.merge.plan import TensorPlan
from loratool.verbs.merge.terms import Term


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start` to `stop` of a tensor, all changed by the same sum: up · down, plus the differences in `whole`."""

    start: int
    stop: int
    up: Tensor | None
    down: Tensor | None
    whole: tuple[Tensor, ...]

    def cut(self, first: int, last: int) -> Segment:
        """The part of this segment on rows `first` to `last`."""
        rows = slice(first - self.start, last - self.start)
        up = None if self.up is None else self.up[rows]
        return Segment(first, last, up, self.down, tuple(difference[rows] for difference in self.whole))

    def on(self, device: torch.device) -> Segment:
        """This segment with its tensors on `device`."""
        up, down = (None if factor is None else send(factor, device) for factor in (self.up, self.down))
        return replace(self, up=up, down=down, whole=tuple(send(difference, device) for difference in self.whole))

    def change(self, first: int, last: int, out: Tensor) -> Tensor:
        """ΔW of rows `first` to `last`, written to `out` in float32."""
        rows = slice(first - self.start, last - self.start)
        if self.up is not None and self.down is not None:
            torch.mm(self.up[rows], self.down, out=out)
        else:
            out.zero_()
        for difference in self.whole:
            out.add_(difference[rows])
        return out


def segments_of(tensor: TensorPlan, rows: int, columns: int, *, factored: bool = False) -> tuple[Segment, ...]:
    """Cuts a tensor's rows where terms begin and end, and stacks the factors of the terms on each piece into one product.

    With `factored`, terms that have factors are never multiplied out, whatever their rank.
    """
    pieces = [
        _as_stored(term, rows, columns, factored=factored) if term.expert is None else _expert_row(term, tensor.shape)
        for term in tensor.terms
    ]
    edges = sorted({edge for piece in pieces for edge in (piece.start, piece.stop)})
    segments = []
    for first, last in pairwise(edges):
        # A term begins and ends at edges, so it covers a piece wholly or not at all.
        over = [piece.cut(first, last) for piece in pieces if piece.start <= first < piece.stop]
        if over:
            segments.append(_stack_segments(over, first, last))
    return tuple(segments)


def _stack_segments(pieces: list[Segment], first: int, last: int) -> Segment:
    """One segment of all that change the same rows."""
    # [U₁ U₂] · [D₁; D₂] = U₁ D₁ + U₂ D₂: one product instead of a sum of several.
    ups = [piece.up for piece in pieces if piece.up is not None]
    downs = [piece.down for piece in pieces if piece.down is not None]
    up, down = (torch.cat(ups, dim=1), torch.cat(downs)) if ups else (None, None)
    return Segment(first, last, up, down, tuple(whole for piece in pieces for whole in piece.whole))


def _as_stored(term: Term, rows: int, columns: int, *, factored: bool) -> Segment:
    """One term as a segment, with its strength inside, in the rows and columns that the weight is stored in."""
    start, stop = (0, rows) if term.transposed else (term.start, term.stop)
    factors = term.delta.factors()
    if factors is None or (4 * factors[0].shape[1] > min(rows, columns) > 64 and not factored):
        # Without factors, or of so high a rank (LoHa's ranks multiply) that a product for each block costs more than ΔW
        # once. Kernels are flattened, as blocks see them.
        dense = term.delta.dense().mul_(term.strength)
        flat = dense.reshape(dense.shape[0], -1) if dense.ndim > 1 else dense.reshape(-1, columns)
        return Segment(start, stop, None, None, (flat.T if term.transposed else flat,))
    # Strength goes into one factor in float32, before the product. A weight stored as (in, out) takes (U D)ᵀ = Dᵀ Uᵀ.
    up, down = factors[0] * term.strength, factors[1]
    if term.transposed:
        up, down = down.T, up.T
    return Segment(start, stop, up.contiguous(), down.contiguous(), ())


def _expert_row(term: Term, shape: tuple[int, ...]) -> Segment:
    """A term on one expert of a stack of `shape`, as the row that the expert is to blocks: zeros around its part."""
    assert term.expert is not None
    row = torch.zeros(1, *shape[1:])
    replace(term, expert=0).part_of(row).copy_(term.delta.dense().mul_(term.strength))
    return Segment(term.expert, term.expert + 1, None, None, (row.flatten(1),))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a weight as blocks see it: kernels are flattened, a vector has one column, a number one row."""
    return (shape[0] if shape else 1), prod(shape[1:])
