"""`combine`: several adapters as one: Σ wᵢ ΔWᵢ, exact or at a lower rank, or the result of a method for merging models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loratool.adapter.adapter import Adapter, factor_workload, inputs_of
from loratool.adapter.approximate import ApproximatedModule, error_of
from loratool.adapter.load import open_source
from loratool.adapter.strengths import AdapterLike, weighted_adapters
from loratool.adapter.write import common_metadata, require_folder_name, write_adapter
from loratool.base.base import BaseCheckpoint, open_base
from loratool.deltas.methods import MERGE_METHODS, merge_deltas
from loratool.deltas.schema import SUM
from loratool.deltas.sums import Merge
from loratool.errors import LoratoolError, look_up
from loratool.files.history import HISTORY_KEY, history_entry, input_record
from loratool.files.output import require_target
from loratool.files.paths import path_of
from loratool.files.tensors import torch_dtype
from loratool.formats.table import format_named
from loratool.keys.identify import format_of
from loratool.keys.resolve import resolve_common_routes
from loratool.names import Module
from loratool.numbers.device_choice import open_devices
from loratool.numbers.ranks import Budget, Rule
from loratool.numbers.settings import steady_arithmetic
from loratool.verbs.combine.adapter_sum import AdapterSum, as_sum
from loratool.verbs.reports import Report, worst_of


@dataclass(frozen=True, slots=True)
class CombineMethod:
    """How deltas are merged: `SUM`, or a method of `deltas.methods`, the share `density` of the numbers that the method
    keeps, and the seed of its chances."""

    name: str = SUM
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        look_up(dict.fromkeys((SUM, *MERGE_METHODS)), self.name, "method")
        if not 0 < self.density <= 1:
            raise LoratoolError(f"`density={self.density:g}`: expected a share above 0, at most 1")

    @property
    def dense(self) -> bool:
        """Whether the merged delta is of full rank."""
        return self.name != SUM and MERGE_METHODS[self.name].dense

    @property
    def history(self) -> dict[str, Any]:
        """The method as the output's metadata records it; a sum has neither density nor seed."""
        return {"method": self.name} | ({} if self.name == SUM else {"density": self.density, "seed": self.seed})

    def merge_at(self, module: Module, owners: Sequence[int]) -> Merge:
        """The merge of deltas of the adapters `owners` at a module."""
        # Each module and adapter has its own seed: what is left out depends neither on threads nor on the order of modules.
        seeds = [f"{self.seed}/{module}/{owner}" for owner in owners]
        return partial(merge_deltas, method=self.name, density=self.density, seeds=seeds)


@dataclass(frozen=True, slots=True)
class CombineReport(Report):
    """What was combined: `common` is the number of parameters that several adapters change, `ranks` counts the modules of
    each rank in the output.

    `lowered` are the modules that a rule or a dtype approximated, and `error` is the relative error over them all; without
    a rule and a dtype the sum is exact.
    """

    out: str
    format: str
    arch: str
    method: str
    adapters: tuple[tuple[str, float], ...]
    modules: int
    common: int
    ranks: Mapping[int, int]
    dtypes: Mapping[str, int]
    lowered: tuple[ApproximatedModule, ...]
    error: float
    nbytes: int

    @property
    def worst(self) -> ApproximatedModule | None:
        """The module with the largest error."""
        return worst_of(self.lowered)


