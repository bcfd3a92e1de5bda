"""What a plan adds to a tensor, in float64: hardly any machine's arithmetic leads to another number once it is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from loratool.files.header import TensorInfo
from loratool.files.tensors import DTYPES, tensor_bytes
from loratool.numbers.linalg import row_blocks
from loratool.numbers.rounding import adjacent_values
from loratool.verbs.merge.blocks import RowsJob, apply_terms, by_blocks
from loratool.verbs.merge.plan import TensorPlan
from loratool.verbs.merge.segments import Segment, matrix, segments_of

_BLOCK: Final = 1 << 19
"""Numbers that are computed at a time."""
PRODUCT: Final = 2.0**-22
"""What a product in float32 may be off by, relative to its result."""
_SUM: Final = 2.0**-24
"""What a sum in float32 is rounded by, relative to it."""


class PlannedChange:
    """What the terms of one tensor of a plan come to."""

    def __init__(self, tensor: TensorPlan) -> None:
        self.tensor = tensor
        self.columns = matrix(tensor.shape)[1]
        self.sums = all(term.delta.additive for term in tensor.terms) and tensor.shape == tensor.source.shape
        self._segments: tuple[Segment, ...] | None = None
        self._whole: Tensor | None = None

    def taken_from(self, merged: Tensor, start: int) -> Tensor:
        """What rows probably were before the plan made them `merged`, from `start` on, flattened: zeros in a tensor whose
        shape it changed, and `merged` itself where what was added depended on the weight."""
        dtype = DTYPES[self.tensor.source.dtype]
        if self.tensor.shape != self.tensor.source.shape:
            return torch.zeros(self.tensor.source.numel, dtype=dtype)
        if not self.sums:
            return merged.flatten().to(dtype)
        parts = [(part.double() - change).to(dtype) for part, change in self._blocks(merged, start)]
        return torch.cat(parts).flatten() if parts else merged.flatten().to(dtype)

    def doubtful(self, merged: Tensor, start: int, *, by_chance: bool = False) -> int:
        """Of a plan that takes away what was added: how many numbers in the rows `merged`, from `start` on, more than one
        number of their dtype may have led to, so that rounding may not find the right one again; `by_chance` says that they
        were rounded to either neighbour."""
        count = 0
        for part, change in self._blocks(merged, start):
            # All that rounds to a number lies between the middles to its neighbours, or between these themselves.
            reach = 1.0 if by_chance else 0.5
            stored, (below, above) = part.double(), (each.double() for each in adjacent_values(part))
            slack = PRODUCT * change.abs() + (_SUM * stored.abs() if part.element_size() < 4 else 0.0)
            lowest = stored + reach * (below - stored) + change - slack
            highest = stored + reach * (above - stored) + change + slack
            under, over = (each.double() for each in adjacent_values((stored + change).to(part.dtype)))
            count += int(((under >= lowest) | (over <= highest)).sum())
        return count

    def _blocks(self, merged: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows at a time, and what the merge added to them."""
        rows = merged.reshape(-1, self.columns)
        for first, last in row_blocks(len(rows), self.columns, _BLOCK):
            yield rows[first:last], self._change(start + first, last - first)

    def _change(self, start: int, count: int) -> Tensor:
        if not by_blocks(self.tensor):
            if self._whole is None:
                nothing = torch.zeros(self.tensor.shape, dtype=torch.float64)
                self._whole = apply_terms(self.tensor, nothing)[0].reshape(-1, self.columns)
            return self._whole[start : start + count]
        change = torch.zeros(count, self.columns, dtype=torch.float64)
        for segment in self._of_rows():
            first, last = max(start, segment.start), min(start + count, segment.stop)
            if first < last:
                cut = segment.cut(first, last)
                here = change[first - start : last - start]
                if cut.up is not None and cut.down is not None:
                    here.addmm_(cut.up.double(), cut.down.double())
                for whole in cut.whole:
                    here.add_(whole)
        return change

    def _of_rows(self) -> tuple[Segment, ...]:
        if self._segments is None:
            self._segments = segments_of(self.tensor, *matrix(self.tensor.shape), factored=True)
        return self._segments


def rows_of(job: RowsJob, info: TensorInfo) -> Tensor:
    """The rows of a job as the file it reads has them, in a tensor `info` of the shape that the plan makes."""
    columns = matrix(job.tensor.shape)[1]
    rows = torch.empty(job.stop - job.start, columns, dtype=DTYPES[info.dtype])
    job.source.read_into(tensor_bytes(rows), info.start + job.start * columns * rows.element_size())
    return rows if job.by_blocks else rows.reshape(job.tensor.shape)
