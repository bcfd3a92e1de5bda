"""`delta`: ΔW itself, of an adapter or between two checkpoints: how large it is and where, and all of it in a file."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loratool.adapter.adapter import Adapter
from loratool.adapter.load import open_any
from loratool.adapter.selection import Selection
from loratool.base.base import BaseCheckpoint, open_base
from loratool.errors import LoratoolError, error_in_file
from loratool.files.layout import Layout
from loratool.files.output import NewOutput
from loratool.files.paths import path_of
from loratool.files.tensors import torch_dtype
from loratool.files.writer import SafetensorsAppender, Writer
from loratool.numbers.device_choice import open_devices
from loratool.numbers.devices import DevicePool
from loratool.numbers.settings import steady_arithmetic
from loratool.numbers.threads import Progress, progress_counter, run_all
from loratool.verbs.delta.file import Naming, naming_of, provenance, room_for_header, store_parts
from loratool.verbs.delta.measure import ModuleMeasure, measure_module
from loratool.verbs.delta.sources import AdapterDeltas, CheckpointDeltas, DeltaSource
from loratool.verbs.reports import Stopwatch, TimedReport


@dataclass(frozen=True, slots=True)
class DeltaReport(TimedReport):
    """What changes: every parameter that does, in order, and how many do not; ‖ΔW‖ over all, and the same relative to the
    changed weights, where a base tells.

    Of a file that was written: its format, its bytes, the relative `error` of rounding to its dtype, and the names of what
    the format has no place for.
    """

    what: str
    modules: tuple[ModuleMeasure, ...]
    unchanged: int
    norm: float
    relative: float | None
    out: str | None = None
    format: str | None = None
    nbytes: int = 0
    error: float = 0.0
    left_out: tuple[str, ...] = ()


@steady_arithmetic()
def delta(
    path: Adapter | str | Path,
    tuned: str | Path | None = None,
    out: str | Path | None = None,
    *,
    base: str | Path | BaseCheckpoint | None = None,
    to: str | None = None,
    arch: str | None = None,
    dtype: str | None = None,
    spectrum: bool = False,
    selection: Selection | None = None,
    allow_pickle: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DeltaReport:
    """Measures ΔW of the adapter at `path`, or of the checkpoint `tuned` against the checkpoint at `path`. With `out`,
    writes ΔW whole: a file of `diff` leaves, one parameter after the other.

    `base` is for an adapter whose kind depends on its weight, and for relative norms; `to` and `dtype` are the format and
    the dtype of the file; with `spectrum`, the report has all singular values.

    Raises `LoratoolError`, and writes nothing, where a kind depends on its weight and there is no base, where the
    checkpoints are not of one model, or a number is not finite.
    """
    stopwatch, source = Stopwatch(), _source(path, tuned, base, selection, allow_pickle=allow_pickle)
    devices = open_devices(device, source.workload())
    with ExitStack() as stack:
        run = DeltaRun(source, devices, dtype, spectrum=spectrum)
        if out is not None:
            run.open(path_of(out), stack, to, arch, overwrite=overwrite)
        where = path.path if isinstance(path, Adapter) else path
        with error_in_file(tuned or where):
            run.compute(progress)
        nbytes = run.finish()
    # Where a file was written, its commit has checked the inputs before; without one, nothing has.
    for each in source.inputs:
        each.require_unchanged()
    report = run.report(f"{tuned} − {where}" if tuned else str(where))
    return stopwatch.stop(replace(report, out=str(out) if out is not None else None, nbytes=nbytes))


def iter_deltas(
    path: Adapter | str | Path,
    tuned: str | Path | None = None,
    *,
    base: str | Path | BaseCheckpoint | None = None,
    selection: Selection | None = None,
    allow_pickle: bool = False,
    device: str = "auto",
) -> Iterator[tuple[str, Tensor]]:
    """The name and ΔW, in float32 and of the weight's shape, of each parameter that an adapter changes, or that differs
    between two checkpoints: computed one by one, on `device`. Raises `LoratoolError`."""
    source = _source(path, tuned, base, selection, allow_pickle=allow_pickle)
    devices = open_devices(device, source.workload())
    for number in range(source.count):
        # Within the loop, so that the caller's own work between two changes runs by the caller's own settings.
        with steady_arithmetic():
            (dense,) = devices.run_batch(source.name(number), [number], partial(_dense, source))
        if dense is not None:
            yield source.name(number), dense


def _dense(source: DeltaSource, numbers: Sequence[int], device: torch.device) -> list[Tensor | None]:
    """ΔW of these changes on the CPU; None for what did not change."""
    effects = [source.effect(number, device) for number in numbers]
    return [effect.dense().cpu() if effect else None for effect in effects]


def _source(
    path: Adapter | str | Path,
    tuned: str | Path | None,
    base: str | Path | BaseCheckpoint | None,
    selection: Selection | None,
    *,
    allow_pickle: bool,
) -> DeltaSource:
    """The source that the arguments of a verb mean: an adapter, or a pair of checkpoints."""
    takes = (selection or Selection()).takes
    found = path if isinstance(path, Adapter) else open_any(path_of(path), allow_pickle=allow_pickle)
    if tuned is not None:
        if isinstance(found, Adapter):
            raise LoratoolError(f"{found.path}: is an adapter; its ΔW is taken by itself, or with `base=` of its model")
        return CheckpointDeltas(found, path_of(tuned), takes)
    if isinstance(found, Layout):
        raise LoratoolError(f"{path}: is no adapter; name the tuned checkpoint too, to have the difference of both")
    source = AdapterDeltas(found, takes, open_base(base))
    if not source.count:
        raise LoratoolError(f"{found.path}: nothing is left: `Selection(include=)` and `exclude=` leave no module")
    return source


class DeltaRun:
    """A pass over all changes of a source: each is measured and, after `open`, written in the dtype of the file."""

    def __init__(self, source: DeltaSource, devices: DevicePool, dtype: str | None, *, spectrum: bool) -> None:
        self.source, self.devices, self.dtype_name, self.spectrum = source, devices, dtype or "float32", spectrum
        # Filled from several threads, each number by one of them, and read when all have ended.
        self.found: dict[int, ModuleMeasure] = {}
        self.before: dict[int, float] = {}
        self.lost: dict[int, float] = {}
        self.dtype = torch_dtype(dtype) or torch.float32
        self.naming: Naming | None = None
        self.groups = [[number] for number in range(source.count)]

    def open(self, out: Path, stack: ExitStack, to: str | None, arch: str | None, *, overwrite: bool) -> None:
        """Prepares a file for what `compute` finds; the file appears at `out` when `finish` has completed it."""
        self.naming = naming_of(self.source, to, arch)
        self.groups = self.naming.groups(self.source)
        written = {number for group in self.groups for number in group}
        # What the format has no place for is measured all the same, after what is written.
        self.groups += [[number] for number in range(self.source.count) if number not in written]
        # A source counts the bytes of float32, which has 4 of them.
        nbytes = sum(self.source.nbytes(number) for number in written) * self.dtype.itemsize // 4
        if not written:
            raise LoratoolError(f"{out}: {self.naming.title} has a place for nothing of it")
        self.output = stack.enter_context(
            NewOutput(out, folder=False, overwrite=overwrite, nbytes=nbytes, inputs=self.source.inputs)
        )
        writer = stack.enter_context(Writer(self.output.path(""), 0))
        self.file = SafetensorsAppender(writer, room_for_header(self.source))

    def compute(self, progress: Progress | None) -> None:
        """Computes everything, a few changes at a time."""
        sizes = [sum(self.source.nbytes(number) for number in group) for group in self.groups]
        add = progress_counter(sum(sizes), progress)
        pieces = (partial(self._group, index) for index in range(len(self.groups)))
        run_all(pieces, lambda index, _: add(sizes[index]), threading.Event(), threads=self.devices.threads)

    def finish(self) -> int:
        """Completes the file and puts it in its place; returns its size, 0 where none is written."""
        if self.naming is None:
            return 0
        nbytes = self.file.finish(provenance(of=self._of(), dtype=self.dtype_name))
        self.output.commit()
        return nbytes

    def report(self, what: str) -> DeltaReport:
        """The report of all that was computed; `what` says of what."""
        squares = {number: each.norm**2 for number, each in self.found.items()}
        whole, before = math.fsum(squares.values()), math.fsum(value**2 for value in self.before.values())
        shares = {number: square / whole if whole else 0.0 for number, square in squares.items()}
        naming = self.naming
        left_out = [number for number in self.found if naming and self.source.place(number)[0] in naming.reasons]
        return DeltaReport(
            what=what,
            modules=tuple(replace(self.found[number], share=shares[number]) for number in sorted(self.found)),
            unchanged=self.source.count - len(self.found),
            norm=math.sqrt(whole),
            # Only with the weight of every change: with some of them missing, the ratio would be too large.
            relative=math.sqrt(whole / before) if before and len(self.before) == len(self.found) else None,
            device=self.devices.title,
            device_reason=self.devices.why,
            format=naming.title if naming else None,
            error=math.sqrt(math.fsum(self.lost.values()) / whole) if whole else 0.0,
            left_out=tuple(self.source.name(number) for number in left_out),
            warnings=(*self.source.warnings, *self.devices.warnings()),
        )

    def _of(self) -> str:
        """What ΔW is of, by names without folders, as the file's metadata records it."""
        source = self.source
        if isinstance(source, CheckpointDeltas):
            return f"{source.tuned.layout.root.name[:100]} - {source.base.layout.root.name[:100]}"
        assert isinstance(source, AdapterDeltas)
        return source.adapter.path.name[:100]

    def _group(self, index: int) -> None:
        """Computes one group on the device of this thread, or on the CPU where its memory runs out."""
        group = self.groups[index]
        self.devices.run_batch(self.source.name(group[0]), [index], self._compute_groups)

    def _compute_groups(self, indexes: Sequence[int], device: torch.device) -> list[None]:
        """Measures the changes of groups, and writes each group's tensors once all parts of them are there."""
        for index in indexes:
            parts = []
            for number in self.groups[index]:
                effect = self.source.effect(number, device)
                if effect is None:
                    continue
                module, parameter = self.source.place(number)
                self.found[number] = measure_module(self.source.name(number), effect, spectrum=self.spectrum)
                if effect.weight_norm is not None:
                    self.before[number] = effect.weight_norm
                if self.naming and module not in self.naming.reasons:
                    parts.append((module, parameter, effect.dense()))
            if self.naming:
                # For empty groups too, since `in_turn` waits for every number; and as the last step, so that a second try,
                # on the CPU after memory ran out, writes nothing twice.
                held = store_parts(self.naming, parts, self.dtype)
                self.lost[index] = held.lost
                self.file.in_turn(index, held.entries)
        return [None for _ in indexes]
