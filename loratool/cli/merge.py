"""`loratool merge`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.inputs import input_name, input_path
from loratool.cli.options import (
    alpha_option,
    device_option,
    dry_run_option,
    dtype_option,
    exclude_option,
    in_place_option,
    include_option,
    json_option,
    output_option,
    output_or_in_place,
    overwrite_option,
    parse_component_strengths,
    parse_weighted_adapter,
    pickle_option,
    quiet_option,
    slots_option,
    verbose_option,
)
from loratool.cli.render import print_device, print_facts, print_table, progress_bar, show_report
from loratool.text import size

if TYPE_CHECKING:
    from loratool.verbs.merge.merge import MergeReport


@click.command("merge", short_help="Merge adapters into a base checkpoint.")
@click.argument("base", type=input_path)
@click.argument("adapters", nargs=-1, type=input_name, required=True, metavar="ADAPTER[:STRENGTH[:PARTS]]...")
@output_option("File or folder to write.", required=False)
@in_place_option
@click.option(
    "--undo",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write what `loratool unmerge` restores BASE from, to the bit.",
)
@dtype_option("Store all floating-point tensors so. Default: as the base.")
@include_option
@exclude_option
@click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME=FACTOR",
    help="Multiply the strength of unet, te1, te2, te3 or model. Repeatable.",
)
@click.option(
    "--round",
    "rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="How results become stored numbers; by chance, small changes survive on average.",
)
@click.option("--seed", default=0, show_default=True, help="Of stochastic rounding.")
@click.option("--allow-unmatched", is_flag=True, help="Leave out modules that have no target, and say which.")
@alpha_option
@slots_option
@pickle_option
@device_option
@overwrite_option
@dry_run_option()
@json_option
@quiet_option
@verbose_option
def merge_command(
    base: Path,
    adapters: tuple[str, ...],
    out: Path | None,
    in_place: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    components: tuple[str, ...],
    rounding: str,
    alpha: float | None,
    slots: tuple[bool, ...] | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Merge one or more ADAPTERs into BASE, each at its STRENGTH (default 1), and write the result to OUT.

    BASE is a safetensors file or a folder of Hugging Face or diffusers, and OUT becomes the same. Strength w adds
    exactly w · ΔW, computed in float32 and rounded once. A module without a target is an error. PARTS weigh components and
    blocks of one adapter, as in `loratool combine`: te1=0.5,OUT*=0, or a vector of block weights.

    \b
    Example:
      loratool merge sdxl.safetensors style.safetensors:0.8 -o merged.safetensors
      loratool merge Llama-3-8B/ a/ b/:-0.3 -o merged/ --undo back.safetensors
    """
    from loratool.adapter.adapter import Assumptions
    from loratool.adapter.selection import Selection
    from loratool.verbs.merge.merge import merge

    # --component multiplies every adapter's strength in that component.
    factors = parse_component_strengths(components)
    inputs = [parse_weighted_adapter(text).times(factors) for text in adapters]
    with progress_bar("merging", quiet=quiet) as progress:
        report = merge(
            base,
            inputs,
            output_or_in_place(out, in_place=in_place),
            selection=Selection(include, exclude),
            stochastic=rounding == "stochastic",
            assume=Assumptions(alpha, slots or ()),
            progress=progress,
            **options,
        )
    if show_report(report, as_json=as_json, quiet=quiet):
        count = "1 adapter" if len(report.adapters) == 1 else f"{len(report.adapters)} adapters"
        print_merge(f"{'would merge' if report.dry_run else 'merged'} {count} into {report.out}", report, verbose=verbose)


def print_merge(title: str, report: MergeReport, *, verbose: bool) -> None:
    """Prints what a merge did, below a title, and with `verbose` the tensors that the merge changed."""
    print_facts(title, _facts(report))
    print_device(report, verbose=verbose)
    if verbose or report.dry_run:
        print_table(["tensor"], [[name] for name in report.changed])


def _facts(report: MergeReport) -> Iterator[tuple[str, str]]:
    lost = f", {len(report.unmatched)} without a target" if report.unmatched else ""
    yield "modules", f"{report.matched} matched{lost}"
    yield "tensors", f"{len(report.changed)} changed, {report.copied} copied byte for byte"
    # The plan knows the size from headers; what rounding leaves of the strength only the numbers tell.
    if report.dry_run:
        yield "size", size(report.nbytes)
        return
    if report.realised_strength is not None:
        # Both figures are measured on a sample of blocks only, where the checkpoint is large.
        sampled = "" if report.sampled > 0.999 else f" (measured on {report.sampled:.0%} of them)"
        yield "strength", f"{report.realised_strength:.4f} of what was asked is in the stored weights"
        yield "rounding", f"left {report.unchanged:.1%} of the touched weights unchanged{sampled}"
    if report.undo_bytes is not None:
        yield "undo file", f"{size(report.undo_bytes)}, the adapters included"
    yield "size", f"{size(report.nbytes)} in {report.seconds:.1f} s, peak memory {size(report.peak_bytes)}"