@steady_arithmetic()
def combine(
    adapters: Sequence[AdapterLike],
    out: str | Path,
    rule: Rule | Budget | None = None,
    *,
    method: str = SUM,
    density: float = 0.5,
    seed: int = 0,
    to: str | None = None,
    arch: str | None = None,
    base: str | Path | BaseCheckpoint | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
) -> CombineReport:
    """Writes to `out` one adapter that does what `adapters` do together, each at its strength, whatever their formats,
    ranks, kinds and dtypes are: exactly, with ranks that add up, or as well as the ranks that `rule` gives allow.

    `method` says how the deltas are merged: "sum", or a method of `deltas.methods`, which keeps the share `density` of the
    numbers, with `seed` for those that keep them by chance. `to` is a format's name (None: that of the first adapter),
    `arch` names the architecture where the adapters' names fit several, and `base` is the checkpoint for kinds that depend
    on their weight.

    Raises `LoratoolError`, and writes nothing, where the adapters are for different models, where a kind depends on its
    weight and there is no base, and where the output's format has no place for a sum.
    """
    out, how, stored = path_of(out), CombineMethod(method, density, seed), torch_dtype(dtype)
    given = weighted_adapters(adapters)
    if how.dense and rule is None:
        raise LoratoolError(
            f"`method={method!r}` makes ΔW of full rank; say how much of it to keep: "
            "`Rule('rank', ...)`, `Rule('max_error', ...)`, `Budget(nbytes=)` …"
        )
    loaded = [(open_source(each.adapter, allow_pickle=allow_pickle), each.full_strength) for each in given]
    sources = [adapter for adapter, _ in loaded]
    target = format_named(to) if to else format_of(sources[0].keys)
    require_folder_name(target, out)
    weights = open_base(base)
    require_target(out, folder=target.folder, overwrite=overwrite, inputs=inputs_of(sources, weights))
    found, routes = resolve_common_routes(
        [adapter.keys for adapter in sources], target, arch, weights.layout if weights else None
    )
    at = as_sum if method == SUM else how.merge_at
    # Sums and spectra are computed in float64, which Apple's GPUs lack.
    devices = open_devices(device, factor_workload(sources), doubles=True)
    combining = AdapterSum(target, found, routes, at, weights, devices)
    for number, (adapter, strength) in enumerate(loaded):
        combining.add(number, adapter, strength)
    made_of = [input_record(adapter.path, adapter.file, strength=strength.value) for adapter, strength in loaded]
    # `combining` has the changes from here on: another reference would keep every delta in memory until the end.
    sources = [replace(adapter, changes=()) for adapter in sources]
    strengths = [(str(adapter.path), strength.value) for adapter, strength in loaded]
    del loaded, given, adapter

    def describe(adapter: Adapter, error: float = 0.0) -> Adapter:
        said = how.history | ({} if rule is None else {"error": f"{error:.4e}"})
        # The history of one adapter goes on; several adapters have none in common.
        before = sources[0].metadata if len(sources) == 1 else {}
        return replace(adapter, metadata=_metadata(sources, adapter) | history_entry("combine", made_of, before, **said))

    combined, lowered = combining.materialise(sources, rule, stored, describe)
    # The error is known only now. Its width is fixed, so the size that a budget was met with still holds.
    combined = describe(combined, error_of(lowered))
    inputs = inputs_of(sources, weights)
    written = write_adapter(
        combined, combining.target, combining.routes_of(combined), out, inputs=inputs, overwrite=overwrite
    )
    return _report(combining, combined, strengths, method, lowered, out, written.nbytes)


def _report(
    combining: AdapterSum,
    combined: Adapter,
    strengths: Sequence[tuple[str, float]],
    method: str,
    lowered: Sequence[ApproximatedModule],
    out: Path,
    nbytes: int,
) -> CombineReport:
    leaves = [leaf for change in combined.changes for leaf in change.delta.leaves().values()]
    apart = ["no module is changed by two of the adapters"] if len(strengths) > 1 and not combining.common else []
    return CombineReport(
        out=str(out),
        format=combining.target.title,
        arch=combining.arch.title,
        method=method,
        adapters=tuple(strengths),
        modules=len({change.module for change in combined.changes}),
        common=combining.common,
        ranks=Counter(_ranks(combined)),
        dtypes=Counter(str(leaf.dtype).removeprefix("torch.") for leaf in leaves),
        lowered=tuple(lowered),
        error=error_of(lowered),
        nbytes=nbytes,
        warnings=(*combining.warnings, *combining.devices.warnings(), *apart),
    )


def _metadata(sources: Sequence[Adapter], whole: Adapter) -> dict[str, str]:
    """The metadata that all sources agree on, made true of `whole`, without their histories."""
    return {key: value for key, value in common_metadata(sources, whole).items() if key != HISTORY_KEY}


def _ranks(adapter: Adapter) -> list[int]:
    """The rank of each LoRA in `adapter`."""
    return [change.delta.rank or 0 for change in adapter.changes if change.delta.resizable]
