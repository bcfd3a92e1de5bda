"""What a plan adds to a tensor, in float64: once it is rounded, hardly any machine's arithmetic gives another number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from loratool.files.header import TensorInfo
from loratool.files.tensors import DTYPES, tensor_bytes
from loratool.numbers.devices import CPU, send
from loratool.numbers.linalg import row_blocks
from loratool.numbers.rounding import adjacent_values
from loratool.verbs.merge.blocks import RowsJob, apply_terms, by_blocks
from loratool.verbs.merge.plan import TensorPlan
from loratool.verbs.merge.segments import Segment, matrix_shape, segments_of

_BLOCK: Final = 1 << 17
"""Numbers computed at a time: 1 MiB of float64, a dozen of which a cache holds."""
_BLOCK_THERE: Final = 1 << 21
"""Numbers that a GPU computes at a time, for which it needs some 15 times their 8 bytes."""
PRODUCT: Final = 2.0**-22
"""The relative error that a float32 product is given credit for: four times that of a single rounding."""
_SUM: Final = 2.0**-24
"""The largest relative error of rounding a sum to float32."""


class PlannedChange:
    """The change that the terms of one tensor of a plan add up to, computed in float64 when it is asked for."""

    def __init__(self, tensor: TensorPlan) -> None:
        self.tensor = tensor
        self.columns = matrix_shape(tensor.shape)[1]
        self.sums = all(term.delta.additive for term in tensor.terms) and tensor.shape == tensor.source.shape
        self._segments: tuple[Segment, ...] | None = None
        self._whole: Tensor | None = None

    def taken_from(self, merged: Tensor, start: int) -> Tensor:
        """A guess, flattened, at the base's rows that the plan changed to `merged`, which begin at row `start`.

        Zeros for a tensor whose shape the plan changed, `merged` itself where the change depended on the weight.
        """
        # The undo file keeps residuals to this guess: a bad guess makes it larger, never wrong.
        dtype = DTYPES[self.tensor.source.dtype]
        if self.tensor.shape != self.tensor.source.shape:
            return torch.zeros(self.tensor.source.numel, dtype=dtype)
        if not self.sums:
            return merged.flatten().to(dtype)
        parts = [(part.double() - change).to(dtype) for part, change in self._blocks(merged, start)]
        return torch.cat(parts).flatten() if parts else merged.flatten().to(dtype)

    def doubtful(self, merged: Tensor, start: int, *, by_chance: bool = False, device: torch.device = CPU) -> int:
        """How many numbers of the rows `merged`, from row `start` on, a plan that subtracts may restore wrongly; found on
        `device`.

        Those are the numbers that more than one number of their dtype may have been merged to. `by_chance` says that the
        merge rounded to either neighbour.
        """
        count = 0
        for part, change in self._blocks(merged, start, device):
            # Before it was rounded, a merged number lay between the middles to its neighbours, or between the neighbours
            # where the merge rounded by chance. `change` is what the plan adds: −ΔW.
            reach = 1.0 if by_chance else 0.5
            stored = part.double()
            # ΔW was a float32 product. A narrow dtype has the sum rounded twice, to float32 and then to the dtype.
            slack = change.abs().mul_(PRODUCT)
            if part.element_size() < 4:
                slack.add_(stored.abs().mul_(_SUM))
            restored = (stored + change).to(part.dtype)
            # Doubtful where a neighbour of the number that subtraction finds may be the base's just as well. Sums are taken
            # in place: a dozen arrays of float64 would not stay in cache.
            lowest, highest = (
                beside.double().sub_(stored).mul_(reach).add_(stored).add_(change) for beside in adjacent_values(part)
            )
            under, over = adjacent_values(restored)
            doubt = under.double().ge(lowest.sub_(slack)).logical_or_(over.double().le(highest.add_(slack)))
            count += int(torch.count_nonzero(doubt))
        return count

    def _blocks(self, merged: Tensor, start: int, device: torch.device = CPU) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows of `merged` at a time, and the plan's change of them, on `device`."""
        rows = merged.reshape(merged.numel() // max(self.columns, 1), self.columns)
        for first, last in row_blocks(len(rows), self.columns, _BLOCK if device == CPU else _BLOCK_THERE):
            yield send(rows[first:last], device), self._change(start + first, last - first, device)

    def _change(self, start: int, count: int, device: torch.device) -> Tensor:
        """The plan's change of `count` rows from `start` on, in float64 on `device`."""
        # Only sums get here, and a sum adds the same to zeros as to the weight.
        if not by_blocks(self.tensor):
            if self._whole is None:
                nothing = torch.zeros(self.tensor.shape, dtype=torch.float64)
                self._whole = apply_terms(self.tensor, nothing)[0].reshape(-1, self.columns)
            return send(self._whole[start : start + count], device)
        change = torch.zeros(count, self.columns, dtype=torch.float64, device=device)
        for segment in self._of_rows():
            first, last = max(start, segment.start), min(start + count, segment.stop)
            if first < last:
                cut = segment.cut(first, last).on(device)
                here = change[first - start : last - start]
                if cut.up is not None and cut.down is not None:
                    here.addmm_(cut.up.double(), cut.down.double())
                for whole in cut.whole:
                    here.add_(whole)
        return change

    def _of_rows(self) -> tuple[Segment, ...]:
        """The tensor's segments, with factors that are not multiplied out, since that product would be in float32."""
        if self._segments is None:
            self._segments = segments_of(self.tensor, *matrix_shape(self.tensor.shape), factored=True)
        return self._segments


def rows_of(job: RowsJob, info: TensorInfo) -> Tensor:
    """The rows of a job, read from the job's source, where the tensor `info` has the shape that the plan makes."""
    columns = matrix_shape(job.tensor.shape)[1]
    rows = torch.empty(job.stop - job.start, columns, dtype=DTYPES[info.dtype])
    job.source.read_into(tensor_bytes(rows), info.start + job.start * columns * rows.element_size())
    return rows if job.by_blocks else rows.reshape(job.tensor.shape)
