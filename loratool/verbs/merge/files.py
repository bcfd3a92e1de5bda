"""Writes the files of a checkpoint that a plan changes: what is untouched is copied, the rest computed, by a few threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
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
from loratool.numbers.devices import CPU, DevicePool
from loratool.numbers.threads import Progress, progress_counter, run_all
from loratool.verbs.merge.added import PlannedChange
from loratool.verbs.merge.blocks import BufferPool, Rounding, RoundingStats, RowsJob, jobs_of, run_job, write_whole_tensor
from loratool.verbs.merge.plan import Plan, TensorPlan

COPY_TASK_BYTES: Final = 256 << 20
PROVENANCE_BYTES: Final = 16384
"""Room that a header keeps for the provenance, which is only known at the end."""

KNOWN_TO_MPS: Final = frozenset({"F32", "F16", "BF16"})
"""Dtypes of weights that Apple's GPUs compute with."""

AfterJob = Callable[[RowsJob, PlannedChange], Callable[[], None]]
"""Given each job in order, before any is done, and what the plan adds to its tensor: what to do, on the thread that did it,
once it is."""


def rounded_by_chance(layout: Layout) -> bool:
    """Whether a checkpoint says of itself that its merge rounded stochastically."""
    histories = (history_of(header.metadata) for header in layout.files.values())
    return any(str(history.get("round", "")).startswith("stochastic") for history in histories)


def rewritten_files(plan: Plan) -> dict[str, list[TensorPlan]]:
    """The files with a tensor that changes, and what is to be in them; the rest are copied as they are."""
    by_file: dict[str, list[TensorPlan]] = {}
    for tensor in sorted(plan.tensors.values(), key=lambda tensor: (tensor.source.start, tensor.key != tensor.source.name)):
        by_file.setdefault(tensor.file, []).append(tensor)
    return {
        file: tensors
        for file, tensors in sorted(by_file.items())
        if any(tensor.touched or tensor.name not in plan.layout.tensors for tensor in tensors)
    }


class OutputFile:
    """One safetensors file on its way out, at `path`: the header first, with room for what is only known at the end.

    A file that is changed `in_place` keeps its layout, and only what changes is written.
    """

    def __init__(
        self,
        plan: Plan,
        file: str,
        tensors: list[TensorPlan],
        path: Path,
        stack: ExitStack,
        *,
        in_place: bool = False,
        follow: AfterJob | None = None,
    ) -> None:
        header = plan.layout.files[file]
        self.in_place = in_place
        self.follow = follow
        self.infos: dict[str, TensorInfo] = {}
        position = 0
        for tensor in tensors:
            info = TensorInfo(tensor.key, tensor.dtype, tensor.shape, position, position + tensor.nbytes)
            self.infos[tensor.key] = info
            position += tensor.nbytes
        self.metadata = header.metadata
        room = len(encode_header(self.infos, self.metadata)) + PROVENANCE_BYTES
        self.length = header.data_start if in_place else room
        self.tensors = tensors
        self.source = stack.enter_context(TensorFile(header))
        self.writer = stack.enter_context(Writer(path, None if in_place else self.length + position))

    @property
    def nbytes(self) -> int:
        """The bytes that are written of its tensors."""
        written = {tensor.key for tensor in self.tensors if tensor.touched or not self.in_place}
        return sum(self.infos[key].nbytes for key in written)

    def offset(self, tensor: TensorPlan) -> int:
        return self.length + self.infos[tensor.key].start

    def work(self) -> Iterator[Callable[[Worker], tuple[int, RoundingStats]]]:
        """Everything there is to do for this file, each piece returning the bytes it wrote."""
        for untouched, run in groupby(self.tensors, key=lambda tensor: not tensor.touched):
            if untouched:
                yield from () if self.in_place else self._copies(list(run))
                continue
            for tensor in run:
                yield from self._computations(tensor)

    def _copies(self, tensors: list[TensorPlan]) -> Iterator[Callable[[Worker], tuple[int, RoundingStats]]]:
        """Neighbours in the source that are neighbours in the output are one range."""
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
        added = PlannedChange(tensor)
        for job in jobs_of(tensor, self.source, self.writer, self.offset(tensor)):
            yield partial(_compute_work, job, self.follow(job, added) if self.follow else None)

    def finish(self, provenance: str) -> bool:
        """Writes the header, now that everything in it is known; False where it is changed in place, and
        its header has no room."""
        raw = encode_header(self.infos, {**self.metadata, HISTORY_KEY: provenance}, self.length)
        fits = len(raw) == self.length
        if not fits and not self.in_place:
            raise AssertionError(f"the provenance is longer than {PROVENANCE_BYTES} bytes")
        if fits:
            self.writer.write(raw, 0)
        return fits


class Worker(threading.local):
    """What each worker thread has for itself, and what stops all of them."""

    def __init__(self, rounding: Rounding, devices: DevicePool, stopped: threading.Event) -> None:
        self.rounding = rounding
        self.devices = devices
        self.stopped = stopped
        self._scratch: dict[torch.device, BufferPool] = {}

    def compute(self, jobs: Sequence[RowsJob], device: torch.device) -> list[RoundingStats]:
        """Runs jobs on a device."""
        if device.type == "mps" and any({job.tensor.source.dtype, job.tensor.dtype} - KNOWN_TO_MPS for job in jobs):
            device = CPU
        staged = self.devices.staged and device == self.devices.device
        scratch = self._scratch.setdefault(device, BufferPool(device, staged))
        return [
            run_job(job, self.rounding, scratch, self.stopped)
            if job.by_blocks
            else write_whole_tensor(job, self.rounding, device)
            for job in jobs
        ]


def _compute_work(job: RowsJob, after: Callable[[], None] | None, worker: Worker) -> tuple[int, RoundingStats]:
    (measure,) = worker.devices.run_batch(job.tensor.name, [job], worker.compute)
    if after and not worker.stopped.is_set():
        after()
    return job.nbytes, measure


def run_files(
    files: Sequence[OutputFile], rounding: Rounding, devices: DevicePool, progress: Progress | None
) -> RoundingStats:
    """Runs all work on a few threads and adds up what was measured, in order."""
    add = progress_counter(sum(file.nbytes for file in files), progress)
    measures: dict[int, RoundingStats] = {}
    worker = Worker(rounding, devices, threading.Event())

    def finished(index: int, result: tuple[int, RoundingStats]) -> None:
        nbytes, measures[index] = result
        add(nbytes)

    run_all((partial(piece, worker) for file in files for piece in file.work()), finished, worker.stopped)
    measure = RoundingStats()
    for index in sorted(measures):
        measure.add(measures[index])
    return measure
