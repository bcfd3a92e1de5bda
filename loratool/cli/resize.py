"""`loratool resize`, and what it shares with `convert --to-lora`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.inputs import input_path
from loratool.cli.options import (
    KEEPING,
    Decorator,
    alpha_option,
    base_option,
    dtype_option,
    factors_device_option,
    json_option,
    output_option,
    overwrite_option,
    quiet_option,
    slots_option,
    verbose_option,
)
from loratool.cli.rank_options import rank_rules, rule_from_options
from loratool.cli.render import print_facts, print_table, show_report
from loratool.text import histogram, size

if TYPE_CHECKING:
    from loratool.adapter.approximate import ApproximatedModule
    from loratool.numbers.ranks import Budget, Rule
    from loratool.verbs.resize import ResizeReport


def rank_options(
    command: Callable[..., None],
    *,
    without: Sequence[str] = ("auto", "size", "total_error", "round_ranks", "pad"),
    writes: bool = True,
) -> Callable[..., None]:
    """Adds the options of `resize` and `convert`: input, output, how much to keep, the base, and how to report."""
    # Decorators apply from the inside out: what comes last on the help page is added first.
    after: list[Decorator] = [
        base_option(),
        dtype_option("Of new factors. Default: as the adapter's."),
        alpha_option,
        slots_option,
        factors_device_option,
        overwrite_option,
        json_option,
        quiet_option,
        verbose_option,
    ]
    before: list[Decorator] = [
        click.argument("adapter", type=input_path),
        output_option(required=writes),
    ]
    for option in reversed(after):
        command = option(command)
    command = rank_rules(command, without=without)
    for option in reversed(before):
        command = option(command)
    return command


@click.command("resize", short_help="Lower an adapter's rank, at the least error.")
@partial(rank_options, without=("auto",), writes=False)
@click.option("--weigh", type=click.Choice(["base"]), help="Errors count relative to the weights of --base.")
@click.option("--frontier", is_flag=True, help="Print size against error against rank, and write nothing.")
@click.option("--dynamic-method", type=click.Choice(KEEPING), help="kohya's name for --keep, with --dynamic-param.")
@click.option("--dynamic-param", type=float, metavar="X", help="The value of --dynamic-method.")
def resize_command(
    adapter: Path,
    dynamic_method: str | None,
    dynamic_param: float | None,
    weigh: str | None,
    *,
    frontier: bool,
    **options: Any,
) -> None:
    """Write ADAPTER to OUT at another rank: the best approximation there is at that rank, and its error.

    Works on the factors, so that it takes milliseconds a layer. Other kinds become LoRA on the way; those that depend on
    the weight they change need --base.

    \b
    Example:
      loratool resize big.safetensors -o small.safetensors --rank 16
      loratool resize big.safetensors -o small.safetensors --max-error 5%
      loratool resize big.safetensors -o small.safetensors --size 20MB
      loratool resize adapter/ -o served/ --rank 24 --round-ranks vllm --pad
      loratool resize big.safetensors --frontier
    """
    if frontier:
        _print_frontier(adapter, **options)
        return
    if not options["out"]:
        raise click.UsageError("give -o OUT, or --frontier to write nothing")
    if (dynamic_method is None) != (dynamic_param is None):
        raise click.UsageError("--dynamic-method and --dynamic-param go together")
    if dynamic_method:
        if options["keep"]:
            raise click.UsageError("give --keep or --dynamic-method, not both")
        options["keep"] = dynamic_method, dynamic_param
        # kohya's --new_rank bounds what a dynamic method gives.
        options["max_rank"], options["rank"] = options["max_rank"] or options["rank"], None
    # Behind the checks above, since torch comes with these: an error of usage is told at once.
    from loratool.numbers.ranks import Budget
    from loratool.verbs.resize import resize

    rule = rule_from_options(options)
    if weigh and not (options["base"] and isinstance(rule, Budget)):
        raise click.UsageError("--weigh base goes with --base, and with --size or --total-error, which share one budget")
    run_low_rank("resized", adapter, partial(resize, weigh=weigh is not None), rule, **options)


def _print_frontier(
    adapter: Path,
    *,
    base: Path | None,
    alpha: float | None,
    slots: tuple[bool, ...] | None,
    as_json: bool,
    dtype: str | None,
    device: str,
    quiet: bool,
    **others: Any,
) -> None:
    from loratool.adapter.adapter import Assumptions
    from loratool.verbs.resize import frontier

    # What is left in `others` says how to write or how much to keep; -v alone would do no harm.
    given = [
        name
        for name, value in others.items()
        if value is not None and value is not False and value != () and name != "verbose"
    ]
    if given:
        raise click.UsageError(f"--frontier shows every rank and writes nothing; {', '.join(given)} does not go with it")
    report = frontier(adapter, dtype=dtype, base=base, assume=Assumptions(alpha, slots or ()), device=device)
    if show_report(report, as_json=as_json, quiet=quiet):
        print_facts(f"{adapter}", [("modules", f"{report.modules}, ‖ΔW‖ = {report.norm:.4g}")])
        rows = [[str(c.rank), size(c.nbytes), *(f"{e:.2%}" for e in (c.error, c.worst, c.shared))] for c in report.choices]
        columns = ["rank of all", "size", "error", "worst module", "as much by --size"]
        print_table(columns, rows, numbers=columns)


def run_low_rank(
    done: str,
    adapter: Path,
    run: Callable[..., ResizeReport],
    rule: Rule | Budget | None,
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
    device: str,
) -> None:
    """Calls `run`, the library's `to_lora` or `resize`, and prints its report; `done` is the verb in the past tense."""
    from loratool.adapter.adapter import Assumptions

    report = run(
        adapter,
        out,
        rule,
        dtype=dtype,
        base=base,
        assume=Assumptions(alpha, slots or ()),
        device=device,
        overwrite=overwrite,
    )
    if show_report(report, as_json=as_json, quiet=quiet):
        print_facts(f"{done} {adapter} to {report.out}", _facts(report))
        if verbose:
            print_converted(report.modules)


def print_converted(modules: Sequence[ApproximatedModule]) -> None:
    """Prints a table of the modules that became LoRA, or LoRA of another rank."""
    rows = [[m.name, m.kind, str(m.rank), f"{m.norm:.4g}", f"{m.error:.2%}"] for m in modules]
    print_table(["module", "from", "rank", "norm", "error"], rows, numbers=("rank", "norm", "error"))


def _facts(report: ResizeReport) -> Iterator[tuple[str, str]]:
    kinds = histogram(Counter(module.kind for module in report.modules))
    # A budget may find a module worth no rank at all.
    dropped = [module for module in report.modules if not module.rank]
    changed = f"{len(report.modules)} rewritten ({kinds}), " if report.modules else ""
    yield "modules", f"{changed}{report.kept} kept as they were"
    if dropped:
        share = sum(module.norm**2 for module in dropped) / sum(module.norm**2 for module in report.modules)
        yield "dropped", f"{len(dropped)} that no rank was worth its bytes of, with {share**0.5:.2%} of ‖ΔW‖"
    if report.worst:
        yield "rank", histogram(Counter(module.rank for module in report.modules))
        if report.weighed is not None:
            yield "weighed", f"{report.weighed:.2%} where each module counts relative to its weight"
        yield "error", f"{report.error:.2%} of ‖ΔW‖ in all, {report.worst.error:.2%} at worst, in {report.worst.name}"
    yield "size", size(report.nbytes)
