"""The terms on one tensor as sums over its rows: factors that share rows are stacked, and become one product."""

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
    """Rows `start` to `stop` of a tensor, all changed by the same sum: up · down, and differences stored whole."""

    start: int
    stop: int
    up: Tensor | None
    down: Tensor | None
    whole: tuple[Tensor, ...]

    def cut(self, first: int, last: int) -> Segment:
        """The same change to rows `first` to `last` alone."""
        rows = slice(first - self.start, last - self.start)
        up = None if self.up is None else self.up[rows]
        return Segment(first, last, up, self.down, tuple(difference[rows] for difference in self.whole))

    def on(self, device: torch.device) -> Segment:
        """The same on a device."""
        up, down = (None if factor is None else send(factor, device) for factor in (self.up, self.down))
        return replace(self, up=up, down=down, whole=tuple(send(difference, device) for difference in self.whole))

    def change(self, first: int, last: int, out: Tensor) -> Tensor:
        """ΔW of rows `first` to `last` in float32."""
        rows = slice(first - self.start, last - self.start)
        if self.up is not None and self.down is not None:
            torch.mm(self.up[rows], self.down, out=out)
        else:
            out.zero_()
        for difference in self.whole:
            out.add_(difference[rows])
        return out


def segments_of(tensor: TensorPlan, rows: int, columns: int, *, factored: bool = False) -> tuple[Segment, ...]:
    """Cuts the rows where terms begin and end, and stacks the factors of those that share a piece: one product each.

    With `factored`, factors stay what they are, however many.
    """
    pieces = [_as_stored(term, rows, columns, factored=factored) for term in tensor.terms]
    edges = sorted({edge for piece in pieces for edge in (piece.start, piece.stop)})
    segments = []
    for first, last in pairwise(edges):
        over = [piece.cut(first, last) for piece in pieces if piece.start <= first < piece.stop]
        if over:
            segments.append(_stack_segments(over, first, last))
    return tuple(segments)


def _stack_segments(pieces: list[Segment], first: int, last: int) -> Segment:
    ups = [piece.up for piece in pieces if piece.up is not None]
    downs = [piece.down for piece in pieces if piece.down is not None]
    up, down = (torch.cat(ups, dim=1), torch.cat(downs)) if ups else (None, None)
    return Segment(first, last, up, down, tuple(whole for piece in pieces for whole in piece.whole))


def _as_stored(term: Term, rows: int, columns: int, *, factored: bool) -> Segment:
    """One term, its strength inside, in the rows and columns that the weight is stored in."""
    start, stop = (0, rows) if term.transposed else (term.start, term.stop)
    factors = term.delta.factors()
    if factors is None or (4 * factors[0].shape[1] > min(rows, columns) > 64 and not factored):
        # Without factors, or with so many of them (LoHa's ranks multiply) that the product is dearer than its result.
        dense = term.delta.dense().mul_(term.strength)
        flat = dense.reshape(dense.shape[0], -1) if dense.ndim > 1 else dense.reshape(-1, columns)
        return Segment(start, stop, None, None, (flat.T if term.transposed else flat,))
    up, down = factors[0] * term.strength, factors[1]
    if term.transposed:
        up, down = down.T, up.T
    return Segment(start, stop, up.contiguous(), down.contiguous(), ())


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a weight as blocks see it; vectors are columns of one."""
    return (shape[0] if shape else 1), prod(shape[1:])
