"""`merge`: W' = W + Σ strength · ΔW into a checkpoint of any size, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.adapter.adapter import Adapter, Assumptions
from loratool.adapter.load import is_as_stored
from loratool.adapter.selection import Selection
from loratool.adapter.strengths import AdapterLike, weighted_adapters
from loratool.errors import Unsupported, first_few
from loratool.files.header import TensorInfo, stored_dtype
from loratool.files.in_place import finish_change_in_place
from loratool.files.layout import Layout, open_layout, require_weights
from loratool.files.paths import path_of
from loratool.numbers.device_choice import open_devices
from loratool.numbers.settings import steady_arithmetic
from loratool.numbers.threads import Progress
from loratool.verbs.merge.blocks import Rounding, RoundingStats
from loratool.verbs.merge.plan import MergeInput, Plan, make_plan
from loratool.verbs.merge.write import MergeRun, open_inputs
from loratool.verbs.reports import Stopwatch, TimedReport

LOST: Final = "an adapter added to it would be lost in rounding: merge into the 16-bit original, then quantise that once"
"""What to do instead of merging into a quantised checkpoint, for messages."""
WEAK: Final = 0.9
"""The realised strength below which a warning tells that rounding took a part of the adapters."""


@dataclass(frozen=True, slots=True)
class MergeReport(TimedReport):
    """What a merge did, or with `dry_run` would do.

    `realised_strength` is ⟨stored change, ΔW⟩ / ‖ΔW‖², `unchanged` the share of touched weights that rounding left
    unchanged; both come from the share `sampled` of the touched weights, and are None when nothing was computed.
    """

    out: str
    adapters: tuple[tuple[str, float], ...]
    matched: int
    unmatched: tuple[str, ...]
    changed: tuple[str, ...]
    copied: int
    nbytes: int
    realised_strength: float | None
    unchanged: float | None
    sampled: float
    dry_run: bool
    undo_bytes: int | None = None


@steady_arithmetic()
def merge(
    base: str | Path,
    adapters: Sequence[AdapterLike],
    out: str | Path | None,
    *,
    selection: Selection | None = None,
    dtype: str | None = None,
    stochastic: bool = False,
    seed: int = 0,
    allow_unmatched: bool = False,
    allow_pickle: bool = False,
    assume: Assumptions | None = None,
    undo: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges `adapters` into the checkpoint `base` and writes the result to `out`.

    `base` is a safetensors file, or a folder of Hugging Face or diffusers; `out` becomes of the same make, with copies of
    the folder's other files. Without `out`, `base` itself is changed: clones of its files are written to, and replace the
    files once they are complete. Each weight is computed in float32 and rounded once to the dtype that it is stored in, or
    to `dtype`: to the nearest number, or with `stochastic` to either neighbour, the nearer the likelier, as drawn from
    `seed`. `undo` names a file to write, which `unmerge` restores the base from.

    Raises `LoratoolError` and leaves nothing behind where a module has no target, a shape does not fit, a value is not
    finite, or the output cannot be written.
    """
    path = path_of(base)
    if out is None and not dry_run:
        finish_change_in_place(path)
    layout = open_layout(path)
    require_weights(layout, LOST)
    inputs = open_inputs(adapters, selection, assume, allow_pickle=allow_pickle)
    if undo:
        # An undo file keeps the adapters' files, and computes from them what is to be taken back.
        for each in weighted_adapters(adapters):
            if isinstance(each.adapter, Adapter) and not is_as_stored(each.adapter):
                raise Unsupported(
                    f"{each.path}: is in memory and not what its file holds, which `undo=` keeps; save it first"
                )
    return merge_inputs(
        "merge",
        layout,
        inputs,
        out,
        dtype=dtype,
        rounding=Rounding(stochastic, seed),
        allow_unmatched=allow_unmatched,
        undo=path_of(undo) if undo else None,
        device=device,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
    )


def merge_inputs(
    command: str,
    layout: Layout,
    inputs: Sequence[MergeInput],
    out: str | Path | None,
    *,
    dtype: str | None = None,
    rounding: Rounding | None = None,
    allow_unmatched: bool = False,
    undo: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges adapters that are loaded already; the output's history names `command`. Settings and errors as in `merge`."""
    stopwatch = Stopwatch()
    plan = make_plan(layout, inputs, dtype=stored_dtype(dtype), allow_unmatched=allow_unmatched)
    target = path_of(out) if out else layout.root
    # Files that are changed in place keep their layout, so that tensors keep their places and sizes.
    if out is None:
        _require_same_layout(plan)
    devices = open_devices(device, plan.workload())
    work = MergeRun(plan, inputs, devices, command, dtype, rounding or Rounding(), undo, overwrite)
    measure, notes, undo_bytes = (RoundingStats(), (), None) if dry_run else work.write(target if out else None, progress)
    report = _report(plan, inputs, target, measure, dry_run)
    report = replace(
        report,
        warnings=(*report.warnings, *notes),
        undo_bytes=undo_bytes,
        device=work.devices.title,
        device_reason=work.devices.why,
    )
    return stopwatch.stop(report)


def _require_same_layout(plan: Plan) -> None:
    """Raises `Unsupported` where a plan gives a tensor another dtype or shape, or adds one: impossible in place."""
    other = [tensor.name for tensor in plan.tensors.values() if (tensor.dtype, tensor.shape) != _kind(tensor.source)]
    other += [name for name in plan.tensors if name not in plan.layout.tensors]
    if other:
        raise Unsupported(
            f"{plan.layout.root}: {first_few(other)} would get another dtype or shape; write to an `out=` instead"
        )


def _kind(info: TensorInfo) -> tuple[str, tuple[int, ...]]:
    """The dtype and the shape of a stored tensor."""
    return info.dtype, info.shape


def _report(plan: Plan, inputs: Sequence[MergeInput], target: Path, measure: RoundingStats, dry_run: bool) -> MergeReport:
    """The report of a merge, but for its time, its device and the undo file."""
    touched = sum(tensor.source.numel for tensor in plan.changed_tensors)
    strength = measure.along / measure.wanted if measure.wanted else None
    unchanged = measure.unchanged / measure.elements if measure.elements else None
    notes = [note for each in inputs for note in each.adapter.warnings]
    return MergeReport(
        out=str(target),
        adapters=tuple((str(each.adapter.path), each.strength.value) for each in inputs),
        matched=plan.matched,
        unmatched=plan.unmatched,
        changed=tuple(tensor.name for tensor in plan.changed_tensors),
        copied=sum(not tensor.is_touched for tensor in plan.tensors.values()),
        nbytes=sum(tensor.nbytes for tensor in plan.tensors.values()),
        realised_strength=strength,
        unchanged=unchanged,
        sampled=measure.elements / touched if touched else 0.0,
        dry_run=dry_run,
        warnings=(*notes, *plan.warnings, *_warnings(plan, measure, strength)),
    )


def _warnings(plan: Plan, measure: RoundingStats, strength: float | None) -> Iterator[str]:
    """Warnings of modules that were left out, of adapters that change nothing, and of strength lost in rounding."""
    if plan.unmatched:
        yield f"{len(plan.unmatched)} modules have no target and were left out, the first is {plan.unmatched[0]}"
    if measure.elements and not measure.wanted:
        yield "the adapters change nothing: every ΔW that was measured is zero"
    if strength is not None and strength < WEAK:
        share = measure.unchanged / measure.elements
        yield (
            f"rounding left {share:.0%} of the touched weights unchanged, and the adapters act at {strength:.2f} of their "
            "strength; try `dtype='float32'`, or `stochastic=True`"
        )
