"""`loratool swap`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli.inputs import input_name, input_path
from loratool.cli.merge import print_merge
from loratool.cli.options import (
    device_option,
    dry_run_option,
    in_place_option,
    json_option,
    output_option,
    output_or_in_place,
    overwrite_option,
    parse_weighted_adapter,
    pickle_option,
    quiet_option,
    verbose_option,
)
from loratool.cli.render import progress_bar, show_report

_NAMED = "ADAPTER[:STRENGTH[:PARTS]]"


@click.command("swap", short_help="Take one adapter out of a merged checkpoint and put another in.")
@click.argument("merged", type=input_path)
@click.option(
    "--out",
    "outgoing",
    type=input_name,
    multiple=True,
    required=True,
    metavar=_NAMED,
    help="To take out, as it was merged. Repeatable.",
)
@click.option(
    "--in", "incoming", type=input_name, multiple=True, required=True, metavar=_NAMED, help="To put in. Repeatable."
)
@output_option("File or folder to write.", required=False)
@in_place_option
@pickle_option
@device_option
@overwrite_option
@dry_run_option()
@json_option
@quiet_option
@verbose_option
def swap_command(
    merged: Path,
    outgoing: tuple[str, ...],
    incoming: tuple[str, ...],
    out: Path | None,
    in_place: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Take the adapters --out, at the strengths at which they were merged, out of MERGED, and put --in in their place.

    Both in one pass and with one rounding, so that the result is what merging --in into the original base makes, to a
    rounding. With --in-place only the tensors that change are written.

    \b
    Example:
      loratool swap merged/ --out task-a/ --in task-b/:0.5 -o other/
      loratool swap merged/ --out task-a/ --in task-b/ --in-place
    """
    from loratool.verbs.swap import swap

    # --out and --in are adapters here; the output's option is -o, as everywhere.
    old, new = ([parse_weighted_adapter(text) for text in texts] for texts in (outgoing, incoming))
    target = output_or_in_place(out, in_place=in_place)
    with progress_bar("swapping", quiet=quiet) as progress:
        report = swap(merged, old, new, target, progress=progress, **options)
    if show_report(report, as_json=as_json, quiet=quiet):
        done = "would swap" if report.dry_run else "swapped"
        print_merge(f"{done} {len(old)} for {len(new)} in {report.out}", report, verbose=verbose)
