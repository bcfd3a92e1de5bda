"""`loratool inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from loratool.cli.options import json_option
from loratool.cli.render import count, histogram, print_facts, print_json, print_table, safe, size

if TYPE_CHECKING:
    from loratool.ops.inspect import AdapterReport, CheckpointReport

TRAINING: Final = (
    "modelspec.title", "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_learning_rate", "ss_optimizer", "ss_num_train_images",
    "ss_num_epochs", "ss_steps", "ss_output_name", "software", "loratool",
)  # fmt: skip
"""The metadata that people ask after first."""


@click.command("inspect", short_help="Say what a file is, and why.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--modules", "list_modules", is_flag=True, help="List every module.")
@click.option("--values", is_flag=True, help="Read the tensors too: norms, spectra, NaN, zeros.")
@click.option("--base", type=click.Path(path_type=Path), help="Give the share of parameters of this whole checkpoint.")
@json_option
def inspect_command(files: tuple[Path, ...], list_modules: bool, values: bool, base: Path | None, as_json: bool) -> None:
    """Say what each of FILES is: its format, base architecture, modules, ranks, alphas and metadata.

    FILES are adapters (a file, a PEFT folder) or checkpoints (a file, a sharded or diffusers folder). Only headers are
    read, unless --values asks for more.

    \b
    Example:
      loratool inspect style.safetensors
      loratool inspect --modules --values adapter_folder/
    """
    from loratool.ops.inspect import AdapterReport, inspect

    for path in files:
        report = inspect(path, values=values, base=base)
        if as_json:
            print_json(report)
            continue
        print_facts(str(path), _adapter(report) if isinstance(report, AdapterReport) else _checkpoint(report))
        if isinstance(report, AdapterReport) and (list_modules or values):
            _print_modules(report)


def _adapter(report: AdapterReport) -> Iterator[tuple[str, str]]:
    yield "format", safe(report.format)
    yield "trainer", report.trainer or "not said in its metadata"
    yield "base", f"{report.arch.title}: {safe(report.arch.reason)}"
    if report.arch.candidates:
        yield "candidates", ", ".join(report.arch.candidates)
    yield "modules", histogram(dict(report.components))
    yield "kinds", histogram(dict(report.kinds))
    if report.ranks:
        yield "rank", histogram(dict(report.ranks))
        yield "alpha", histogram(dict(report.alphas))
    share = f" ({report.share:.2%} of those they change)" if report.share is not None else ""
    yield "size", f"{size(report.nbytes)} in {histogram(dict(report.dtypes))}"
    yield "parameters", f"{count(report.parameters)}{share}"
    yield from _metadata(report.metadata)
    yield from (("note", safe(line)) for line in report.suspicions)


def _checkpoint(report: CheckpointReport) -> Iterator[tuple[str, str]]:
    yield "format", report.format
    yield "base", f"{safe(report.arch.title)}: {safe(report.arch.reason)}"
    yield "tensors", histogram(dict(report.components))
    yield "size", f"{size(report.nbytes)} in {histogram(dict(report.dtypes))}"
    yield "parameters", count(report.parameters)
    if len(report.files) > 1:
        yield "files", f"{len(report.files)}: {safe(report.files[0])} to {safe(report.files[-1])}"
    yield from _metadata(report.metadata)
    yield from (("note", safe(line)) for line in report.suspicions)


def _metadata(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    known = [key for key in TRAINING if key in metadata]
    for key in known:
        yield safe(key), safe(metadata[key])
    if len(metadata) > len(known):
        yield "metadata", f"{len(metadata) - len(known)} more entries; --json shows them"


def _print_modules(report: AdapterReport) -> None:
    columns = ["module", "kind", "shape", "rank", "scale", "dtype"]
    measured = any(module.values for module in report.modules)
    if measured:
        columns += ["norm", "σ₁", "eff. rank", "remark"]
    rows = []
    for module in report.modules:
        shape = "×".join(map(str, module.shape)) if module.shape is not None else "?"
        scale = "" if module.scale is None else f"{module.scale:.4g}"
        row = [module.name, module.kind, shape, "" if module.rank is None else str(module.rank), scale, module.dtype]
        if measured:
            found = module.values
            row += (
                [f"{found.norm:.4g}", f"{found.largest:.4g}", f"{found.effective_rank:.3g}", found.remark]
                if found
                else [""] * 4
            )
        rows.append(row)
    print_table(columns, rows, numbers=("rank", "scale", "norm", "σ₁", "eff. rank"))
