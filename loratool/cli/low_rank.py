"""`loratool resize`, and what it shares with `convert --to-lora`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.options import (
    alpha_option,
    json_option,
    overwrite_option,
    quiet_option,
    share,
    slots_option,
    verbose_option,
)
from loratool.cli.render import histogram, print_facts, print_json, print_table, size, warn
from loratool.header import DTYPE_OPTIONS

if TYPE_CHECKING:
    from loratool.ops.low_rank import Converted, LowRankReport
    from loratool.ranks import Rule


def rank_options(command: Callable[..., None]) -> Callable[..., None]:
    """What both commands take: input, output, how much to keep, the base, and how to report."""
    for option in reversed(
        [
            click.argument("adapter", type=click.Path(path_type=Path)),
            click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="What to write."),
            click.option("--rank", "--dim", type=click.IntRange(min=1), help="Rank of every module."),
            click.option("--max-error", type=share, metavar="SHARE", help="Largest error of a module: 5% or 0.05."),
            click.option("--base", type=click.Path(path_type=Path), help="The base, for kinds that depend on it."),
            click.option(
                "--dtype", type=click.Choice(list(DTYPE_OPTIONS)), help="Of new factors. Default: as the adapter's."
            ),
            alpha_option,
            slots_option,
            overwrite_option,
            json_option,
            quiet_option,
            verbose_option,
        ]
    ):
        command = option(command)
    return command


@click.command("resize", short_help="Lower an adapter's rank, at the least error.")
@rank_options
def resize_command(adapter: Path, **options: Any) -> None:
    """Write ADAPTER to OUT at another rank: the best approximation there is at that rank, and its error.

    Works on the factors, so that it takes milliseconds a layer. Other kinds become LoRA on the way; those that depend on
    the weight they change need --base.

    \b
    Example:
      loratool resize big.safetensors -o small.safetensors --rank 16
      loratool resize big.safetensors -o small.safetensors --max-error 5%
    """
    if options["rank"] is None and options["max_error"] is None:
        raise click.UsageError("give --rank or --max-error")
    from loratool.ops.low_rank import resize

    run_low_rank("resized", adapter, resize, **options)


def run_low_rank(
    done: str,
    adapter: Path,
    run: Callable[..., LowRankReport],
    *,
    out: Path,
    base: Path | None,
    alpha: float | None,
    slots: tuple[bool, ...] | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    dtype: str | None,
    **rule: Any,
) -> None:
    """Calls `run`, the library's `to_lora` or `resize`, and prints its report."""
    from loratool.adapter import Unsaid

    report = run(
        adapter,
        out,
        rank_rule(**rule),
        dtype=DTYPE_OPTIONS[dtype] if dtype else None,
        base=base,
        unsaid=Unsaid(alpha, slots or ()),
        overwrite=overwrite,
    )
    for warning in report.warnings:
        warn(warning)
    if as_json:
        print_json(report)
    elif not quiet:
        print_facts(f"{done} {adapter} to {report.out}", _facts(report))
        if verbose:
            print_converted(report.modules)


def print_converted(modules: Sequence[Converted]) -> None:
    """A table of modules that became LoRA, or LoRA of another rank."""
    rows = [[m.name, m.kind, str(m.rank), f"{m.norm:.4g}", f"{m.error:.2%}"] for m in modules]
    print_table(["module", "from", "rank", "norm", "error"], rows, numbers=("rank", "norm", "error"))


def rank_rule(*, rank: int | None, max_error: float | None) -> Rule:
    """How much to keep, from the options: all there is, where none is given."""
    from loratool.ranks import Rule

    if rank is not None and max_error is not None:
        raise click.UsageError("give --rank or --max-error, not both")
    if rank is not None:
        return Rule("rank", rank)
    return Rule() if max_error is None else Rule("max_error", max_error)


def _facts(report: LowRankReport) -> Iterator[tuple[str, str]]:
    kinds = histogram(Counter(module.kind for module in report.modules))
    changed = f"{len(report.modules)} rewritten ({kinds}), " if report.modules else ""
    yield "modules", f"{changed}{report.kept} kept as they were"
    if report.worst:
        yield "rank", histogram(Counter(module.rank for module in report.modules))
        yield "error", f"{report.error:.2%} of ‖ΔW‖ in all, {report.worst.error:.2%} at worst, in {report.worst.name}"
    yield "size", size(report.nbytes)
