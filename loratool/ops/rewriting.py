"""Writes the files of a checkpoint that a plan changes: what is untouched is copied, the rest computed, by a few threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import Any, Final

from loratool.checkpoint import TensorFile
from loratool.header import TensorInfo, encode_header
from loratool.ops.plan import Plan, TensorPlan
from loratool.ops.streaming import Measure, Rounding, Scratch, by_blocks, change_whole, jobs_of, run_job
from loratool.output import Output, Writer
from loratool.workers import run_all

METADATA_KEY: Final = "loratool"
COPY_TASK_BYTES: Final = 256 << 20
PROVENANCE_BYTES: Final = 16384
"""Room that a header keeps for the provenance, which is only known at the end."""

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and all there are to do."""


def history_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file's metadata says of how loratool made it; nothing where it says nothing that can be read."""
    try:
        document = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


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
    """One safetensors file on its way out: the header first, with room for what is only known at the end."""

    def __init__(self, plan: Plan, file: str, tensors: list[TensorPlan], output: Output, stack: ExitStack) -> None:
        header = plan.layout.files[file]
        self.infos: dict[str, TensorInfo] = {}
        position = 0
        for tensor in tensors:
            info = TensorInfo(tensor.key, tensor.dtype, tensor.shape, position, position + tensor.nbytes)
            self.infos[tensor.key] = info
            position += tensor.nbytes
        self.metadata = header.metadata
        self.length = len(encode_header(self.infos, self.metadata)) + PROVENANCE_BYTES
        self.tensors = tensors
        self.source = stack.enter_context(TensorFile(header))
        self.writer = stack.enter_context(Writer(output.path(file), self.length + position))

    def offset(self, tensor: TensorPlan) -> int:
        return self.length + self.infos[tensor.key].start

    def work(self) -> Iterator[Callable[[Worker], tuple[int, Measure]]]:
        """Everything there is to do for this file, each piece returning the bytes it wrote."""
        for untouched, run in groupby(self.tensors, key=lambda tensor: not tensor.touched):
            if untouched:
                yield from self._copies(list(run))
                continue
            for tensor in run:
                yield from self._computations(tensor)

    def _copies(self, tensors: list[TensorPlan]) -> Iterator[Callable[[Worker], tuple[int, Measure]]]:
        """Neighbours in the source that are neighbours in the output are one range."""
        start, stop, offset = tensors[0].source.start, tensors[0].source.start, self.offset(tensors[0])
        for tensor in tensors:
            if tensor.source.start != stop or stop - start > COPY_TASK_BYTES:
                yield self._copy(start, stop - start, offset)
                start, offset = tensor.source.start, self.offset(tensor)
            stop = tensor.source.stop
        yield self._copy(start, stop - start, offset)

    def _copy(self, start: int, count: int, offset: int) -> Callable[[Worker], tuple[int, Measure]]:
        def copy(worker: Worker) -> tuple[int, Measure]:
            self.writer.copy(self.source.descriptor, start, count, offset)
            return count, Measure()

        return copy

    def _computations(self, tensor: TensorPlan) -> Iterator[Callable[[Worker], tuple[int, Measure]]]:
        if not by_blocks(tensor):
            yield lambda worker: (
                tensor.nbytes,
                change_whole(tensor, self.source, self.writer, self.offset(tensor), worker.rounding),
            )
            return
        for job in jobs_of(tensor, self.source, self.writer, self.offset(tensor)):
            yield lambda worker, job=job: (job.nbytes, run_job(job, worker.rounding, worker.scratch, worker.stopped))  # type: ignore[misc]

    def finish(self, provenance: str) -> None:
        """Writes the header, now that everything in it is known."""
        raw = encode_header(self.infos, {**self.metadata, METADATA_KEY: provenance}, self.length)
        if len(raw) != self.length:
            raise AssertionError(f"the provenance is longer than {PROVENANCE_BYTES} bytes")
        self.writer.write(raw, 0)


class Worker(threading.local):
    """What each worker thread has for itself, and what stops all of them."""

    def __init__(self, rounding: Rounding, stopped: threading.Event) -> None:
        self.rounding = rounding
        self.stopped = stopped
        self.scratch = Scratch()


def run(files: Sequence[OutputFile], rounding: Rounding, progress: Progress | None) -> Measure:
    """Runs all work on a few threads and adds up what was measured, in order."""
    total, done = sum(info.nbytes for file in files for info in file.infos.values()), 0
    measures: dict[int, Measure] = {}
    worker = Worker(rounding, threading.Event())

    def finished(index: int, result: tuple[int, Measure]) -> None:
        nonlocal done
        nbytes, measures[index] = result
        done += nbytes
        if progress:
            progress(done, total)

    run_all((partial(piece, worker) for file in files for piece in file.work()), finished, worker.stopped)
    measure = Measure()
    for index in sorted(measures):
        measure.add(measures[index])
    return measure
