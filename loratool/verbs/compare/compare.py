"""`compare`: whether adapters, checkpoints, or a merge and its sources, agree, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.adapter.adapter import Adapter, factor_workload, require_unchanged
from loratool.adapter.load import open_any
from loratool.adapter.strengths import AdapterLike
from loratool.base.base import BaseCheckpoint, open_base
from loratool.errors import LoratoolError
from loratool.files.layout import Layout, open_layout, require_weights
from loratool.files.paths import path_of
from loratool.numbers.device_choice import open_devices
from loratool.numbers.devices import DevicePool
from loratool.numbers.settings import steady_arithmetic
from loratool.numbers.workload import Workload
from loratool.verbs.compare.adapters import (
    AlignedAdapters,
    ModuleComparison,
    align_adapters,
    compare_modules,
    inner_products,
)
from loratool.verbs.compare.checkpoints import CheckpointComparison, compare_checkpoints
from loratool.verbs.compare.merges import MergeComparison, compare_merge
from loratool.verbs.merge.plan import make_plan
from loratool.verbs.merge.write import open_inputs
from loratool.verbs.reports import Report

_TOLERANCE: Final = 1e-6
"""The relative difference that rounding a scale, or its product with a factor, to float32 may make."""


@dataclass(frozen=True, slots=True)
class AdapterComparison(Report):
    """Two adapters, over all `modules`: ‖ΔW‖ of each, ‖ΔW_A − ΔW_B‖, absolute and relative to the larger norm, and the
    cosine of the two changes.

    `overlap` is the mean squared cosine of the principal angles between the spaces that the adapters write to, and between
    those that the adapters read from: 1 for one space inside the other, 0 for spaces at right angles. Norms are None where
    only a base could tell them.
    """

    one: str
    other: str
    format: str
    arch: str
    modules: tuple[ModuleComparison, ...]
    norms: tuple[float | None, float | None]
    difference: float
    relative: float
    cosine: float | None
    overlap: tuple[float | None, float | None]
    tolerance: float
    same: bool
    what: str = "adapters"

    @property
    def worst(self) -> ModuleComparison | None:
        """The module with the largest relative difference."""
        return max(self.modules, key=lambda module: module.relative, default=None)


@dataclass(frozen=True, slots=True)
class MatrixComparison(Report):
    """Several adapters: ‖ΔW‖ of each adapter, and ‖ΔW_i − ΔW_j‖ and the cosine of each pair."""

    paths: tuple[str, ...]
    norms: tuple[float, ...]
    differences: tuple[tuple[float, ...], ...]
    cosines: tuple[tuple[float | None, ...], ...]
    tolerance: float
    same: bool
    what: str = "matrix"


Comparison = AdapterComparison | MatrixComparison | CheckpointComparison


@steady_arithmetic()
def compare(
    paths: Sequence[str | Path | Adapter],
    *,
    tolerance: float = _TOLERANCE,
    base: str | Path | BaseCheckpoint | None = None,
    arch: str | None = None,
    allow_pickle: bool = False,
    device: str = "cpu",
) -> Comparison:
    """Compares two adapters, whatever their formats and kinds; more than two adapters, each with each; or two checkpoints.

    Inputs are the same where no module, or no tensor, differs by more than `tolerance` of its norm. `base` is for kinds that
    depend on the weight, `arch` names the architecture where names fit several.

    Raises `LoratoolError` where adapters and checkpoints are mixed, or adapters are for different models.
    """
    if len(paths) < 2:
        raise LoratoolError("name two or more adapters, or two checkpoints")

    def open_one(path: str | Path | Adapter) -> Adapter | Layout:
        if isinstance(path, Adapter):
            return path
        return open_any(path_of(path), allow_pickle=allow_pickle)

    found = [open_one(path) for path in paths]
    layouts = [each for each in found if isinstance(each, Layout)]
    adapters = [each for each in found if isinstance(each, Adapter)]
    if layouts and adapters:
        names = ", ".join(str(path) for path in paths if not isinstance(path, Adapter))
        raise LoratoolError(
            f"{names}: some are adapters and some are checkpoints; `compare_to()` compares a merge with its sources"
        )
    if layouts:
        if len(layouts) > 2:
            raise LoratoolError("checkpoints are compared two at a time")
        one, other = map(BaseCheckpoint, layouts)
        # Differences are taken in float64, which Apple's GPUs lack.
        devices = open_devices(device, Workload(sum(layout.nbytes for layout in layouts)), doubles=True)
        return compare_checkpoints(one, other, tolerance, devices)
    devices = open_devices(device, factor_workload(adapters), doubles=True)
    aligned_adapters = align_adapters(adapters, arch, open_base(base))
    report = (_matrix if len(adapters) > 2 else _pair)(adapters, aligned_adapters, tolerance, devices)
    # No output is committed here, which would check the inputs: a file that was replaced meanwhile has to be noticed now.
    require_unchanged(adapters)
    return report


@steady_arithmetic()
def compare_to(
    merged: str | Path,
    base: str | Path,
    adapters: Sequence[AdapterLike],
    *,
    allow_pickle: bool = False,
    device: str = "cpu",
) -> MergeComparison:
    """Compares the checkpoint `merged`, number by number, with what merging `adapters` into `base` should make: the two are
    the same where no number is off by more than half a step of its dtype (a whole step after stochastic rounding)."""
    layout = open_layout(path_of(base))
    require_weights(layout, "its numbers are not those that a merge adds to")
    inputs = open_inputs(adapters, allow_pickle=allow_pickle)
    plan = make_plan(layout, inputs)
    names = tuple((str(each.adapter.path), each.strength.value) for each in inputs)
    # The merged checkpoint is read instead of written.
    work = plan.workload()
    devices = open_devices(device, replace(work, read=work.read + work.written, written=0), doubles=True)
    report = compare_merge(BaseCheckpoint(path_of(merged)), plan, names, devices)
    require_unchanged([each.adapter for each in inputs])
    return report


def _pair(adapters: Sequence[Adapter], found: AlignedAdapters, tolerance: float, devices: DevicePool) -> AdapterComparison:
    """The comparison of two adapters, summed up from their modules."""
    names = [str(adapter.path) for adapter in adapters]
    modules = compare_modules(found, devices)
    norms = _norm(modules, "one"), _norm(modules, "other")
    # Modules are parts of one long vector: norms add up as squares, and inner products (cosine times norms) plainly.
    difference = math.hypot(*(module.difference for module in modules))
    largest = max((norm for norm in norms if norm), default=0.0)
    product = (norms[0] or 0.0) * (norms[1] or 0.0)
    inner = math.fsum((m.cosine or 0.0) * (m.one or 0.0) * (m.other or 0.0) for m in modules)
    return AdapterComparison(
        one=names[0],
        other=names[1],
        format=found.format.title,
        arch=found.arch,
        modules=tuple(modules),
        norms=norms,
        difference=difference,
        relative=difference / largest if largest else 0.0,
        cosine=max(-1.0, min(1.0, inner / product)) if product else None,
        overlap=(_overlap([m.outputs for m in modules]), _overlap([m.inputs for m in modules])),
        tolerance=tolerance,
        # Each module by itself: a small one that differs would not be seen in the total.
        same=all(module.relative <= tolerance for module in modules),
        warnings=_notes(adapters, devices),
    )


def _norm(modules: Sequence[ModuleComparison], which: str) -> float | None:
    """‖ΔW‖ of one adapter over all modules; None where only a base could tell a part of it."""
    norms = [getattr(module, which) for module in modules]
    return None if None in norms else math.hypot(*norms)


def _overlap(angles: Sequence[Sequence[float]]) -> float | None:
    """The mean squared cosine of all principal angles; None where there are none."""
    cosines = [math.cos(math.radians(angle)) ** 2 for each in angles for angle in each]
    return math.fsum(cosines) / len(cosines) if cosines else None


def _matrix(adapters: Sequence[Adapter], found: AlignedAdapters, tolerance: float, devices: DevicePool) -> MatrixComparison:
    """The comparison of each adapter with each, from one table of inner products."""
    table = inner_products(found, devices)
    # A sum of products that comes to nothing may end just below 0.
    norms = table.diagonal().clamp_min(0).sqrt()
    size = range(len(adapters))

    def apart(i: int, j: int) -> float:
        """‖ΔW_i − ΔW_j‖, from inner products, or module by module where these nearly cancel."""
        # ‖a − b‖² = ‖a‖² + ‖b‖² − 2⟨a, b⟩ has hardly a digit left where a and b are almost equal.
        squared, whole = float(table[i, i] + table[j, j] - 2 * table[i, j]), float(table[i, i] + table[j, j])
        if i == j or squared > _TOLERANCE * whole:
            return math.sqrt(max(squared, 0.0))
        return math.hypot(*(module.difference for module in compare_modules(found, devices, i, j)))

    differences = tuple(tuple(apart(i, j) for j in size) for i in size)
    products = norms.outer(norms)
    ratios = (table / products).clamp(-1, 1)
    cosines = tuple(tuple(float(ratios[i, j]) if products[i, j] else None for j in size) for i in size)
    gaps = ((differences[i][j], max(float(norms[i]), float(norms[j]))) for i in size for j in size)
    largest = max((gap / norm for gap, norm in gaps if gap), default=0.0)
    paths = tuple(str(adapter.path) for adapter in adapters)
    same = largest <= tolerance
    warnings = _notes(adapters, devices)
    return MatrixComparison(paths, tuple(norms.tolist()), differences, cosines, tolerance, same, warnings=warnings)


def _notes(adapters: Sequence[Adapter], devices: DevicePool) -> tuple[str, ...]:
    """The warnings of all adapters and of the devices."""
    return (*(note for adapter in adapters for note in adapter.warnings), *devices.warnings())
