"""`loratool convert`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli.options import json_option, overwrite_option, quiet_option, share, verbose_option
from loratool.cli.render import histogram, print_facts, print_json, print_table, size

if TYPE_CHECKING:
    from loratool.ops.to_lora import ToLoraReport


@click.command("convert", short_help="Turn any kind of delta into LoRA.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="File or folder to write.")
@click.option("--to-lora", is_flag=True, required=True, help="Write LoHa, LoKr, DoRA, OFT … as LoRA.")
@click.option("--rank", "--dim", type=click.IntRange(min=1), help="Rank of every module.")
@click.option("--max-error", type=share, metavar="SHARE", help="Largest relative error of a module: 5% or 0.05.")
@click.option("--base", type=click.Path(path_type=Path), help="The base, for kinds that depend on its weights.")
@overwrite_option
@json_option
@quiet_option
@verbose_option
def convert_command(
    adapter: Path,
    out: Path,
    to_lora: bool,
    rank: int | None,
    max_error: float | None,
    base: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write ADAPTER to OUT with every delta on a matrix or a kernel as a LoRA, and say what that leaves out.

    Without --rank or --max-error, exact factors are kept whole. Kinds that depend on the weight they change (DoRA, OFT,
    BOFT, (IA)³, GLoRA) need --base: their effective ΔW is taken from it module by module, and is not of low rank.

    \b
    Example:
      loratool convert loha.safetensors -o lora.safetensors --to-lora --rank 16
      loratool convert dora.safetensors -o lora.safetensors --to-lora --max-error 10% --base sdxl.safetensors
    """
    from loratool.ops.to_lora import to_lora as run

    if rank is not None and max_error is not None:
        raise click.UsageError("give --rank or --max-error, not both")
    report = run(adapter, out, rank=rank, max_error=max_error, base=base, overwrite=overwrite)
    if as_json:
        print_json(report)
    elif not quiet:
        print_facts(f"converted {adapter} to {report.out}", _facts(report))
        if verbose:
            rows = [[m.name, m.kind, str(m.rank), f"{m.norm:.4g}", f"{m.error:.2%}"] for m in report.modules]
            print_table(["module", "from", "rank", "norm", "error"], rows, numbers=("rank", "norm", "error"))


def _facts(report: ToLoraReport) -> Iterator[tuple[str, str]]:
    kinds = histogram(_counts(module.kind for module in report.modules))
    yield "modules", f"{len(report.modules)} converted ({kinds}), {report.kept} kept as they were"
    if report.worst:
        yield "rank", histogram(_counts(module.rank for module in report.modules))
        yield "error", f"{report.error:.2%} of ‖ΔW‖ in all, {report.worst.error:.2%} at worst, in {report.worst.name}"
    yield "size", size(report.nbytes)


def _counts(values: Iterator[object]) -> dict[object, int]:
    from collections import Counter

    return dict(Counter(values))
