"""`loratool compare`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli.inputs import expand_inputs, input_name
from loratool.cli.options import (
    arch_option,
    base_option,
    factors_device_option,
    json_option,
    parse_base_and_adapters,
    pickle_option,
    quiet_option,
    verbose_option,
)
from loratool.cli.render import print_facts, print_table, show_report

if TYPE_CHECKING:
    from loratool.verbs.compare.adapters import ModuleComparison
    from loratool.verbs.compare.checkpoints import CheckpointComparison
    from loratool.verbs.compare.compare import AdapterComparison, Comparison, MatrixComparison
    from loratool.verbs.compare.merges import MergeComparison

_SHOWN = 20
"""The number of modules, or tensors, that a table shows unless --verbose asks for all."""


@click.command("compare", short_help="Say whether adapters, or checkpoints, are the same.")
@click.argument("paths", nargs=-1, required=True, metavar="A B...", type=input_name, callback=expand_inputs)
@click.option("--to", "source", metavar="BASE+ADAPTER[:W]...", help="Check the merge A against what it is made of.")
@click.option("--tol", "tolerance", type=click.FloatRange(min=0), default=1e-6, show_default=True, help="Largest relative "
              "difference of a module that counts as the same.")  # fmt: skip
@base_option()
@arch_option()
@pickle_option
@factors_device_option
@json_option
@quiet_option
@verbose_option
@click.pass_context
def compare_command(
    ctx: click.Context,
    paths: tuple[Path, ...],
    source: str | None,
    tolerance: float,
    base: Path | None,
    arch: str | None,
    allow_pickle: bool,
    device: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Compare two adapters, whatever their formats, ranks and kinds are: ‖ΔW_A − ΔW_B‖, the cosine, and how much their
    spaces overlap, per module and in all. Exit code 1 where a module differs by more than --tol.

    More than two adapters are compared each with each. Two checkpoints are compared tensor by tensor. With --to, every
    number of the checkpoint A is compared with BASE + W · ΔW, to half a step of its dtype.

    \b
    Example:
      loratool compare style.safetensors style-diffusers.safetensors
      loratool compare a.safetensors b.safetensors c.safetensors
      loratool compare merged/ --to Llama-3-8B/+my-adapter/:1
    """
    from loratool.verbs.compare.compare import compare, compare_to

    report: Comparison | MergeComparison
    if source:
        if len(paths) != 1:
            raise click.UsageError("--to compares one checkpoint with what it is made of")
        model, adapters = parse_base_and_adapters(source)
        report = compare_to(paths[0], model, adapters, allow_pickle=allow_pickle, device=device)
    else:
        if len(paths) < 2:
            raise click.UsageError("name two or more adapters, or two checkpoints; or one checkpoint and --to")
        report = compare(paths, tolerance=tolerance, base=base, arch=arch, allow_pickle=allow_pickle, device=device)
    if show_report(report, as_json=as_json, quiet=quiet):
        _print(report, verbose=verbose)
    # As diff(1) has it: 1 is an answer too, so that scripts can ask.
    ctx.exit(0 if report.same else 1)


def _print(report: Comparison | MergeComparison, *, verbose: bool) -> None:
    # What the paths hold decides which of four reports `compare` returns.
    from loratool.verbs.compare.compare import AdapterComparison, MatrixComparison
    from loratool.verbs.compare.merges import MergeComparison

    if isinstance(report, AdapterComparison):
        print_facts(f"compared {report.one} with {report.other}", _of_adapters(report))
        _print_modules(report, verbose=verbose)
    elif isinstance(report, MatrixComparison):
        _print_matrix(report)
    elif isinstance(report, MergeComparison):
        _print_merge(report, verbose=verbose)
    else:
        _print_checkpoints(report, verbose=verbose)


def _of_adapters(report: AdapterComparison) -> Iterator[tuple[str, str]]:
    identical = sum(module.identical for module in report.modules)
    yield "verdict", _verdict(report, identical)
    yield "for", report.arch
    # A norm of 0 says that the adapter does not change the module; None, that only the base could tell the norm.
    alone = (
        (sum(m.other == 0 != m.one for m in report.modules), report.one),
        (sum(m.one == 0 != m.other for m in report.modules), report.other),
    )
    only = "".join(f", {count} only in {path}" for count, path in alone if count)
    yield "modules", f"{len(report.modules)}, {identical} with every number the same{only}"
    # One module of unknown norm leaves the sum unknown.
    if None not in report.norms:
        yield "norms", f"‖A‖ = {report.norms[0]:.6g}, ‖B‖ = {report.norms[1]:.6g}, ‖A − B‖ = {report.difference:.4g}"
    yield (
        "relative",
        f"{report.relative:.3g} of the larger"
        + (
            f"; {report.worst.relative:.3g} at worst, in {report.worst.name}"
            if report.worst and report.worst.relative
            else ""
        ),
    )
    if report.cosine is not None:
        yield "cosine", f"{report.cosine:.6f}"
    if report.overlap[0] is not None:
        yield "overlap", f"{report.overlap[0]:.1%} of what they write to, {report.overlap[1]:.1%} of what they read from"


def _verdict(report: AdapterComparison, identical: int) -> str:
    if identical == len(report.modules):
        return "the same adapter: every number is the same"
    if report.same:
        return f"the same adapter: no module differs by more than {report.tolerance:g} of its ΔW"
    count = sum(module.relative > report.tolerance for module in report.modules)
    return f"not the same: {count} of {len(report.modules)} modules differ by more than {report.tolerance:g} of their ΔW"


