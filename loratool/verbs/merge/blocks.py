"""The arithmetic of a merge, block by block: read some rows, add ΔW in float32, round once, write them where they were.

Memory is a few buffers per worker, whatever the size of the model. Blocks are always the same, and every sum is taken
in their order, so that a result depends neither on threads nor on time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from threading import Event
from typing import Final

import numpy as np
import torch
from torch import Tensor

from loratool.deltas.base import to_compute_dtype, to_device
from loratool.errors import NonFinite
from loratool.files.tensors import DTYPES, TensorFile, tensor_bytes
from loratool.files.writer import Writer
from loratool.numbers import rounding
from loratool.numbers.devices import CPU, send
from loratool.verbs.merge.plan import TensorPlan
from loratool.verbs.merge.segments import Segment, matrix, segments_of
from loratool.verbs.merge.terms import Term

BLOCK_BYTES: Final = 1 << 20
"""Stored bytes computed at a time: few enough to stay in cache, enough to make little of the cost of a call."""
TASK_BYTES: Final = 32 << 20
"""Stored bytes one worker takes at a time, and a GPU computes at a time."""
SAMPLE_EVERY: Final = 16
"""One block in so many is measured for the report,"""
ALWAYS_SAMPLED_BYTES: Final = 16 << 20
"""and all that begins within so many bytes of a file, so that small models are measured whole."""


@dataclass(slots=True)
class RoundingStats:
    """Sums over the blocks that were measured: ⟨stored change, ΔW⟩, ‖ΔW‖², elements, and those left as they were."""

    along: float = 0.0
    wanted: float = 0.0
    elements: int = 0
    unchanged: int = 0

    def add(self, other: RoundingStats) -> None:
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
            return out.copy_(rounding.round_stochastically(values, out.dtype, name, self.seed, index))
        return out.copy_(values)


@dataclass(slots=True)
class BufferPool:
    """One worker's buffers on `device`, and those of the host that numbers travel through where it is `staged`; grown to the
    largest block it has met."""

    device: torch.device = CPU
    staged: bool = False
    flat: dict[str, Tensor] = field(default_factory=dict)

    def take(self, use: str, dtype: torch.dtype, shape: Sequence[int], *, host: bool = False) -> Tensor:
        """A tensor of `shape` on the device, or the host, whose contents are left over from the last use."""
        count, key = prod(shape), f"{use} on the host" if host else use
        held = self.flat.get(key)
        if held is None or held.dtype != dtype or held.numel() < count:
            device, pinned = (CPU, self.device.type == "cuda") if host else (self.device, False)
            held = self.flat[key] = torch.empty(count, dtype=dtype, device=device, pin_memory=pinned)
        return held[:count].view(*shape)

    def send(self, use: str, values: Tensor) -> Tensor:
        """Host numbers on the device: the same tensor where nothing has to travel."""
        if not self.staged:
            return values
        return self.take(use, values.dtype, values.shape).copy_(values, non_blocking=True)

    def fetch(self, use: str, values: Tensor) -> Tensor:
        """The device's numbers on the host, once they have arrived."""
        if not self.staged:
            return values
        here = self.take(use, values.dtype, values.shape, host=True).copy_(values, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return here


@dataclass(frozen=True, slots=True)
class RowsJob:
    """Some rows of one tensor, for one worker: source and target files, and where the output's bytes begin there."""

    tensor: TensorPlan
    source: TensorFile
    target: Writer
    offset: int
    segments: tuple[Segment, ...]
    start: int
    stop: int
    by_blocks: bool = True

    @property
    def row_bytes(self) -> int:
        return self.tensor.nbytes // max(matrix(self.tensor.shape)[0], 1)

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.row_bytes


def jobs_of(tensor: TensorPlan, source: TensorFile, target: Writer, offset: int) -> Iterator[RowsJob]:
    """The work on one tensor: in pieces of about `TASK_BYTES` where it is computed by blocks, else all of it at once."""
    rows, columns = matrix(tensor.shape)
    if not by_blocks(tensor):
        yield RowsJob(tensor, source, target, offset, (), 0, rows, by_blocks=False)
        return
    segments = segments_of(tensor, rows, columns)
    step = max(1, TASK_BYTES // max(tensor.nbytes // max(rows, 1), 1))
    # A whole number of blocks, so that blocks do not depend on how work is shared out.
    block = _block_rows(tensor)
    step = -(-step // block) * block
    for start in range(0, rows, step):
        yield RowsJob(tensor, source, target, offset, segments, start, min(start + step, rows))


def by_blocks(tensor: TensorPlan) -> bool:
    """Whether all terms of a tensor are sums that rows can be cut from; otherwise it is changed whole."""
    if tensor.shape != tensor.source.shape or tensor.source.dtype == "F64":
        return False
    return all(
        term.delta.additive and term.step == 1 and (not term.transposed or _spans(term, tensor)) for term in tensor.terms
    )


def run_job(job: RowsJob, rounded: Rounding, scratch: BufferPool, stopped: Event) -> RoundingStats:
    """Computes and writes a job's blocks; raises `NonFinite` where a result is no number the output can hold."""
    measure = RoundingStats()
    # A GPU takes all rows at once, and measures all of them: to it that is nothing.
    block = job.stop - job.start if scratch.staged else _block_rows(job.tensor)
    segments = tuple(segment.on(scratch.device) for segment in job.segments)
    for first in range(job.start, job.stop, block):
        if stopped.is_set():
            break
        measured = _run_block(job, segments, slice(first, min(first + block, job.stop)), rounded, scratch)
        measure.add(measured)
    job.target.start_writeback(job.offset + job.start * job.row_bytes, job.nbytes)
    return measure


def write_whole_tensor(job: RowsJob, rounded: Rounding, device: torch.device = CPU) -> RoundingStats:
    """Changes a tensor that cannot be cut: each term sees the base's own weight, and all their changes are added."""
    tensor = job.tensor
    stored = job.source.read(tensor.source)
    if stored.dtype == torch.float64:
        device = CPU  # not every device has it, and few weights are stored so
    on_device = replace(tensor, terms=tuple(replace(term, delta=to_device(term.delta, device)) for term in tensor.terms))
    result, base = apply_terms(on_device, to_compute_dtype(send(stored, device)))
    narrow = rounded(result, torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=device), tensor.name, 0)
    if not bool(narrow.float().isfinite().all()):
        raise NonFinite(_overflow_message(tensor, result))
    job.target.write(tensor_bytes(narrow.contiguous().cpu()), job.offset)
    wanted, got = (result - base).flatten().double(), (to_compute_dtype(narrow) - base).flatten().double()
    return RoundingStats(float(got @ wanted), float(wanted @ wanted), got.numel(), int((got == 0).sum()))


def apply_terms(tensor: TensorPlan, base: Tensor) -> tuple[Tensor, Tensor]:
    """What the terms of a tensor make of its widened `base`, before it is rounded; and the base in the result's shape."""
    result = base.clone()
    for term in sorted(tensor.terms, key=lambda term: term.delta.additive):
        if tensor.shape != base.shape:
            # Only the term that says so knows what the weight was; the others come after it, and see its shape.
            result = term.delta.apply(base, term.strength)
            base = _pad_shape(base, tensor.shape)
        else:
            _apply(term, base, result)
    return result, base


def _run_block(
    job: RowsJob, segments: tuple[Segment, ...], rows: slice, rounded: Rounding, scratch: BufferPool
) -> RoundingStats:
    tensor, columns = job.tensor, matrix(job.tensor.shape)[1]
    shape, index = (rows.stop - rows.start, columns), rows.start * columns
    source_dtype, dtype = DTYPES[tensor.source.dtype], DTYPES[tensor.dtype]
    raw = scratch.take("raw", source_dtype, shape, host=scratch.staged)
    job.source.read_into(tensor_bytes(raw), tensor.source.start + index * source_dtype.itemsize)
    before = scratch.send("raw", raw)
    wide = scratch.take("wide", torch.float32, shape).copy_(before)
    sampled = bool(tensor.terms) and (scratch.staged or _is_sampled(tensor, rows.start))
    change = _add_segments(segments, rows, wide, scratch, keep=sampled)
    narrow = rounded(wide, scratch.take("narrow", dtype, shape), tensor.name, index)
    _check_range(tensor, wide, dtype)
    job.target.write(tensor_bytes(scratch.fetch("narrow", narrow)), job.offset + index * dtype.itemsize)
    return _measure_rows(before, change, narrow, scratch) if sampled else RoundingStats()


def _add_segments(segments: tuple[Segment, ...], rows: slice, wide: Tensor, scratch: BufferPool, *, keep: bool) -> Tensor:
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


def _measure_rows(before: Tensor, change: Tensor, narrow: Tensor, scratch: BufferPool) -> RoundingStats:
    stored = scratch.take("stored", torch.float32, narrow.shape).copy_(narrow)
    # torch has no arithmetic on numbers of 8 bits.
    got, wanted = stored.sub_(before.float() if before.element_size() == 1 else before).flatten(), change.flatten()
    # numpy's is the faster one on a CPU.
    changed = np.count_nonzero(got.numpy()) if got.device == CPU else torch.count_nonzero(got)
    return RoundingStats(_dot(got, wanted), _dot(wanted, wanted), got.numel(), got.numel() - int(changed))


def _dot(one: Tensor, other: Tensor) -> float:
    if one.device != CPU:
        return float(torch.dot(one, other))
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(one.numpy(), other.numpy()))


def _check_range(tensor: TensorPlan, wide: Tensor, dtype: torch.dtype) -> None:
    """Whether every result fits the output's dtype. One dot product shows it nearly always: no square exceeds the sum."""
    values, limit = wide.flatten(), rounding.max_finite(dtype)
    total = _dot(values, values)
    if total < limit * limit and total < float("inf"):
        return
    if bool((wide.abs() <= limit).all()):
        return
    if tensor.terms or dtype.itemsize < DTYPES[tensor.source.dtype].itemsize:
        raise NonFinite(_overflow_message(tensor, wide))


def _overflow_message(tensor: TensorPlan, result: Tensor) -> str:
    finite = result.isfinite()
    beyond = int((finite & (result.abs() > rounding.max_finite(DTYPES[tensor.dtype]))).sum())
    bad = int((~finite).sum())
    if bad:
        return f"{tensor.name}: {bad} values of the result are NaN or Inf, which the base holds or a ΔW comes to"
    return f"{tensor.name}: {beyond} values of the result overflow {tensor.dtype}; choose `dtype='float32'` or bfloat16"


def _apply(term: Term, base: Tensor, result: Tensor) -> None:
    """Adds to `result` what one term changes of `base`; rows that nothing changed yet become just what it makes of them."""
    rows = slice(term.start, term.stop, term.step)
    before, after = (base.T[rows], result.T[rows]) if term.transposed else (base[rows], result[rows])
    changed = term.delta.apply(before, term.strength)
    after.copy_(changed if torch.equal(after, before) else after + (changed - before))


def _pad_shape(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
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
