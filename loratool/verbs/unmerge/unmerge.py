"""`unmerge`: the base again, to the bit with the undo file of the merge, by subtraction without an undo file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loratool.adapter.adapter import Adapter, Assumptions
from loratool.adapter.strengths import AdapterLike, weighted_adapters
from loratool.errors import LoratoolError, Unsupported
from loratool.files.history import history_of, input_name
from loratool.files.layout import Layout, open_layout
from loratool.files.paths import path_of
from loratool.numbers.device_choice import open_devices
from loratool.numbers.devices import CPU, DevicePool
from loratool.numbers.settings import steady_arithmetic
from loratool.numbers.threads import Progress
from loratool.verbs.merge.added import PlannedChange, rows_of
from loratool.verbs.merge.blocks import RowsJob
from loratool.verbs.merge.files import rounded_by_chance
from loratool.verbs.merge.plan import MergeInput, Plan, make_plan
from loratool.verbs.merge.write import MergeRun, open_inputs
from loratool.verbs.reports import Stopwatch, TimedReport
from loratool.verbs.unmerge.restore import restore_base


@dataclass(frozen=True, slots=True)
class UnmergeReport(TimedReport):
    """What an unmerge did.

    `exact` says that the base is restored to the bit, as the SHA-256 of its files in `sha256` show. Otherwise `doubtful` of
    the `numbers` in changed tensors may be off by a rounding.
    """

    out: str
    adapters: tuple[tuple[str, float], ...]
    exact: bool
    sha256: Mapping[str, str]
    changed: int
    numbers: int
    doubtful: int
    nbytes: int


@steady_arithmetic()
def unmerge(
    merged: str | Path,
    out: str | Path,
    adapters: Sequence[AdapterLike] = (),
    *,
    undo: str | Path | None = None,
    allow_unmatched: bool = False,
    allow_pickle: bool = False,
    assume: Assumptions | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Writes to `out` what the checkpoint `merged` was before a merge.

    With `undo`, the file that `merge` wrote to its own `undo`, the output is the base to the bit, checked by the hashes of
    its files. Otherwise `adapters` are subtracted, each at the strength at which it was merged.

    Raises `LoratoolError`, and leaves nothing behind, where the undo file is of another checkpoint, or where an adapter's
    change depends on the weight and cannot be subtracted.
    """
    stopwatch = Stopwatch()
    source, target = path_of(merged), path_of(out)
    if bool(adapters) == bool(undo):
        raise LoratoolError(f"{merged}: give either the adapters to subtract, or the undo file of the merge")
    if undo:
        found = restore_base(source, target, path_of(undo), overwrite=overwrite, progress=progress)
        report = _report(target, found.plan, found.adapters, found.nbytes, sha256=found.sha256)
    else:
        layout = open_layout(source)
        # Subtracting is merging at the negated strengths, while the numbers that this may restore wrongly are counted.
        negated = [each.opposite() for each in weighted_adapters(adapters)]
        inputs = open_inputs(negated, assume=assume, allow_pickle=allow_pickle)
        plan = _plan(layout, inputs, allow_unmatched=allow_unmatched)
        devices = open_devices(device, plan.workload())
        doubt = _Doubt(by_chance=rounded_by_chance(layout), devices=devices)
        work = MergeRun(plan, inputs, devices, "unmerge", overwrite=overwrite, follow=doubt.follow)
        _, notes, _ = work.write(target, progress)
        pairs = tuple((str(each.adapter.path), -each.strength.value) for each in inputs)
        report = _report(target, plan, pairs, layout.nbytes, doubtful=doubt.count)
        report = replace(report, warnings=(*history_disagreements(layout, inputs), *notes))
        report = replace(report, device=devices.title, device_reason=devices.why)
    return stopwatch.stop(report)


def _plan(layout: Layout, inputs: Sequence[MergeInput], *, allow_unmatched: bool) -> Plan:
    """The plan that subtracts: raises `Unsupported` for adapters that cannot be."""
    for each in inputs:
        require_additive(each.adapter)
    return make_plan(layout, inputs, allow_unmatched=allow_unmatched)


def _report(
    out: Path,
    plan: Plan,
    adapters: tuple[tuple[str, float], ...],
    nbytes: int,
    *,
    sha256: Mapping[str, str] | None = None,
    doubtful: int = 0,
) -> UnmergeReport:
    return UnmergeReport(
        out=str(out),
        adapters=adapters,
        exact=bool(sha256),
        sha256=sha256 or {},
        changed=len(plan.changed_tensors),
        numbers=sum(tensor.source.numel for tensor in plan.changed_tensors),
        doubtful=doubtful,
        nbytes=nbytes,
    )


def require_additive(adapter: Adapter) -> None:
    """Raises `Unsupported` for an adapter whose changes cannot be subtracted."""
    for change in adapter.changes:
        if not change.delta.additive:
            raise Unsupported(
                f"{adapter.path}: {change}: what a delta of kind {change.delta.kind} changed depends on the weight before; "
                "only the undo file of the merge (`merge(undo=)`) leads back"
            )


def history_disagreements(layout: Layout, inputs: Sequence[MergeInput]) -> Iterator[str]:
    """Warnings of adapters to take out, which have the opposites of their strengths, that are not among those which the
    checkpoint's history names at these strengths."""
    for header in layout.files.values():
        known = history_of(header.metadata).get("adapters")
        if isinstance(known, list) and known:
            merged = [_as_given(each) for each in known if isinstance(each, dict)]
            # The history is the same in every file that has one.
            for each in inputs:
                strength = each.strength.opposite()
                more = {"parts": dict(strength.parts), "blocks": list(strength.vector)}
                mine = _as_given({"name": input_name(each.adapter.path), "strength": strength.value, **more})
                if mine not in merged:
                    yield f"{layout.root} says that {', '.join(sorted(merged))} was merged into it, not {mine}"
            return


def _as_given(record: Mapping[str, Any]) -> str:
    """An adapter of a history as one gives it to the command line: NAME:STRENGTH, and its parts where any counts."""
    value, blocks, parts = record.get("strength"), record.get("blocks"), record.get("parts")
    said = f"{value:g}" if isinstance(value, int | float) else str(value)
    words = [f"{block:g}" if isinstance(block, int | float) else str(block) for block in blocks or ()]
    if isinstance(parts, Mapping):
        words += [f"{name}={factor}" for name, factor in sorted(parts.items()) if factor != 1]
    return ":".join([str(record.get("name")), said, *([",".join(words)] if words else [])])


class _Doubt:
    """Counts, job by job, the numbers that subtraction may have restored wrongly."""

    def __init__(self, *, by_chance: bool, devices: DevicePool) -> None:
        self.count, self.by_chance, self.devices = 0, by_chance, devices
        self._lock = threading.Lock()

    def follow(self, job: RowsJob, added: PlannedChange) -> Callable[[], None]:
        """An `AfterJob`, which looks at a job's rows as they were merged."""
        return partial(self._look, job, added)

    def _look(self, job: RowsJob, added: PlannedChange) -> None:
        rows = rows_of(job, job.tensor.source)

        def count(device: torch.device) -> int:
            # Apple's GPUs have no float64.
            there = CPU if device.type == "mps" else device
            return added.doubtful(rows, job.start, by_chance=self.by_chance, device=there)

        found = self.devices.run_one(job.tensor.name, count)
        with self._lock:
            self.count += found
