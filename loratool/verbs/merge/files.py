"""Writes the files of a checkpoint that a plan changes: untouched tensors are copied, the others computed, on threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Final

import torch

from loratool.files.header import TensorInfo, encode_header
from loratool.files.history import HISTORY_KEY, history_of
from loratool.files.layout import Layout
from loratool.files.tensors import TensorFile
from loratool.files.writer import Writer
from loratool.numbers.devices import CPU, CUDA, MOST_LANES, DevicePool
from loratool.numbers.threads import Progress, progress_counter, run_all
from loratool.verbs.merge.added import PlannedChange
from loratool.verbs.merge.blocks import BufferPool, Rounding, RoundingStats, RowsJob, jobs_of, run_job, write_whole_tensor
from loratool.verbs.merge.plan import Plan, TensorPlan
from loratool.verbs.merge.segments import Segment

COPY_TASK_BYTES: Final = 256 << 20
"""Bytes of untouched tensors after which a copy ends and the next begins, which another thread may take."""
PROVENANCE_BYTES: Final = 16384
"""Room in a header for the provenance, which is only known at the end: it tells what rounding left of the adapters."""

KNOWN_TO_MPS: Final = frozenset({"F32", "F16", "BF16"})
"""Dtypes of weights that Apple's GPUs (MPS) compute with."""

AfterJob = Callable[[RowsJob, PlannedChange], Callable[[], None]]
"""Called with each job, in order and before the job is done, and the change planned for its tensor; the function that it
returns is called once the job is done, on the same thread."""


def rounded_by_chance(layout: Layout) -> bool:
    """Whether the history in a checkpoint's metadata says that its merge rounded stochastically."""
    histories = (history_of(header.metadata) for header in layout.files.values())
    return any(str(history.get("round", "")).startswith("stochastic") for history in histories)


def rewritten_files(plan: Plan) -> dict[str, list[TensorPlan]]:
    """The files with a tensor that changes, each with all tensors of its output; other files are copied whole."""
    # In the source's order, which lets neighbours be copied as one range. An untied head, whose source is the embedding,
    # comes right behind that.
    by_file: dict[str, list[TensorPlan]] = {}
    for tensor in sorted(plan.tensors.values(), key=lambda tensor: (tensor.source.start, tensor.key != tensor.source.name)):
        by_file.setdefault(tensor.file, []).append(tensor)
    return {
        file: tensors
        for file, tensors in sorted(by_file.items())
        if any(tensor.is_touched or tensor.name not in plan.layout.tensors for tensor in tensors)
    }


