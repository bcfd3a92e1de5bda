"""`convert --to`: an adapter in another format with exactly the same ΔW, compared with its source once it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratool.adapter.adapter import Adapter, Assumptions, inputs_of
from loratool.adapter.approximate import ApproximatedModule, approximate_adapter, error_of
from loratool.adapter.load import is_as_stored, open_source
from loratool.adapter.write import require_folder_name, write_adapter
from loratool.base.base import BaseCheckpoint, open_base
from loratool.errors import error_in_file
from loratool.files.adapter_files import AdapterFile
from loratool.files.adapter_writer import AdapterContents, write_contents
from loratool.files.history import history_entry, input_record
from loratool.files.paths import path_of
from loratool.files.tensors import TensorFile, torch_dtype
from loratool.formats.table import Format, format_named
from loratool.keys.resolve import Hints, resolve_routes
from loratool.numbers.ranks import Rule
from loratool.numbers.settings import steady_arithmetic
from loratool.verbs.reports import Report


@dataclass(frozen=True, slots=True)
class ConvertReport(Report):
    """What a conversion did: into which format, for which architecture, how many modules there were and are, how many of
    them were cut or stacked, and the largest relative difference of a module that reading the output again found. `lowered`
    are the modules that became LoRA first, and `error` is the relative error over them."""

    out: str
    format: str
    arch: str
    before: int
    after: int
    cut: int
    stacked: int
    alpha: str
    difference: float
    nbytes: int
    lowered: tuple[ApproximatedModule, ...] = ()
    error: float = 0.0


@steady_arithmetic()
def convert(
    adapter: Adapter | str | Path,
    out: str | Path,
    to: str,
    *,
    arch: str | None = None,
    base: str | Path | BaseCheckpoint | None = None,
    rule: Rule | None = None,
    dtype: str | None = None,
    from_format: str | None = None,
    assume: Assumptions | None = None,
    allow_pickle: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
) -> ConvertReport:
    """Writes an adapter to `out` in the format called `to`, with the same ΔW, and compares the output with its source.

    `arch` overrides the architecture that is detected, and `from_format`, a format's name, narrows detection to
    architectures that this format spells so; `base` is a checkpoint that has the modules' names. With a `rule`, other kinds
    become LoRA first. Raises `LoratoolError`, and writes nothing, where a delta has no exact form or no place in the format.
    """
    in_memory = isinstance(adapter, Adapter)
    with error_in_file(adapter.path if isinstance(adapter, Adapter) else adapter):
        adapter, target = open_source(adapter, allow_pickle=allow_pickle, assume=assume), format_named(to)
        out = path_of(out)
        require_folder_name(target, out)
        converted: list[ApproximatedModule] = []
        weights = open_base(base)
        # LoRA first: what has no exact form in the format can then be cut and stacked. Without a rule, a PEFT folder is
        # copied to a PEFT folder as it is, so that kinds which only PEFT has pass too.
        if rule is not None:
            adapter, converted = approximate_adapter(adapter, rule, torch_dtype(dtype), base=weights, device=device)
        # What is in memory need no longer be what its file holds.
        elif target.folder and (not in_memory or is_as_stored(adapter)) and (folder := _peft_folder(adapter)):
            return _copy_folder(adapter, folder, target, out, overwrite=overwrite)
        adapter = replace(adapter, metadata={**adapter.metadata, **_history(adapter, target, converted)})
        found, routes = resolve_routes([adapter.keys], target, Hints(arch, from_format, weights.layout if weights else None))
        written = write_adapter(adapter, target, routes, out, inputs=inputs_of([adapter], weights), overwrite=overwrite)
        report = _report(adapter, target, out, written.nbytes)
        return replace(
            report,
            arch=found.title,
            after=len({(item.prefix, item.path) for item in written.moved}),
            # A module whose parts are together in the target too is renamed only, and not cut.
            cut=sum(len(route.read.parts) > 1 and not route.renames for route in routes.values()),
            stacked=sum(len(item.sources) > 1 for item in written.moved),
            difference=written.difference,
            lowered=tuple(converted),
            error=error_of(converted),
        )


def _report(adapter: Adapter, target: Format, out: Path, nbytes: int) -> ConvertReport:
    """The report of a conversion that renamed nothing; `convert` fills in what it did beyond that."""
    count = len({change.module for change in adapter.changes})
    return ConvertReport(
        str(out), target.title, "any model", count, count, 0, 0, target.alpha, 0.0, nbytes, warnings=adapter.warnings
    )


def _history(adapter: Adapter, target: Format, converted: Sequence[ApproximatedModule]) -> dict[str, str]:
    """The metadata that tells of the conversion, with its error where deltas became LoRA."""
    error = {"error": f"{error_of(converted):.4e}"} if converted else {}
    return history_entry("convert", [input_record(adapter.path, adapter.file)], adapter.metadata, to=target.name, **error)


def _peft_folder(adapter: Adapter) -> AdapterFile | None:
    """The file that an adapter was read from, if it is a PEFT folder with its config and no pickle; else None."""
    file = adapter.file
    return file if file and file.path.is_dir() and file.config_file and not file.is_pickle else None


def _copy_folder(adapter: Adapter, source: AdapterFile, target: Format, out: Path, *, overwrite: bool) -> ConvertReport:
    """Copies a PEFT folder: all its tensors and its config, whatever its kind."""
    # Tensors go from file to file as they are, so there is nothing to read back and compare.
    with TensorFile(source.header) as file:
        tensors = {name: file.read(info) for name, info in source.header.tensors.items()}
    contents = AdapterContents(tensors, {**adapter.metadata, **_history(adapter, target, [])}, adapter.config)
    return _report(adapter, target, out, write_contents(contents, [source], out, overwrite=overwrite))
