"""`loratool combine`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.inputs import input_name
from loratool.cli.options import (
    arch_option,
    base_option,
    dtype_option,
    factors_device_option,
    json_option,
    output_option,
    overwrite_option,
    parse_weighted_adapter,
    pickle_option,
    quiet_option,
    to_option,
    verbose_option,
)
from loratool.cli.rank_options import rank_rules, rule_from_options
from loratool.cli.render import print_facts, show_report
from loratool.cli.resize import print_converted
from loratool.deltas.schema import MERGE_METHOD_NAMES, SUM
from loratool.text import histogram, size

if TYPE_CHECKING:
    from loratool.verbs.combine.combine import CombineReport


@click.command("combine", short_help="Make one adapter of several.")
@click.argument("adapters", nargs=-1, type=input_name, required=True, metavar="ADAPTER[:STRENGTH[:PARTS]]...")
@output_option()
@partial(rank_rules, without=("auto",))
@click.option(
    "--method", type=click.Choice((SUM, *MERGE_METHOD_NAMES)), default=SUM, show_default=True, help="How to merge."
)
@click.option("--density", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True, help="Share kept.")
@click.option("--seed", default=0, show_default=True, help="Of what dare and dare-ties drop.")
@to_option("Format to write. Default: as the first ADAPTER.")
@arch_option()
@base_option()
@dtype_option("Of factors. Default: one that holds them exactly.")
@pickle_option
@factors_device_option
@overwrite_option
@json_option
@quiet_option
@verbose_option
def combine_command(adapters: tuple[str, ...], out: Path, as_json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
    """Write to OUT one adapter that does what all ADAPTERS do together, each at its STRENGTH (default 1).

    The weighted sum of their ΔW is exact: ranks add, and equal `down` factors are shared. With --rank, --max-error, --size
    or another rule it is the best approximation of that sum. They may have different formats, ranks, kinds and dtypes; OUT
    is like the first. Kinds that depend on the weight they change (DoRA, OFT …) need --base, but where one of them alone
    changes a module at strength 1.

    PARTS weigh components and blocks of one adapter: te1=0.5,OUT*=0, or the 12, 17, 20 or 26 block weights of Stable
    Diffusion's users. --method merges as models are merged: ties, dare and dare-ties work on ΔW and need a rule for its
    rank, knots and core on the small matrices between the adapters' common directions.

    \b
    Example:
      loratool combine a.safetensors:0.7 b.safetensors:0.4 -o both.safetensors
      loratool combine a.safetensors:0.7:te1=0 b.safetensors -o ab --rank 32
      loratool combine a/ b/ c/ -o abc/ --method ties --density 0.3 --rank 16
    """
    from loratool.verbs.combine.combine import combine

    # Without a rule the sum is exact: ranks add up.
    rule = rule_from_options(given, needed=False)
    report = combine([parse_weighted_adapter(text) for text in adapters], out, rule, **given)
    if show_report(report, as_json=as_json, quiet=quiet):
        print_facts(f"combined {len(adapters)} adapters into {report.out}", _facts(report))
        if verbose and report.lowered:
            print_converted(report.lowered)


def _facts(report: CombineReport) -> Iterator[tuple[str, str]]:
    for path, strength in report.adapters:
        yield f"{strength:g} ×", path
    yield "method", report.method
    yield "format", report.format
    yield "for", report.arch
    yield "modules", f"{report.modules}, {report.common} changed by several of them"
    if report.ranks:
        yield "rank", histogram(dict(report.ranks))
    if report.lowered:
        worst = report.worst
        at = f", {worst.error:.2%} at worst, in {worst.name}" if worst else ""
        yield "error", f"{report.error:.2%} of ‖ΔW‖ in all{at}"
    else:
        # Methods such as TIES drop and elect on purpose, which is no error of the ranks.
        yield "error", "none: the sum is exact" if report.method == "sum" else "none beside the method's own"
    yield "dtype", histogram(dict(report.dtypes))
    yield "size", size(report.nbytes)
