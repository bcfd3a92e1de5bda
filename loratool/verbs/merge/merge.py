"""`merge`: W' = W + Σ strength · ΔW into a checkpoint of any size, in memory that does not grow with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.adapter.adapter import Adapter
from loratool.adapter.selection import Choice
from loratool.errors import Unsupported, some
from loratool.files.header import DTYPE_OPTIONS, TensorInfo
from loratool.files.layout import Layout, open_layout, require_weights
from loratool.numbers.devices import lanes
from loratool.numbers.threads import Progress, peak_bytes
from loratool.verbs.merge.blocks import Measure
from loratool.verbs.merge.plan import Plan, make_plan
from loratool.verbs.merge.undo_file import Merged
from loratool.verbs.merge.write import Options, Source, Work, loaded

LOST: Final = "an adapter added to it would be lost in rounding: merge into the 16-bit original, then quantise that once"
WEAK: Final = 0.9
"""Realised strength under which rounding has taken so much of an adapter that it is worth a warning."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did, or with `dry_run` would do.

    `realised_strength` is ⟨stored change, ΔW⟩ / ‖ΔW‖², `unchanged` the share of touched weights that rounding left as
    they were; both come from the share `sampled` of the touched weights, and are None when nothing was computed.
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
    seconds: float
    peak_bytes: int
    dry_run: bool
    warnings: tuple[str, ...]
    device: str = "cpu"
    undo_bytes: int | None = None


def merge(
    base: str | Path,
    adapters: Sequence[Source | str | Path],
    out: str | Path | None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges `adapters` into the checkpoint `base` and writes the result to `out`.

    `base` is a safetensors file, or a folder of Hugging Face or diffusers; `out` becomes of the same make, with every
    other file of the folder beside it. Without `out`, `base` itself is changed: clones of its files are, and replace them
    once they are complete. Each weight is computed in float32 and rounded once to the dtype it is stored in.
    Raises `LoratoolError` and leaves nothing behind where a module has no target, a shape does not fit, a value is not
    finite, or the output cannot be written.
    """
    options = options or Options()
    layout = open_layout(Path(base).expanduser())
    require_weights(layout, LOST)
    return merge_loaded("merge", layout, [loaded(source, options) for source in adapters], out, options, progress)


def merge_loaded(
    command: str,
    layout: Layout,
    merged: Sequence[Merged],
    out: str | Path | None,
    options: Options,
    progress: Progress | None,
) -> MergeReport:
    """`merge` of adapters that are loaded already, said by the output to be of `command`."""
    started = time.monotonic()
    dtype = DTYPE_OPTIONS[options.dtype] if options.dtype else None
    choices = [(each.adapter, each.choice) for each in merged]
    plan = make_plan(layout, choices, dtype=dtype, allow_unmatched=options.allow_unmatched)
    target = Path(out).expanduser() if out else layout.root
    if out is None:
        _require_same_layout(plan)
    work = Work(plan, merged, options, lanes(options.device), command)
    measure, notes, undo = (Measure(), (), None) if options.dry_run else work.write(target if out else None, progress)
    report = _report(plan, choices, target, measure, options.dry_run)
    return replace(
        report,
        warnings=(*report.warnings, *notes),
        undo_bytes=undo,
        device=work.lanes.title,
        seconds=time.monotonic() - started,
        peak_bytes=peak_bytes(),
    )


def _require_same_layout(plan: Plan) -> None:
    """Raises `Unsupported` where a plan changes more than values, which cannot be done in place."""
    other = [tensor.name for tensor in plan.tensors.values() if (tensor.dtype, tensor.shape) != _kind(tensor.source)]
    other += [name for name in plan.tensors if name not in plan.layout.tensors]
    if other:
        raise Unsupported(f"{plan.layout.root}: {some(other)} would get another dtype or shape; write with -o instead")


def _kind(info: TensorInfo) -> tuple[str, tuple[int, ...]]:
    return info.dtype, info.shape


def _report(
    plan: Plan, adapters: Sequence[tuple[Adapter, Choice]], target: Path, measure: Measure, dry_run: bool
) -> MergeReport:
    touched = sum(tensor.source.numel for tensor in plan.changed)
    strength = measure.along / measure.wanted if measure.wanted else None
    unchanged = measure.unchanged / measure.elements if measure.elements else None
    notes = [note for adapter, _ in adapters for note in adapter.notes]
    return MergeReport(
        out=str(target),
        adapters=tuple((str(adapter.path), choice.strength) for adapter, choice in adapters),
        matched=plan.matched,
        unmatched=plan.unmatched,
        changed=tuple(tensor.name for tensor in plan.changed),
        copied=sum(not tensor.touched for tensor in plan.tensors.values()),
        nbytes=sum(tensor.nbytes for tensor in plan.tensors.values()),
        realised_strength=strength,
        unchanged=unchanged,
        sampled=measure.elements / touched if touched else 0.0,
        seconds=0.0,
        peak_bytes=0,
        dry_run=dry_run,
        warnings=(*notes, *plan.warnings, *_warnings(plan, measure, strength)),
    )


def _warnings(plan: Plan, measure: Measure, strength: float | None) -> Iterator[str]:
    if plan.unmatched:
        yield f"{len(plan.unmatched)} modules have no target and were left out, the first is {plan.unmatched[0]}"
    if measure.elements and not measure.wanted:
        yield "the adapters change nothing: every ΔW that was measured is zero"
    if strength is not None and strength < WEAK:
        share = measure.unchanged / measure.elements
        yield (
            f"rounding left {share:.0%} of the touched weights unchanged, and the adapters act at {strength:.2f} of their "
            "strength; try --dtype float32, or --round stochastic"
        )
