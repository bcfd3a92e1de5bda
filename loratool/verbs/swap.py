"""`swap`: one adapter out of a merged checkpoint and another in, in one pass and with one rounding.

Switching tasks so is described with LoRA itself (Hu et al. 2021, arXiv:2106.09685, section 4.2): subtract B A, add B' A'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratool.files.layout import open_layout, require_weights
from loratool.numbers.threads import Progress
from loratool.verbs.merge.merge import LOST, MergeReport, merge_loaded
from loratool.verbs.merge.write import Options, Source, loaded
from loratool.verbs.unmerge.unmerge import require_sums, said_otherwise, taken_out


def swap(
    merged: str | Path,
    outgoing: Sequence[Source | str | Path],
    incoming: Sequence[Source | str | Path],
    out: str | Path | None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes to `out`, or without it into `merged` itself, the checkpoint with the adapters `outgoing` subtracted at the
    strengths at which they were merged, and `incoming` added: merging those into the original base, to one rounding.

    Raises `LoratoolError` where `outgoing` changes something that is no sum, and whatever `merge` raises.
    """
    options, layout = options or Options(), open_layout(Path(merged).expanduser())
    require_weights(layout, LOST)
    old = [loaded(taken_out(source), options) for source in outgoing]
    for each in old:
        require_sums(each.adapter)
    new = [loaded(source, options) for source in incoming]
    notes = said_otherwise(layout, [(str(each.adapter.path), -each.choice.strength) for each in old])
    report = merge_loaded("swap", layout, [*old, *new], out, options, progress)
    return replace(report, warnings=(*notes, *report.warnings))
