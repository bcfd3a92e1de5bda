"""`loratool delta`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.inputs import input_path
from loratool.cli.options import (
    arch_option,
    base_option,
    device_option,
    dtype_option,
    exclude_option,
    include_option,
    json_option,
    output_option,
    overwrite_option,
    pickle_option,
    quiet_option,
    to_option,
    verbose_option,
)
from loratool.cli.render import print_device, print_facts, print_table, progress_bar, show_report
from loratool.text import size

if TYPE_CHECKING:
    from loratool.verbs.delta.delta import DeltaReport
    from loratool.verbs.delta.measure import ModuleMeasure

_SHOWN = 20
LEADING = 8
"""The number of singular values of a module that are shown before the last one."""


@click.command("delta", short_help="Measure or write out ΔW: of an adapter, or between two checkpoints.")
@click.argument("path", type=input_path, metavar="ADAPTER|BASE")
@click.argument("tuned", type=input_path, metavar="[TUNED]", required=False)
@output_option("Write ΔW whole to this file.", required=False)
@base_option("Base of ADAPTER: for ‖ΔW‖/‖W₀‖, and kinds that depend on it.")
@to_option("Names to write. Default: ADAPTER's, else kohya's.")
@arch_option("Architecture, where the names fit several.")
@dtype_option("Of what is written. Default: float32.")
@click.option("--top", default=_SHOWN, show_default=True, type=click.IntRange(0), help="Modules to show; 0 shows all.")
@click.option("--by", type=click.Choice(["norm", "relative"]), default="norm", show_default=True, help="Order of modules.")
@click.option("--spectrum", is_flag=True, help="All singular values, of large matrices too.")
@include_option
@exclude_option
@pickle_option
@device_option
@overwrite_option
@json_option
@quiet_option
@verbose_option
def delta_command(
    path: Path,
    tuned: Path | None,
    out: Path | None,
    top: int,
    by: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Show how large ΔW is, module by module: what ADAPTER adds, or TUNED − BASE. With -o, write it whole.

    σ₁ is the largest singular value, the stable rank ‖ΔW‖²/σ₁², the effective rank the exponential of the entropy of all
    singular values; without --spectrum it is left out for large matrices that have no factors.

    \b
    Example:
      loratool delta style.safetensors
      loratool delta style.safetensors -o full.safetensors --dtype bfloat16
      loratool delta Llama-3-8B/ my-finetune/ --by relative --top 10
    """
    from loratool.adapter.selection import Selection
    from loratool.verbs.delta.delta import delta

    with progress_bar("measuring", quiet=quiet) as progress:
        report = delta(path, tuned, out, selection=Selection(include, exclude), progress=progress, **options)
    if show_report(report, as_json=as_json, quiet=quiet):
        print_facts(f"ΔW of {report.what}", _facts(report))
        print_device(report, verbose=verbose)
        _print_modules(report, top, by)


def _facts(report: DeltaReport) -> Iterator[tuple[str, str]]:
    unchanged = f", {report.unchanged} unchanged" if report.unchanged else ""
    yield "parameters", f"{len(report.modules)} changed{unchanged}"
    relative = f", {report.relative:.3%} of the weights it changes" if report.relative is not None else ""
    yield "‖ΔW‖", f"{report.norm:.6g}{relative}"
    if report.out:
        yield "written", f"{report.out} with {report.format}, {size(report.nbytes)}"
        yield "error", f"{report.error:.2e} by rounding to its dtype" if report.error else "none: float32"
    if report.left_out:
        yield "left out", f"{len(report.left_out)} that {report.format} has no place for, the first is {report.left_out[0]}"
    yield "computed", f"on {report.device} in {report.seconds:.1f} s, peak memory {size(report.peak_bytes)}"


def _print_modules(report: DeltaReport, top: int, by: str) -> None:
    key = {"norm": lambda module: -module.norm, "relative": lambda module: -(module.relative or 0.0)}[by]
    # Sorting is stable: without a base, every relative size counts as 0 and --by relative keeps the file's order.
    ordered = sorted(report.modules, key=key)
    shown = ordered[:top] if top else ordered
    # ‖ΔW‖/‖W₀‖ needs the weight: an adapter without --base has no such column.
    known = any(module.relative is not None for module in report.modules)
    rows = [_row(module, known=known) for module in shown]
    columns = ["parameter", "‖ΔW‖", *(["/ ‖W₀‖"] if known else []), "share", "σ₁", "stable", "effective"]
    print_table(columns, rows, numbers=columns[1:])
    if len(shown) < len(ordered):
        print_facts(f"{len(ordered) - len(shown)} more; --top 0 shows all", ())
    if any(module.spectrum for module in shown):
        print_table(["parameter", "singular values"], [[module.name, _spectrum(module)] for module in shown])


def _row(module: ModuleMeasure, *, known: bool) -> list[str]:
    return [
        module.name,
        f"{module.norm:.4g}",
        *(["" if module.relative is None else f"{module.relative:.2%}"] if known else []),
        f"{module.share:.2%}",
        f"{module.sigma:.4g}",
        f"{module.stable_rank:.3g}",
        "" if module.effective_rank is None else f"{module.effective_rank:.3g}",
    ]


def _spectrum(module: ModuleMeasure) -> str:
    leading = " ".join(f"{value:.3g}" for value in module.spectrum[:LEADING])
    more = len(module.spectrum) - LEADING
    return f"{leading} … {module.spectrum[-1]:.2g} ({more} more)" if more > 0 else leading
