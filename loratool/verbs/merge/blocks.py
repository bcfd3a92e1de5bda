"""The arithmetic of a merge, block by block: read some rows, add ΔW in float32, round once, write them where they were.

Memory is a few buffers per worker, whatever the size of the model. A tensor is always cut into the same blocks, and sums
over blocks are taken in block order, so that a result depends neither on threads nor on time.
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
from loratool.numbers.devices import CPU, pins_memory, send
from loratool.numbers.linalg import bounds
from loratool.verbs.merge.plan import TensorPlan
from loratool.verbs.merge.segments import Segment, matrix_shape, segments_of
from loratool.verbs.merge.terms import Term

BLOCK_BYTES: Final = 1 << 20
"""Stored bytes in a block: few enough to stay in cache, enough to make little of the cost of a call."""
TASK_BYTES: Final = 32 << 20
"""Stored bytes in a job, which one worker takes at a time and a GPU computes in one go."""
PIECE_BYTES: Final = 4 << 20
"""Stored bytes in a piece of a job: a GPU whose memory does not hold what a job takes is given fewer pieces at once."""
SAMPLE_EVERY: Final = 16
"""One block in 16 is measured for the report: measuring them all would slow a merge on the CPU."""
ALWAYS_SAMPLED_BYTES: Final = 16 << 20
"""Tensors that begin within these first bytes of a file are measured whole, and so are small models."""


@dataclass(slots=True)
class RoundingStats:
    """Sums over the measured blocks: ⟨stored change, ΔW⟩, ‖ΔW‖², the elements, and the elements that rounding left
    unchanged."""

    along: float = 0.0
    wanted: float = 0.0
    elements: int = 0
    unchanged: int = 0

    def add(self, other: RoundingStats) -> None:
        """Adds the sums of other blocks to these."""
        self.along += other.along
        self.wanted += other.wanted
        self.elements += other.elements
        self.unchanged += other.unchanged


@dataclass(frozen=True, slots=True)
class Rounding:
    """The rounding of results to a stored dtype: to nearest, or stochastic with a seed."""

    stochastic: bool = False
    seed: int = 0

    def __call__(self, values: Tensor, out: Tensor, name: str, index: int) -> Tensor:
        """Rounds `values`, the elements of the tensor `name` from `index` on, into `out`."""
        if self.stochastic:
            return out.copy_(rounding.round_stochastically(values, out.dtype, name, self.seed, index))
        return out.copy_(values)


@dataclass(slots=True)
class BufferPool:
    """One worker's buffers on `device`, and where `staged` the host's buffers on the way to and from the device.

    A buffer grows to the largest block so far, and is reused for every later block.
    """

    device: torch.device = CPU
    staged: bool = False
    flat: dict[str, Tensor] = field(default_factory=dict)

    def take(self, use: str, dtype: torch.dtype, shape: Sequence[int], *, host: bool = False) -> Tensor:
        """A tensor of `shape` on the device, or on the `host`, that holds whatever the last use left in the buffer."""
        count, key = prod(shape), f"{use} on the host" if host else use
        held = self.flat.get(key)
        if held is None or held.dtype != dtype or held.numel() < count:
            # CUDA copies asynchronously only from and to page-locked memory; without CUDA, torch refuses to lock pages.
            device, pinned = (CPU, pins_memory(self.device)) if host else (self.device, False)
            held = self.flat[key] = torch.empty(count, dtype=dtype, device=device, pin_memory=pinned)
        return held[:count].view(*shape)

    def send(self, use: str, values: Tensor) -> Tensor:
        """Copies host numbers to the device; returns `values` itself where nothing is staged."""
        if not self.staged:
            return values
        # The source may be overwritten only once this copy is done: `fetch` waits for the stream before a block ends.
        return self.take(use, values.dtype, values.shape).copy_(values, non_blocking=True)

    def fetch(self, use: str, values: Tensor) -> Tensor:
        """Copies the device's numbers to the host and waits for them; returns `values` itself where nothing is staged."""
        if not self.staged:
            return values
        here = self.take(use, values.dtype, values.shape, host=True).copy_(values, non_blocking=self.device.type == "cuda")
        # A copy that does not block returns before the numbers are there, and they are written to the file next.
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return here


