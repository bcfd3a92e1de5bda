"""`swap`: takes adapters out of a merged checkpoint and puts others in, in one pass and with one rounding.

The LoRA paper switches tasks in this way (Hu et al. 2021, arXiv:2106.09685, section 4.2): subtract B A, add B' A'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratool.adapter.adapter import Assumptions
from loratool.adapter.strengths import AdapterLike, weighted_adapters
from loratool.files.in_place import finish_change_in_place
from loratool.files.layout import open_layout, require_weights
from loratool.files.paths import path_of
from loratool.numbers.settings import steady_arithmetic
from loratool.numbers.threads import Progress
from loratool.verbs.merge.merge import LOST, MergeReport, merge_inputs
from loratool.verbs.merge.write import open_inputs
from loratool.verbs.unmerge.unmerge import history_disagreements, require_additive


@steady_arithmetic()
def swap(
    merged: str | Path,
    outgoing: Sequence[AdapterLike],
    incoming: Sequence[AdapterLike],
    out: str | Path | None,
    *,
    allow_pickle: bool = False,
    assume: Assumptions | None = None,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes `merged` with `outgoing` subtracted, each at the strength at which it was merged, and `incoming` added.

    The result goes to `out`, or without `out` into `merged` itself, and is a rounding away from merging `incoming` into the
    original base. Raises `LoratoolError` where a change of `outgoing` depends on the weight, and whatever `merge` raises.
    """
    path = path_of(merged)
    if out is None and not dry_run:
        finish_change_in_place(path)
    layout = open_layout(path)
    require_weights(layout, LOST)
    # Both go into one plan, at negated and at given strengths, so that weights are rounded once and not in between.
    negated = [each.opposite() for each in weighted_adapters(outgoing)]
    old = open_inputs(negated, assume=assume, allow_pickle=allow_pickle)
    for each in old:
        require_additive(each.adapter)
    new = open_inputs(incoming, assume=assume, allow_pickle=allow_pickle)
    notes = history_disagreements(layout, old)
    report = merge_inputs(
        "swap", layout, [*old, *new], out, device=device, overwrite=overwrite, dry_run=dry_run, progress=progress
    )
    return replace(report, warnings=(*notes, *report.warnings))
