"""`loratool inspect`."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from loratool.cli.inputs import expand_inputs, input_name
from loratool.cli.options import base_option, json_option
from loratool.cli.render import print_facts, print_json, print_table
from loratool.errors import LoratoolError
from loratool.flags import in_flags
from loratool.text import count, histogram, message, safe, size

if TYPE_CHECKING:
    from loratool.keys.listing import AdapterListing
    from loratool.verbs.inspect.inspect import AdapterReport, CheckpointReport

_TRAINING: Final = (
    "modelspec.title", "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_learning_rate", "ss_optimizer", "ss_num_train_images",
    "ss_num_epochs", "ss_steps", "ss_output_name", "software",
)  # fmt: skip
"""The metadata keys that people ask after first, in the order in which they are shown."""
_SHADES: Final = "░▒▓█"
_LETTERS: Final = string.ascii_lowercase + string.ascii_uppercase + string.digits
_TOLD: Final = frozenset({"version", "command", "adapters", "before", "modules", "columns", "left_out"})
"""Keys of a step in a history that `_history` words itself, or that are too long for a line."""


@click.command("inspect", short_help="Say what a file is, and why.")
@click.argument("files", nargs=-1, required=True, type=input_name, callback=expand_inputs)
@click.option("--modules", "list_modules", is_flag=True, help="List every module.")
@click.option("--values", is_flag=True, help="Read the tensors too: norms, spectra, NaN, zeros.")
@click.option("--plot", is_flag=True, help="Draw ‖ΔW‖ by block and sort of module.")
@base_option("Give the share of parameters of this whole checkpoint.")
@json_option
def inspect_command(
    files: tuple[Path, ...], list_modules: bool, values: bool, plot: bool, base: Path | None, as_json: bool
) -> None:
    """Say what each of FILES is: its format, base architecture, modules, ranks, alphas and metadata.

    FILES are adapters (a file, a PEFT folder) or checkpoints (a file, a sharded or diffusers folder); a folder of adapters
    becomes one table. Only headers are read, unless --values or --plot asks for more.

    \b
    Example:
      loratool inspect style.safetensors
      loratool inspect --modules --values adapter_folder/
      loratool inspect loras/
    """
    from loratool.keys.listing import AdapterListing, open_input
    from loratool.verbs.inspect.inspect import AdapterReport, adapters_in, inspect_input

    # Each file is reported as soon as it is read: of many, those before a broken one are shown.
    for path in files:
        kept = adapters_in(path)
        if kept is not None:
            _print_folder(path, kept, as_json=as_json)
            continue
        found = open_input(path)
        report = inspect_input(found, values=values, base=base)
        if as_json:
            print_json(report)
            continue
        print_facts(str(path), _adapter(report) if isinstance(report, AdapterReport) else _checkpoint(report))
        if isinstance(report, AdapterReport) and (list_modules or values):
            _print_modules(report)
        if isinstance(found, AdapterListing) and plot:
            _print_map(found)


def _print_folder(folder: Path, paths: Iterable[Path], *, as_json: bool) -> None:
    """Prints a line for each adapter of a folder, and below the table the errors of files that cannot be read."""
    from loratool.verbs.inspect.inspect import AdapterReport, inspect

    reports: list[AdapterReport | CheckpointReport] = []
    failed = []
    for path in paths:
        try:
            reports.append(inspect(path))
        except LoratoolError as error:
            # One broken file must not hide a folder of good ones.
            failed.append(in_flags(str(error)))
    if as_json:
        print_json({"adapters": reports, "errors": failed})
        return
    rows = []
    for report in reports:
        ranks = histogram(dict(report.ranks), 1) if isinstance(report, AdapterReport) else ""
        kinds = ", ".join(report.kinds) if isinstance(report, AdapterReport) else "checkpoint"
        rows.append([Path(report.path).name, report.arch.title, kinds, ranks, size(report.nbytes)])
    print_table(["name", "base", "kinds", "rank", "size"], rows, numbers=("size",))
    click.echo()
    total = f"{size(sum(report.nbytes for report in reports))} in {len(reports)} files"
    print_facts(str(folder), [("sum", total), *(("unread", line) for line in failed)])


def _print_map(listing: AdapterListing) -> None:
    """Prints a map of ‖ΔW‖: blocks from top to bottom, sorts of modules from left to right under letters."""
    from loratool.adapter.load import load_listing
    from loratool.verbs.inspect.block_map import block_map

    found = block_map(load_listing(listing))
    width = max(map(len, found.rows), default=0)
    # Names of sorts are longer than a cell is wide: a letter heads each column, and a legend below spells them out.
    letters = [_LETTERS[place % len(_LETTERS)] for place in range(len(found.columns))]
    click.echo(f"\n  {'':{width}}  {' '.join(letters)}")
    for name, row in zip(found.rows, found.cells, strict=True):
        click.echo(f"  {safe(name):{width}}  {' '.join(_shade(cell, found.largest) for cell in row)}".rstrip())
    legend = [(letter, column) for letter, column in zip(letters, found.columns, strict=True)]
    click.echo()
    print_facts(f"  ‖ΔW‖ from {_SHADES[0]} (a quarter of {found.largest:.3g} or less) to {_SHADES[-1]}; · no module", legend)
    if found.unmeasured:
        print_facts("", [("left out", f"{found.unmeasured} changes whose norm only the base could tell")])


def _shade(cell: float | None, largest: float) -> str:
    if cell is None:
        return "·"
    # The largest value itself would be one shade beyond the last; a map of zeros has no largest to relate to.
    return _SHADES[min(int(cell / largest * len(_SHADES)), len(_SHADES) - 1)] if largest else _SHADES[0]


def _adapter(report: AdapterReport) -> Iterator[tuple[str, str]]:
    yield "format", safe(report.format)
    if report.peft_type:
        yield "peft_type", safe(report.peft_type)
    yield "trainer", report.trainer or "not said in its metadata"
    yield "base", f"{report.arch.title}: {safe(report.arch.reason)}"
    if report.arch.candidates:
        yield "candidates", ", ".join(report.arch.candidates)
    yield from report.lines()
    share = f" ({report.share:.2%} of those they change)" if report.share is not None else ""
    yield "parameters", f"{count(report.parameters)}{share}"
    yield from _metadata(report.metadata)
    yield from _history(report.history)
    yield from (("note", message(line)) for line in report.suspicions)


def _checkpoint(report: CheckpointReport) -> Iterator[tuple[str, str]]:
    yield "format", report.format
    yield "base", f"{safe(report.arch.title)}: {safe(report.arch.reason)}"
    yield "tensors", histogram(dict(report.components))
    yield "size", f"{size(report.nbytes)} in {histogram(dict(report.dtypes))}"
    yield "parameters", count(report.parameters)
    if len(report.files) > 1:
        yield "files", f"{len(report.files)}: {safe(report.files[0])} to {safe(report.files[-1])}"
    yield from _metadata(report.metadata)
    yield from _history(report.history)
    yield from (("note", message(line)) for line in report.suspicions)


def _metadata(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    known = [key for key in _TRAINING if key in metadata]
    for key in known:
        yield safe(key), safe(metadata[key])
    # loratool's own entry is shown as the history.
    more = len(metadata.keys() - {*known, "loratool"})
    if more:
        yield "metadata", f"{more} more {'entry' if more == 1 else 'entries'}; meta show prints them"


def _history(steps: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Lines on what was done to the file, the last command first."""
    for number, step in enumerate(steps):
        # Metadata is a stranger's: whatever is not shaped like a list of inputs is passed over.
        adapters = step.get("adapters")
        known = [each for each in adapters if isinstance(each, Mapping)] if isinstance(adapters, list) else []
        inputs = [f"{each.get('name')}{_strength(each)}{_hash(each)}" for each in known]
        about = {key: value for key, value in step.items() if key not in _TOLD and value is not None}
        # Lists and objects are too long for a line; --json has them.
        said = [f"{key} {value}" for key, value in about.items() if isinstance(value, str | int | float)]
        made = f"{step['command']} {' + '.join(inputs)}".strip()
        yield "history" if number == 0 else "", safe("; ".join([made, *said, f"loratool {step.get('version')}"]))


def _strength(adapter: Mapping[str, Any]) -> str:
    return f":{adapter['strength']:g}" if isinstance(adapter.get("strength"), int | float) else ""


def _hash(adapter: Mapping[str, Any]) -> str:
    return f" ({adapter['autov3']})" if adapter.get("autov3") else ""


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
