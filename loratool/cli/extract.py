"""`loratool extract`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.inputs import input_path
from loratool.cli.options import (
    arch_option,
    device_option,
    dry_run_option,
    dtype_option,
    exclude_option,
    include_option,
    json_option,
    output_option,
    overwrite_option,
    quiet_option,
    share,
    to_option,
    verbose_option,
)
from loratool.cli.rank_options import rank_rules, rule_from_options
from loratool.cli.render import print_device, print_facts, print_table, progress_bar, show_report
from loratool.text import histogram, message, size

if TYPE_CHECKING:
    from loratool.verbs.extract.extract import ExtractReport


@click.command("extract", short_help="Turn a fine-tuned checkpoint into an adapter.")
@click.argument("base", type=input_path)
@click.argument("tuned", type=input_path)
@output_option("File or folder to write.")
@partial(rank_rules, without=("round_ranks", "pad"))
@to_option()
@arch_option("Architecture of BASE, where its names fit several.")
@dtype_option("Of factors. Default: as TUNED stores each weight.")
@click.option("--split", type=click.Choice(["even", "up", "down"]), default="even", show_default=True, help="Side of σ.")
@click.option("--clamp-quantile", "clamp", type=share, metavar="SHARE", help="Cut factors as kohya does; only adds error.")
@include_option
@exclude_option
@device_option
@click.option("--resume", is_flag=True, help="Keep what is done in OUT.partial, and go on from there after an interruption.")
@overwrite_option
@dry_run_option("Print the plan, from the headers, and write nothing.")
@json_option
@quiet_option
@verbose_option
def extract_command(base: Path, tuned: Path, out: Path, as_json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
    """Write to OUT the adapter that makes TUNED of BASE: the best approximation of W' − W₀ at each rank, and its error.

    BASE and TUNED are safetensors files, or folders of Hugging Face or diffusers; shards may be cut differently, and names
    differ by a prefix or be those of two namings. OUT becomes a PEFT folder for language models, a kohya file for image
    models in one file, and a diffusers file for their folders, unless --to says otherwise.

    \b
    Example:
      loratool extract Llama-3-8B/ my-finetune/ -o adapter/ --rank 16
      loratool extract base/ tuned/ -o adapter/ --size 50MB
      loratool extract base/ tuned/ -o adapter/ --max-error 20% --max-rank 64
    """
    from loratool.adapter.selection import Selection
    from loratool.verbs.extract.extract import extract

    # Options that the verb takes under their own names stay in `given`.
    rule, selection = rule_from_options(given), Selection(given.pop("include"), given.pop("exclude"))
    assert rule
    with progress_bar("extracting", quiet=quiet) as progress:
        report = extract(base, tuned, out, rule, selection=selection, progress=progress, **given)
    if show_report(report, as_json=as_json, quiet=quiet):
        _print(report, base, tuned, verbose=verbose)


def _print(report: ExtractReport, base: Path, tuned: Path, *, verbose: bool) -> None:
    done = "would extract" if report.dry_run else "extracted"
    print_facts(f"{done} {tuned} − {base} to {report.out}", _plan(report) if report.dry_run else _facts(report))
    print_device(report, verbose=verbose)
    if verbose or report.dry_run:
        _print_modules(report)


def _plan(report: ExtractReport) -> Iterator[tuple[str, str]]:
    yield "format", report.format
    yield "for", report.arch
    held = histogram(Counter(module.held for module in report.modules))
    yield "parameters", f"{len(report.modules)} could be held ({held}), {len(report.left_out)} could not"
    yield "size", f"{size(report.nbytes)} if all of them changed" if report.nbytes else "depends on what they hold"


def _facts(report: ExtractReport) -> Iterator[tuple[str, str]]:
    yield "format", report.format
    yield "for", report.arch
    held = histogram(Counter(module.held for module in report.modules))
    excluded = f", {report.excluded} excluded" if report.excluded else ""
    yield "parameters", f"{len(report.modules)} held ({held}), {report.unchanged} unchanged{excluded}"
    ranks = Counter(module.rank for module in report.modules if module.rank)
    if ranks:
        yield "rank", histogram(ranks)
    yield from (("left out", line) for line in _left_out(report))
    worst = report.worst
    of = f"; {worst.error:.2%} at worst, in {worst.name}" if worst else ""
    yield "error", f"{report.error:.2%} of ‖W' − W₀‖ = {report.norm:.4g} in all{of}"
    yield "size", f"{size(report.nbytes)} in {report.seconds:.1f} s, peak memory {size(report.peak_bytes)}"


def _left_out(report: ExtractReport) -> Iterator[str]:
    """A line for each reason why parameters were left out: how many, and how much of the change."""
    # Shares are of squares, which add up; the root makes a norm's share of the sum.
    shares: dict[str, list[float]] = {}
    for left in report.left_out:
        shares.setdefault(left.why, []).append(left.share)
    for why, parts in shares.items():
        yield f"{len(parts)} with {sum(parts) ** 0.5:.2%} of ‖W' − W₀‖: {message(why)}"


def _print_modules(report: ExtractReport) -> None:
    rows = [
        [
            module.name,
            module.held,
            str(module.rank or ""),
            f"{module.norm:.4g}",
            f"{module.error:.2%}",
            f"{module.effective_rank:.3g}" if module.rank else "",
            "" if module.snr is None else f"{round(module.snr)} dB",
            f"{module.seconds:.2f}",
        ]
        for module in report.modules
    ]
    # What is not held at all is an error of all of it.
    rows += [[left.name, "left out", "", f"{left.norm:.4g}", "100.00%", "", "", ""] for left in report.left_out]
    # A plan is made from headers: nothing is measured yet.
    if report.dry_run:
        print_table(["parameter", "held as", "rank"], [row[:3] for row in rows], numbers=("rank",))
        return
    columns = ["parameter", "held as", "rank", "norm", "error", "eff. rank", "SNR", "s"]
    print_table(columns, rows, numbers=columns[2:])
