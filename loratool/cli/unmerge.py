"""`loratool unmerge`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.inputs import input_name, input_path
from loratool.cli.options import (
    device_option,
    json_option,
    output_option,
    overwrite_option,
    parse_weighted_adapter,
    pickle_option,
    quiet_option,
    verbose_option,
)
from loratool.cli.render import print_device, print_facts, progress_bar, show_report
from loratool.text import size

if TYPE_CHECKING:
    from loratool.verbs.unmerge.unmerge import UnmergeReport

HASHES = 8
"""The number of restored files whose hashes are shown."""


@click.command("unmerge", short_help="Undo a merge: to the bit with its undo file, by subtraction without.")
@click.argument("merged", type=input_path)
@click.argument("adapters", nargs=-1, type=input_name, metavar="[ADAPTER[:STRENGTH[:PARTS]]]...")
@click.option("--undo", type=input_path, metavar="FILE", help="What `merge --undo` wrote.")
@output_option("File or folder to write.")
@pickle_option
@device_option
@overwrite_option
@json_option
@quiet_option
@verbose_option
def unmerge_command(
    merged: Path,
    adapters: tuple[str, ...],
    undo: Path | None,
    out: Path,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Write to OUT what MERGED was before a merge.

    With --undo that is the base to the bit, checked by its hashes; the file holds the adapters. Without it, name each
    ADAPTER with the STRENGTH at which it was merged: it is subtracted, and some numbers may be off by a rounding, which
    are counted.

    \b
    Example:
      loratool unmerge merged/ --undo back.safetensors -o base/
      loratool unmerge merged/ my-adapter/ -o base/
    """
    from loratool.verbs.unmerge.unmerge import unmerge

    # The undo file holds the adapters and their strengths: naming others beside it could only contradict it.
    if bool(adapters) == bool(undo):
        raise click.UsageError("give either --undo FILE, or the adapters to subtract")
    outgoing = [parse_weighted_adapter(text) for text in adapters]
    with progress_bar("unmerging", quiet=quiet) as progress:
        report = unmerge(merged, out, outgoing, undo=undo, progress=progress, **options)
    if show_report(report, as_json=as_json, quiet=quiet):
        count = "1 adapter" if len(report.adapters) == 1 else f"{len(report.adapters)} adapters"
        print_facts(f"took {count} out of {merged} to {report.out}", _facts(report))
        print_device(report, verbose=verbose)


def _facts(report: UnmergeReport) -> Iterator[tuple[str, str]]:
    yield "tensors", f"{report.changed} changed, of {report.numbers:,} numbers"
    if report.exact:
        yield "base", "restored to the bit: every file has the hash that it had"
        yield from (("SHA-256", f"{digest}  {file}".rstrip()) for file, digest in list(report.sha256.items())[:HASHES])
    else:
        # A merge rounds: of several numbers that it made the same one of, the subtraction cannot tell which was there.
        share = report.doubtful / report.numbers if report.numbers else 0.0
        yield "base", f"subtracted: {report.doubtful:,} numbers ({share:.1%}) can be off by a rounding, all others are exact"
    yield "size", f"{size(report.nbytes)} in {report.seconds:.1f} s, peak memory {size(report.peak_bytes)}"