class OutputFile:
    """One safetensors file of the output, written at `path`: room for the header first, then the tensors.

    Of a file that is changed `in_place`, which keeps its layout, only the tensors that change are written.
    """

    def __init__(
        self,
        plan: Plan,
        file: str,
        tensors: list[TensorPlan],
        path: Path,
        stack: ExitStack,
        room: int = PROVENANCE_BYTES,
        *,
        in_place: bool = False,
        follow: AfterJob | None = None,
    ) -> None:
        header = plan.layout.files[file]
        self.in_place = in_place
        self.follow = follow
        # Positions count up from 0 without a gap, as safetensors demands. In place they are those of the source, since
        # `merge` refuses to change a dtype or a shape there.
        self.infos: dict[str, TensorInfo] = {}
        position = 0
        for tensor in tensors:
            info = TensorInfo(tensor.key, tensor.dtype, tensor.shape, position, position + tensor.nbytes)
            self.infos[tensor.key] = info
            position += tensor.nbytes
        self.metadata = header.metadata
        longest = len(encode_header(self.infos, self.metadata)) + room
        self.length = header.data_start if in_place else longest
        self.tensors = tensors
        self.source = stack.enter_context(TensorFile(header))
        self.writer = stack.enter_context(Writer(path, None if in_place else self.length + position))

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors that are written."""
        written = {tensor.key for tensor in self.tensors if tensor.is_touched or not self.in_place}
        return sum(self.infos[key].nbytes for key in written)

    def offset(self, tensor: TensorPlan) -> int:
        """Where a tensor begins in the output file."""
        return self.length + self.infos[tensor.key].start

    def work(self) -> Iterator[Callable[[Worker], tuple[int, RoundingStats]]]:
        """The pieces of work on this file; each returns the bytes it wrote and what it measured."""
        for untouched, run in groupby(self.tensors, key=lambda tensor: not tensor.is_touched):
            if untouched:
                yield from () if self.in_place else self._copies(list(run))
                continue
            for tensor in run:
                yield from self._computations(tensor)

    def _copies(self, tensors: list[TensorPlan]) -> Iterator[Callable[[Worker], tuple[int, RoundingStats]]]:
        """Copies of untouched tensors that are neighbours in the output; neighbours in the source too are one range."""
        start, stop, offset = tensors[0].source.start, tensors[0].source.start, self.offset(tensors[0])
        for tensor in tensors:
            if tensor.source.start != stop or stop - start > COPY_TASK_BYTES:
                yield self._copy(start, stop - start, offset)
                start, offset = tensor.source.start, self.offset(tensor)
            stop = tensor.source.stop
        yield self._copy(start, stop - start, offset)

    def _copy(self, start: int, count: int, offset: int) -> Callable[[Worker], tuple[int, RoundingStats]]:
        def copy(worker: Worker) -> tuple[int, RoundingStats]:
            self.writer.copy(self.source.descriptor, start, count, offset)
            return count, RoundingStats()

        return copy

    def _computations(self, tensor: TensorPlan) -> Iterator[Callable[[Worker], tuple[int, RoundingStats]]]:
        """The jobs of a touched tensor; `follow` sees them here, in order, before threads take them up in any order."""
        added = PlannedChange(tensor)
        for job in jobs_of(tensor, self.source, self.writer, self.offset(tensor)):
            yield partial(_compute_work, job, self.follow(job, added) if self.follow else None)

    def finish(self, provenance: str) -> bool:
        """Writes the header with the provenance; returns False, and writes nothing, where a file that is changed in place
        has no room for it."""
        # In place the tensors cannot move, so that the new header must fit into the old one's length with its padding.
        raw = encode_header(self.infos, {**self.metadata, HISTORY_KEY: provenance}, self.length)
        fits = len(raw) == self.length
        if not fits and not self.in_place:
            raise AssertionError("the provenance is longer than the room for it")
        if fits:
            self.writer.write(raw, 0)
        return fits


class SentSegments:
    """The segments of the tensors that were worked on last, on the devices that they were sent to: a tensor's factors travel
    once, whichever threads compute its jobs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[int, torch.device], tuple[tuple[Segment, ...], tuple[Segment, ...]]] = OrderedDict()

    def on(self, device: torch.device, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """`segments` on `device`, ready for any stream there."""
        if device == CPU:
            return segments
        with self._lock:
            # The segments themselves are kept beside what was sent, so that no others can get their `id` meanwhile.
            key = id(segments), device
            if key not in self._held:
                self._held[key] = segments, tuple(segment.on(device) for segment in segments)
                if device.type == CUDA:
                    torch.cuda.current_stream(device).synchronize()
                while len(self._held) > 2 * MOST_LANES:
                    self._held.popitem(last=False)
            return self._held[key][1]


class Worker(threading.local):
    """The buffers that each worker thread has for itself, and the event that stops all threads."""

    # `threading.local` runs this anew, with the same arguments, in each thread that touches the object.
    def __init__(self, rounding: Rounding, devices: DevicePool, stopped: threading.Event, sent: SentSegments) -> None:
        self.rounding = rounding
        self.sent = sent
        self.devices = devices
        self.stopped = stopped
        self._scratch: dict[torch.device, BufferPool] = {}

    def compute(self, jobs: Sequence[RowsJob], device: torch.device) -> list[RoundingStats]:
        """Runs neighbouring pieces of one job on a device, or on the CPU where Apple's GPUs lack the job's dtype."""
        if device.type == "mps" and any({job.tensor.source.dtype, job.tensor.dtype} - KNOWN_TO_MPS for job in jobs):
            device = CPU
        # A thread whose GPU ran out of memory computes on the CPU, where nothing is staged.
        staged = self.devices.staged and device == self.devices.device
        scratch = self._scratch.setdefault(device, BufferPool(device, staged))
        # The pieces are neighbours of one tensor: together they are the job that they were cut from.
        job = replace(jobs[0], stop=jobs[-1].stop)
        if not job.by_blocks:
            return [write_whole_tensor(job, self.rounding, device)]
        return [run_job(job, self.sent.on(device, job.segments), self.rounding, scratch, self.stopped)]


def _compute_work(job: RowsJob, after: Callable[[], None] | None, worker: Worker) -> tuple[int, RoundingStats]:
    """Runs one job, then what follows it."""
    measure = RoundingStats()
    for part in worker.devices.run_batch(job.tensor.name, job.pieces() if worker.devices.staged else [job], worker.compute):
        measure.add(part)
    # A job that was stopped may have left rows unwritten, and what follows reads them back.
    if after and not worker.stopped.is_set():
        after()
    return job.nbytes, measure


def run_files(
    files: Sequence[OutputFile], rounding: Rounding, devices: DevicePool, progress: Progress | None
) -> RoundingStats:
    """Runs all pieces of work on a few threads; returns the sum of what the pieces measured."""
    add = progress_counter(sum(file.nbytes for file in files), progress)
    measures: dict[int, RoundingStats] = {}
    worker = Worker(rounding, devices, threading.Event(), SentSegments())

    def count_piece(index: int, result: tuple[int, RoundingStats]) -> None:
        nbytes, measures[index] = result
        add(nbytes)

    pieces = (partial(piece, worker) for file in files for piece in file.work())
    run_all(pieces, count_piece, worker.stopped, threads=devices.threads)
    # Pieces end in any order, and a sum of floats depends on its order: add up by number.
    measure = RoundingStats()
    for index in sorted(measures):
        measure.add(measures[index])
    return measure