@dataclass(frozen=True, slots=True)
class RowsJob:
    """Rows `start` to `stop` of one tensor, for one worker: the source and target files, and `offset`, where the tensor
    begins in the target.

    Without `by_blocks` the rows are all of them, and the tensor is changed whole. `segments` are those of all the tensor's
    jobs.
    """

    tensor: TensorPlan
    source: TensorFile
    target: Writer
    offset: int
    segments: tuple[Segment, ...]
    start: int
    stop: int
    by_blocks: bool = True

    def pieces(self) -> list[RowsJob]:
        """The job in pieces of whole blocks, which a device with little memory computes one by one."""
        step = _block_rows(self.tensor) * max(1, PIECE_BYTES // BLOCK_BYTES)
        if not self.by_blocks or self.stop - self.start <= step:
            return [self]
        return [
            replace(self, start=start, stop=min(start + step, self.stop)) for start in range(self.start, self.stop, step)
        ]

    @property
    def row_bytes(self) -> int:
        return self.tensor.nbytes // max(matrix_shape(self.tensor.shape)[0], 1)

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.row_bytes


def jobs_of(tensor: TensorPlan, source: TensorFile, target: Writer, offset: int) -> Iterator[RowsJob]:
    """The jobs of one tensor: pieces of about `TASK_BYTES` where the tensor is computed by blocks, else one job."""
    rows, columns = matrix_shape(tensor.shape)
    if not by_blocks(tensor):
        yield RowsJob(tensor, source, target, offset, (), 0, rows, by_blocks=False)
        return
    segments = segments_of(tensor, rows, columns)
    step = max(1, TASK_BYTES // max(tensor.nbytes // max(rows, 1), 1))
    # A job is a whole number of blocks, so that the blocks do not depend on how the work is shared out.
    block = _block_rows(tensor)
    step = -(-step // block) * block
    for start in range(0, rows, step):
        yield RowsJob(tensor, source, target, offset, segments, start, min(start + step, rows))


def by_blocks(tensor: TensorPlan) -> bool:
    """Whether all terms of a tensor are sums that rows can be cut from; otherwise the tensor is changed whole."""
    # Blocks keep the stored shape, and compute in float32, where float64 weights would lose digits.
    if tensor.shape != tensor.source.shape or tensor.source.dtype == "F64":
        return False
    # Segments are runs of whole stored rows. A kind that depends on the weight may need all of it (DoRA's norms), Meta's
    # Llama interleaves the rows of a head's two halves (step 2), and a transposed weight has outputs as its columns.
    # A change of one expert is laid out as that expert's whole row.
    return all(
        term.delta.additive
        and (term.expert is not None or (term.step == 1 and (not term.transposed or _spans(term, tensor))))
        for term in tensor.terms
    )


def run_job(
    job: RowsJob, segments: tuple[Segment, ...], rounded: Rounding, scratch: BufferPool, stopped: Event
) -> RoundingStats:
    """Computes and writes a job's blocks from `segments`, the job's own on the device of `scratch`; raises `NonFinite` where
    the output's dtype cannot hold a result."""
    measure = RoundingStats()
    # A GPU takes a whole job as one block and measures all of it: the cost there is too small to sample.
    block = job.stop - job.start if scratch.staged else _block_rows(job.tensor)
    for first in range(job.start, job.stop, block):
        # Another worker failed, or the run was interrupted: what is still written would be thrown away.
        if stopped.is_set():
            break
        measured = _run_block(job, segments, slice(first, min(first + block, job.stop)), rounded, scratch)
        measure.add(measured)
    job.target.start_writeback(job.offset + job.start * job.row_bytes, job.nbytes)
    return measure


def write_whole_tensor(job: RowsJob, rounded: Rounding, device: torch.device = CPU) -> RoundingStats:
    """Changes and writes a tensor that cannot be cut: each term sees the base's weight, and the changes are added up."""
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
    return RoundingStats(_inner(got, wanted), _inner(wanted, wanted), got.numel(), int((got == 0).sum()))


def apply_terms(tensor: TensorPlan, base: Tensor) -> tuple[Tensor, Tensor]:
    """The result of a tensor's terms on its widened `base`, before rounding; and the base in the result's shape."""
    # False sorts first: a replaced weight is stored as it is given and not as W + (W' − W), and a weight
    # that grows has its new shape before anything is added.
    result, replaced = base.clone(), False
    for term in sorted(tensor.terms, key=lambda term: (not term.delta.replaces, term.delta.additive)):
        if tensor.shape != base.shape:
            # The term that reshapes is given the stored weight; all later terms see a base padded to the new shape.
            # A copy: a replaced value may be that of several tensors, and later terms are added to the result in its place.
            result = term.delta.apply(base, term.strength).clone()
            base = _pad_shape(base, tensor.shape)
        else:
            # What depends on the weight was trained on the weight that was put in the base's place.
            _apply(term, result.clone() if replaced and not term.delta.additive else base, result)
        replaced |= term.delta.replaces
    return result, base


def _run_block(
    job: RowsJob, segments: tuple[Segment, ...], rows: slice, rounded: Rounding, scratch: BufferPool
) -> RoundingStats:
    """Reads, changes, rounds and writes the rows of one block, and measures them where the block is sampled."""
    tensor, columns = job.tensor, matrix_shape(job.tensor.shape)[1]
    shape, index = (rows.stop - rows.start, columns), rows.start * columns
    source_dtype, dtype = DTYPES[tensor.source.dtype], DTYPES[tensor.dtype]
    # Read and widen. Where nothing is staged, `before` is `raw` itself.
    raw = scratch.take("raw", source_dtype, shape, host=scratch.staged)
    job.source.read_into(tensor_bytes(raw), tensor.source.start + index * source_dtype.itemsize)
    before = scratch.send("raw", raw)
    wide = scratch.take("wide", torch.float32, shape).copy_(before)
    # Add ΔW in float32 and round once. The check is of the float32 values, since torch may saturate (float8_e4m3fn).
    sampled = bool(tensor.terms) and (scratch.staged or _is_sampled(tensor, rows.start))
    change = _add_segments(segments, rows, wide, scratch, keep=sampled)
    narrow = rounded(wide, scratch.take("narrow", dtype, shape), tensor.name, index)
    _require_in_range(tensor, wide, dtype)
    job.target.write(tensor_bytes(scratch.fetch("narrow", narrow)), job.offset + index * dtype.itemsize)
    return _measure_rows(before, change, narrow, scratch) if sampled else RoundingStats()


def _add_segments(segments: tuple[Segment, ...], rows: slice, wide: Tensor, scratch: BufferPool, *, keep: bool) -> Tensor:
    """Adds the segments over `rows` to `wide`, which holds these rows; returns ΔW, which is only there with `keep`."""
    total = scratch.take("change", torch.float32, wide.shape)
    if keep:
        total.zero_()
    for segment in segments:
        start, stop = max(rows.start, segment.start), min(rows.stop, segment.stop)
        if start >= stop:
            continue
        here = slice(start - rows.start, stop - rows.start)
        # Where ΔW is not kept, one call multiplies and adds. The two ways may round differently in the last bit, so which
        # blocks are sampled must be the same in every run.
        if keep or segment.whole or segment.up is None or segment.down is None:
            wide[here].add_(segment.change(start, stop, total[here]))
        else:
            torch.addmm(wide[here], segment.up[start - segment.start : stop - segment.start], segment.down, out=wide[here])
    return total


def _measure_rows(before: Tensor, change: Tensor, narrow: Tensor, scratch: BufferPool) -> RoundingStats:
    """Compares the stored change of a block, `narrow` − `before`, with the ΔW that was to be added."""
    stored = scratch.take("stored", torch.float32, narrow.shape).copy_(narrow)
    # torch has no arithmetic on 8-bit floats.
    got, wanted = stored.sub_(before.float() if before.element_size() == 1 else before).flatten(), change.flatten()
    # On a CPU numpy counts faster than torch.
    changed = np.count_nonzero(got.numpy()) if got.device == CPU else torch.count_nonzero(got)
    return RoundingStats(_inner(got, wanted), _inner(wanted, wanted), got.numel(), got.numel() - int(changed))


def _inner(one: Tensor, other: Tensor) -> float:
    """⟨one, other⟩ of two vectors, in their own dtype."""
    # On a CPU a sum, since the last bit of MKL's dot product depends on where in memory the numbers lie. A GPU's does not,
    # and needs no memory for the products.
    return float((one * other).sum() if one.device == CPU else torch.dot(one, other))


def _require_in_range(tensor: TensorPlan, wide: Tensor, dtype: torch.dtype) -> None:
    """Raises `NonFinite` unless the output's dtype can hold every result."""
    limit = rounding.max_finite(dtype)
    low, high = bounds(wide)
    if -limit <= low and high <= limit:
        return
    # A tensor without terms keeps the NaN or Inf that the base holds, unless its dtype's range becomes narrower: float16 is
    # narrower than bfloat16, of as many bytes.
    if tensor.terms or limit < rounding.max_finite(DTYPES[tensor.source.dtype]):
        raise NonFinite(_overflow_message(tensor, wide))


def _overflow_message(tensor: TensorPlan, result: Tensor) -> str:
    """The message of `NonFinite`: how many values are NaN or Inf, or else how many overflow the dtype."""
    finite = result.isfinite()
    beyond = int((finite & (result.abs() > rounding.max_finite(DTYPES[tensor.dtype]))).sum())
    bad = int((~finite).sum())
    if bad:
        return f"{tensor.name}: {bad} values of the result are NaN or Inf, which the base holds or a ΔW comes to"
    return f"{tensor.name}: {beyond} values of the result overflow {tensor.dtype}; choose `dtype='float32'` or bfloat16"


def _apply(term: Term, base: Tensor, result: Tensor) -> None:
    """Adds one term's change of `base` to `result`."""
    before, after = term.part_of(base), term.part_of(result)
    changed = term.delta.apply(before, term.strength)
    # Rows that no term has changed yet take the term's result itself, without the rounding of a difference and a sum.
    after.copy_(changed if torch.equal(after, before) else after + (changed - before))


def _pad_shape(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`weight` in `shape`: filled up with zeros where `shape` is larger, cut where `shape` is smaller."""
    padded = weight.new_zeros(shape)
    common = tuple(slice(min(old, new)) for old, new in zip(weight.shape, shape, strict=True))
    padded[common] = weight[common]
    return padded


def _block_rows(tensor: TensorPlan) -> int:
    """The rows of a tensor that make a block of about `BLOCK_BYTES`."""
    columns = matrix_shape(tensor.shape)[1]
    return max(1, BLOCK_BYTES // max(columns * DTYPES[tensor.source.dtype].itemsize, 1))


def _is_sampled(tensor: TensorPlan, row: int) -> bool:
    """Whether the block that begins at `row` is measured.

    The choice depends on the block's place in its file alone: the same in every run, and spread over tensors of all sizes.
    """
    return (
        tensor.source.start < ALWAYS_SAMPLED_BYTES
        or (tensor.source.start // BLOCK_BYTES + row // _block_rows(tensor)) % SAMPLE_EVERY == 0
    )


def _spans(term: Term, tensor: TensorPlan) -> bool:
    """Whether a term changes every output of a matrix that is stored transposed, as (in, out)."""
    return len(tensor.shape) == 2 and term.start == 0 and term.stop == tensor.shape[1]