def _print_modules(report: AdapterComparison, *, verbose: bool) -> None:
    """Prints the modules that differ, the worst first; with `verbose` all modules, in order."""
    differing = sorted((m for m in report.modules if m.relative > report.tolerance), key=lambda m: -m.relative)
    shown = report.modules if verbose else differing[:_SHOWN]
    if not shown:
        return
    rows = [
        [m.name, _figure(m.one), _figure(m.other), f"{m.difference:.3g}", f"{m.relative:.3g}", *_directions(m)]
        for m in shown
    ]
    columns = ["module", "‖A‖", "‖B‖", "‖A − B‖", "relative", "cosine", "∠ out", "∠ in"]
    print_table(columns, rows, numbers=columns[1:])
    if not verbose and len(differing) > _SHOWN:
        print_facts(f"{len(differing) - _SHOWN} more differ; -v shows all", ())


def _print_matrix(report: MatrixComparison) -> None:
    size = range(len(report.paths))
    verdict = "all the same" if report.same else f"some pairs differ by more than {report.tolerance:g}"
    # Numbers stand for paths, which are too long to head a column.
    paths = [(f"{i + 1}", path) for i, path in enumerate(report.paths)]
    print_facts(f"compared {len(report.paths)} adapters", [("verdict", verdict), *paths])
    numbers = [f"{i + 1}" for i in size]
    apart = [[numbers[i], f"{report.norms[i]:.4g}", *(f"{report.differences[i][j]:.4g}" for j in size)] for i in size]
    print_table(["‖A − B‖", "‖A‖", *numbers], apart, numbers=["‖A‖", *numbers])
    cosines = [[numbers[i], *(_cosine(report.cosines[i][j]) for j in size)] for i in size]
    print_table(["cosine", *numbers], cosines, numbers=numbers)


def _of_checkpoints(report: CheckpointComparison) -> Iterator[tuple[str, str]]:
    total = report.identical + len(report.different)
    if not report.same:
        yield "verdict", "not the same"
    elif report.different:
        yield "verdict", f"the same: no tensor differs by more than {report.tolerance:g} of its norm"
    else:
        yield "verdict", "the same: every number is"
    yield "tensors", f"{report.identical} of {total} the same to the bit, {len(report.different)} differ"
    for path, names in ((report.one, report.only_one), (report.other, report.only_other)):
        if names:
            yield "only in", f"{path}: {len(names)}, such as {names[0]}"
    if report.norm:
        yield "relative", f"{report.difference / report.norm:.3g} of ‖A‖ = {report.norm:.6g} in all"


def _print_checkpoints(report: CheckpointComparison, *, verbose: bool) -> None:
    print_facts(f"compared {report.one} with {report.other}", _of_checkpoints(report))
    ordered = sorted(report.different, key=lambda tensor: -tensor.relative)
    rows = [
        [
            tensor.name,
            "+".join(dict.fromkeys(tensor.dtypes)),
            f"{tensor.changed:,} of {tensor.count:,}" if tensor.shapes[0] == tensor.shapes[1] else "another shape",
            # Infinite where there is nothing to relate the difference to: unlike shapes, or a zero tensor.
            "" if math.isinf(tensor.relative) else f"{tensor.relative:.3g}",
            f"{tensor.largest:.3g}",
            "" if tensor.ulps is None else f"{tensor.ulps:,}",
        ]
        for tensor in (ordered if verbose else ordered[:_SHOWN])
    ]
    if rows:
        columns = ["tensor", "dtype", "numbers", "relative", "largest", "ulps"]
        print_table(columns, rows, numbers=columns[2:])
    if not verbose and len(ordered) > _SHOWN:
        print_facts(f"{len(ordered) - _SHOWN} more differ; -v shows all", ())


def _of_merge(report: MergeComparison) -> Iterator[tuple[str, str]]:
    steps = "half a step" if report.allowed == 0.5 else "one step, as it was rounded by chance,"
    yield "verdict", f"within {steps} of it" if report.same else "not what it should be"
    yield "tensors", f"{report.tensors} compared, {report.changed} of them changed by the adapters"
    yield "numbers", f"{report.checked:,}, off by at most {report.worst:.3g} steps of their dtype"
    for what, names in (("missing", report.missing), ("extra", report.extra)):
        if names:
            yield what, f"{len(names)}, such as {names[0]}"
    if report.off:
        yield "off", f"{sum(off.count for off in report.off):,} numbers in {len(report.off)} tensors"


def _print_merge(report: MergeComparison, *, verbose: bool) -> None:
    sources = " + ".join(f"{strength:g} × {path}" for path, strength in report.adapters)
    print_facts(f"compared {report.merged} with {report.base} + {sources}", _of_merge(report))
    rows = [
        [off.name, f"{off.count:,}", f"{off.steps:.3g}", str(list(off.index)), f"{off.expected:.6g}", f"{off.found:.6g}"]
        for off in (report.off if verbose else report.off[:_SHOWN])
    ]
    if rows:
        columns = ["tensor", "off", "steps", "worst at", "expected", "found"]
        print_table(columns, rows, numbers=[column for column in columns[1:] if column != "worst at"])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _directions(module: ModuleComparison) -> tuple[str, ...]:
    """The cosine of a module's two ΔW, and the largest principal angle of outputs and of inputs."""
    widest = (f"{angles[-1]:.0f}°" if angles else "" for angles in (module.outputs, module.inputs))
    return (_cosine(module.cosine), *widest)


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
