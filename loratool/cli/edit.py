"""`loratool edit`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.inputs import input_path
from loratool.cli.options import (
    arch_option,
    dry_run_option,
    json_option,
    output_option,
    overwrite_option,
    parse_component_strengths,
    parse_factors,
    quiet_option,
    vector,
    verbose_option,
)
from loratool.cli.render import print_facts, print_table, show_report
from loratool.text import size

if TYPE_CHECKING:
    from loratool.verbs.edit.edit import EditReport


@click.command("edit", short_help="Drop or scale modules, blocks and components.")
@click.argument("adapter", type=input_path)
@output_option("What to write; not with --dry-run.", required=False)
@click.option("--drop", multiple=True, metavar="GLOB", help="Leave out modules. Repeatable.")
@click.option("--keep", multiple=True, metavar="GLOB", help="Leave out all other modules. Repeatable.")
@click.option("--scale", multiple=True, metavar="GLOB=W", help="Multiply the strength of modules. Repeatable.")
@click.option("--blocks", type=vector, metavar="W,W,…", help="12, 17, 20 or 26 block weights of Stable Diffusion.")
@click.option("--component", "components", multiple=True, metavar="NAME=W", help="Weigh unet, te1, te2, te3 or model.")
@arch_option()
@overwrite_option
@dry_run_option("Print each block's share of ‖ΔW‖², before and after, and write nothing.")
@json_option
@quiet_option
@verbose_option
def edit_command(
    adapter: Path,
    out: Path | None,
    scale: tuple[str, ...],
    blocks: tuple[float, ...] | None,
    components: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **given: Any,
) -> None:
    """Write ADAPTER to OUT without some of its modules, or with some at another strength; 0 drops. All else keeps its bytes.

    A GLOB matches a module's name in the file, its path, or its block: IN00 to IN11, M00, OUT00 to OUT11 and BASE for the
    text encoders in Stable Diffusion, transformer_blocks.7 and the like in other models. Without edits, --dry-run shows how
    much of the adapter is in each block.

    \b
    Example:
      loratool edit style.safetensors --dry-run
      loratool edit style.safetensors -o unet-only.safetensors --drop BASE
      loratool edit a.safetensors -o b.safetensors --scale 'OUT*=0.5'
      loratool edit a.safetensors -o b --blocks 1,0,0,0,0,1,1,1,1,1,1,1
    """
    from loratool.adapter.strengths import Strength
    from loratool.verbs.edit.edit import edit

    # A run that would write an unchanged copy is a slip; a dry run without edits shows the blocks.
    asked = given["drop"] or given["keep"] or scale or blocks or components
    if not given["dry_run"] and not (out and asked):
        raise click.UsageError("give -o OUT and what to change, or --dry-run to see what there is")
    strength = Strength(1.0, blocks or (), parse_component_strengths(components))
    report = edit(adapter, out, scale=parse_factors("--scale", scale), strength=strength, **given)
    if show_report(report, as_json=as_json, quiet=quiet):
        print_facts(
            f"{'would edit' if report.dry_run else 'edited'} {adapter}" + (f" to {out}" if out else ""), _facts(report)
        )
        if report.dry_run or verbose:
            _print_blocks(report)
        if verbose:
            rows = [[m.name, m.block, "" if m.norm is None else f"{m.norm:.4g}", f"{m.factor:g}"] for m in report.modules]
            print_table(["module", "block", "norm", "×"], rows, numbers=("norm", "×"))


def _facts(report: EditReport) -> Iterator[tuple[str, str]]:
    yield "for", report.arch
    kept = len(report.modules) - report.dropped - report.scaled
    yield "modules", f"{kept} as they were, {report.scaled} scaled, {report.dropped} dropped"
    # Modules of unknown norm count as 0 on both sides; their number is shown below.
    before = sum((module.norm or 0.0) ** 2 for module in report.modules)
    after = sum(((module.norm or 0.0) * module.factor) ** 2 for module in report.modules)
    if before:
        yield "‖ΔW‖", f"{before**0.5:.4g} before, {after**0.5:.4g} after: {after / before:.1%} of ‖ΔW‖²"
    if report.unmeasured:
        yield "unmeasured", f"{report.unmeasured} modules of kinds whose norm depends on the weight"
    if not report.dry_run:
        yield "size", size(report.nbytes)


def _print_blocks(report: EditReport) -> None:
    columns = ["block", "modules", "of ‖ΔW‖²", "×", "after"]
    rows = [
        [b.name, str(b.modules), f"{b.before:.2%}", ", ".join(f"{factor:g}" for factor in b.factors), f"{b.after:.2%}"]
        for b in report.blocks
    ]
    print_table(columns, rows, numbers=columns[1:])
