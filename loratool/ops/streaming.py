"""The arithmetic of a merge, block by block: read some rows, add ΔW in float32, round once, write them where they were.

Memory is a few buffers per worker, whatever the size of the model. Blocks are always the same, and every sum is taken
in their order, so that a result depends neither on threads nor on time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from threading import Event
from typing import Final

import numpy as np
import torch
from torch import Tensor

from loratool import rounding
from loratool.checkpoint import DTYPES, TensorFile, tensor_bytes
from loratool.deltas.base import widened
from loratool.errors import NonFinite
from loratool.ops.plan import TensorPlan
from loratool.ops.segments import Segment, matrix, segments_of
from loratool.ops.terms import Term
from loratool.output import Writer

BLOCK_BYTES: Final = 1 << 20
"""Stored bytes computed at a time: few enough to stay in cache, enough to make little of the cost of a call."""
TASK_BYTES: Final = 32 << 20
"""Stored bytes one worker takes at a time."""
SAMPLE_EVERY: Final = 16
"""One block in so many is measured for the report,"""
ALWAYS_SAMPLED_BYTES: Final = 16 << 20
"""and all that begins within so many bytes of a file, so that small models are measured whole."""


@dataclass(slots=True)
class Measure:
    """Sums over the blocks that were measured: ⟨stored change, ΔW⟩, ‖ΔW‖², elements, and those left as they were."""

    along: float = 0.0
    wanted: float = 0.0
    elements: int = 0
    unchanged: int = 0

    def add(self, other: Measure) -> None:
        self.along += other.along
        self.wanted += other.wanted
        self.elements += other.elements
        self.unchanged += other.unchanged


@dataclass(frozen=True, slots=True)
class Rounding:
    """How results become stored numbers: to nearest, or by chance with a seed."""

    stochastic: bool = False
    seed: int = 0

    def __call__(self, values: Tensor, out: Tensor, name: str, index: int) -> Tensor:
        """Rounds `values`, elements `index` on of the tensor `name`, into `out`."""
        if self.stochastic:
            return out.copy_(rounding.stochastic(values, out.dtype, name, self.seed, index))
        return out.copy_(values)


@dataclass(slots=True)
class Scratch:
    """One worker's buffers, grown to the largest block it has met."""

    flat: dict[str, Tensor] = field(default_factory=dict)

    def take(self, use: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A tensor of `shape` whose contents are left over from the last use."""
        count = prod(shape)
        held = self.flat.get(use)
        if held is None or held.dtype != dtype or held.numel() < count:
            held = self.flat[use] = torch.empty(count, dtype=dtype)
        return held[:count].view(*shape)


@dataclass(frozen=True, slots=True)
class Job:
    """Some rows of one tensor, for one worker: source and target files, and where the output's bytes begin there."""

    tensor: TensorPlan
    source: TensorFile
    target: Writer
    offset: int
    segments: tuple[Segment, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        return self.tensor.nbytes // max(matrix(self.tensor.shape)[0], 1)

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.row_bytes


def jobs_of(tensor: TensorPlan, source: TensorFile, target: Writer, offset: int) -> Iterator[Job]:
    """The work on one tensor that is computed by blocks, in pieces of about `TASK_BYTES`."""
    rows, columns = matrix(tensor.shape)
    segments = segments_of(tensor, rows, columns)
    step = max(1, TASK_BYTES // max(tensor.nbytes // max(rows, 1), 1))
    # A whole number of blocks, so that blocks do not depend on how work is shared out.
    block = _block_rows(tensor)
    step = -(-step // block) * block
    for start in range(0, rows, step):
        yield Job(tensor, source, target, offset, segments, start, min(start + step, rows))


def by_blocks(tensor: TensorPlan) -> bool:
    """Whether all terms of a tensor are sums that rows can be cut from; otherwise it is changed whole."""
    if tensor.shape != tensor.source.shape or tensor.source.dtype == "F64":
        return False
    return all(
        term.delta.additive and term.step == 1 and (not term.transposed or _spans(term, tensor)) for term in tensor.terms
    )


def run_job(job: Job, rounded: Rounding, scratch: Scratch, stopped: Event) -> Measure:
    """Computes and writes a job's blocks; raises `NonFinite` where a result is no number the output can hold."""
    measure = Measure()
    block = _block_rows(job.tensor)
    for first in range(job.start, job.stop, block):
        if stopped.is_set():
            break
        measured = _run_block(job, slice(first, min(first + block, job.stop)), rounded, scratch)
        measure.add(measured)
    job.target.start_writeback(job.offset + job.start * job.row_bytes, job.nbytes)
    return measure


def change_whole(tensor: TensorPlan, source: TensorFile, target: Writer, offset: int, rounded: Rounding) -> Measure:
    """Changes a tensor that cannot be cut: each term sees the base's own weight, and all their changes are added."""
    result, base = changed_whole(tensor, widened(source.read(tensor.source)))
    narrow = rounded(result, torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]), tensor.name, 0)
    if not bool(narrow.float().isfinite().all()):
        raise NonFinite(_lost(tensor, result))
    target.write(tensor_bytes(narrow.contiguous()), offset)
    wanted, got = (result - base).flatten().double(), (widened(narrow) - base).flatten().double()
    return Measure(float(got @ wanted), float(wanted @ wanted), got.numel(), int((got == 0).sum()))


def changed_whole(tensor: TensorPlan, base: Tensor) -> tuple[Tensor, Tensor]:
    """What the terms of a tensor make of its widened `base`, before it is rounded; and the base in the result's shape."""
    result = base.clone()
    for term in sorted(tensor.terms, key=lambda term: term.delta.additive):
        if tensor.shape != base.shape:
            # Only the term that says so knows what the weight was; the others come after it, and see its shape.
            result = term.delta.apply(base, term.strength)
            base = _padded(base, tensor.shape)
        else:
            _apply(term, base, result)
    return result, base


def _run_block(job: Job, rows: slice, rounded: Rounding, scratch: Scratch) -> Measure:
    tensor, columns = job.tensor, matrix(job.tensor.shape)[1]
    shape, index = (rows.stop - rows.start, columns), rows.start * columns
    source_dtype, dtype = DTYPES[tensor.source.dtype], DTYPES[tensor.dtype]
    raw = scratch.take("raw", source_dtype, shape)
    job.source.read_into(tensor_bytes(raw), tensor.source.start + index * source_dtype.itemsize)
    wide = scratch.take("wide", torch.float32, shape).copy_(raw)
    sampled = bool(tensor.terms) and _is_sampled(tensor, rows.start)
    change = _add_segments(job.segments, rows, wide, scratch, keep=sampled)
    narrow = rounded(wide, scratch.take("narrow", dtype, shape), tensor.name, index)
    _check_range(tensor, wide, dtype)
    job.target.write(tensor_bytes(narrow), job.offset + index * dtype.itemsize)
    return _measured(raw, change, narrow, scratch) if sampled else Measure()


def _add_segments(segments: tuple[Segment, ...], rows: slice, wide: Tensor, scratch: Scratch, *, keep: bool) -> Tensor:
    """Adds to `wide`, which holds `rows`, what the segments over them say; returns the sum of it where it is to be kept."""
    total = scratch.take("change", torch.float32, wide.shape)
    if keep:
        total.zero_()
    for segment in segments:
        start, stop = max(rows.start, segment.start), min(rows.stop, segment.stop)
        if start >= stop:
            continue
        here = slice(start - rows.start, stop - rows.start)
        if keep or segment.whole or segment.up is None or segment.down is None:
            wide[here].add_(segment.change(start, stop, total[here]))
        else:
            torch.addmm(wide[here], segment.up[start - segment.start : stop - segment.start], segment.down, out=wide[here])
    return total


def _measured(before: Tensor, change: Tensor, narrow: Tensor, scratch: Scratch) -> Measure:
    stored = scratch.take("stored", torch.float32, narrow.shape).copy_(narrow)
    got = stored.sub_(before).flatten().numpy()
    wanted = change.flatten().numpy()
    kept = got.size - int(np.count_nonzero(got))
    return Measure(float(np.dot(got, wanted)), float(np.dot(wanted, wanted)), got.size, kept)


def _check_range(tensor: TensorPlan, wide: Tensor, dtype: torch.dtype) -> None:
    """Whether every result fits the output's dtype. One dot product shows it nearly always: no square exceeds the sum."""
    values = wide.flatten().numpy()
    limit = rounding.largest(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(np.dot(values, values))
    if total < limit * limit and total < float("inf"):
        return
    if bool((wide.abs() <= limit).all()):
        return
    if tensor.terms or dtype.itemsize < DTYPES[tensor.source.dtype].itemsize:
        raise NonFinite(_lost(tensor, wide))


def _lost(tensor: TensorPlan, result: Tensor) -> str:
    finite = result.isfinite()
    beyond = int((finite & (result.abs() > rounding.largest(DTYPES[tensor.dtype]))).sum())
    bad = int((~finite).sum())
    if bad:
        return f"{tensor.name}: {bad} values of the result are NaN or Inf; the base itself holds them"
    return f"{tensor.name}: {beyond} values of the result overflow {tensor.dtype}; choose --dtype float32 or bfloat16"


def _apply(term: Term, base: Tensor, result: Tensor) -> None:
    """Adds to `result` what one term changes of `base`; rows that nothing changed yet become just what it makes of them."""
    rows = slice(term.start, term.stop, term.step)
    before, after = (base.T[rows], result.T[rows]) if term.transposed else (base[rows], result[rows])
    changed = term.delta.apply(before, term.strength)
    after.copy_(changed if torch.equal(after, before) else after + (changed - before))


def _padded(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A weight with zeros for what it lacks of `shape`, cut where it exceeds it."""
    padded = weight.new_zeros(shape)
    common = tuple(slice(min(old, new)) for old, new in zip(weight.shape, shape, strict=True))
    padded[common] = weight[common]
    return padded


def _block_rows(tensor: TensorPlan) -> int:
    columns = matrix(tensor.shape)[1]
    return max(1, BLOCK_BYTES // max(columns * DTYPES[tensor.source.dtype].itemsize, 1))


def _is_sampled(tensor: TensorPlan, row: int) -> bool:
    """Chosen by where the block lies in its file: the same in every run, and spread over large and small tensors alike."""
    return (
        tensor.source.start < ALWAYS_SAMPLED_BYTES
        or (tensor.source.start // BLOCK_BYTES + row // _block_rows(tensor)) % SAMPLE_EVERY == 0
    )


def _spans(term: Term, tensor: TensorPlan) -> bool:
    return len(tensor.shape) == 2 and term.start == 0 and term.stop == tensor.shape[1]
