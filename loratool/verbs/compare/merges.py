"""A merged checkpoint against what its base and adapters say that it should be: every number, to half a step (ULP)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from loratool.base.base import BaseCheckpoint
from loratool.errors import LoratoolError
from loratool.files.layout import Layout
from loratool.files.tensors import TensorFile
from loratool.numbers import rounding
from loratool.numbers.devices import DevicePool, send
from loratool.numbers.linalg import row_blocks
from loratool.numbers.threads import map_on_threads
from loratool.verbs.merge.blocks import apply_terms, by_blocks
from loratool.verbs.merge.files import rounded_by_chance
from loratool.verbs.merge.plan import Plan, TensorPlan
from loratool.verbs.merge.segments import Segment, matrix_shape, segments_of
from loratool.verbs.reports import Report

_BLOCK: Final = 1 << 19
"""Numbers that are computed at a time: 4 MiB in float64."""
ARITHMETIC: Final = 2.0**-21
"""What sums in float32 may be off by, relative to the numbers that are added: four of its steps, of 2⁻²³ each."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor with wrong numbers: how many there are, and of the worst its distance in steps of the dtype and its place."""

    name: str
    count: int
    steps: float
    index: tuple[int, ...]
    expected: float
    found: float


@dataclass(frozen=True, slots=True)
class MergeComparison(Report):
    """How a merged checkpoint compares with base + Σ strength · ΔW: how many numbers were `checked`, and the `worst`
    distance of one, in steps of the stored dtype, of which ½ is `allowed`, or 1 for a merge that rounded by chance."""

    merged: str
    base: str
    adapters: tuple[tuple[str, float], ...]
    tensors: int
    changed: int
    checked: int
    worst: float
    allowed: float
    off: tuple[Mismatch, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    same: bool
    what: str = "merge"


def compare_merge(
    merged: BaseCheckpoint, plan: Plan, adapters: tuple[tuple[str, float], ...], devices: DevicePool
) -> MergeComparison:
    """Compares every tensor of `merged` with `plan`, the plan of the merge that should have made it."""
    layout = merged.layout
    names = [name for name in plan.tensors if name in layout.tensors]
    # Rounding by chance may take the farther of two neighbours, which is up to a whole step away.
    allowed = 1.0 if rounded_by_chance(layout) else 0.5
    found = map_on_threads(
        (
            partial(devices.run_one, name, partial(_compare_tensor, plan.layout, plan.tensors[name], layout, allowed))
            for name in names
        ),
        threads=devices.threads,
    )
    off = tuple(tensor for _, tensor in found if tensor)
    missing = tuple(name for name in plan.tensors if name not in layout.tensors)
    extra = tuple(name for name in layout.tensors if name not in plan.tensors)
    return MergeComparison(
        merged=str(layout.root),
        base=str(plan.layout.root),
        adapters=adapters,
        tensors=len(names),
        changed=len(plan.changed_tensors),
        checked=sum(layout.info(name).numel for name in names),
        worst=max((worst for worst, _ in found), default=0.0),
        allowed=allowed,
        off=off,
        missing=missing,
        extra=extra,
        same=not (off or missing or extra),
        warnings=plan.warnings,
    )


def _compare_tensor(
    base: Layout, tensor: TensorPlan, merged: Layout, allowed: float, device: torch.device
) -> tuple[float, Mismatch | None]:
    """The worst distance of one tensor in steps, and the mismatch where some are more than `allowed`."""
    file, info = merged.tensors[tensor.name]
    if info.shape != tensor.shape:
        raise LoratoolError(f"{tensor.name}: has shape {list(info.shape)} in {merged.root}, expected {list(tensor.shape)}")
    # `worst` has a number's distance in steps, its flat index, the value expected and the value found.
    count, worst = 0, (0.0, 0, 0.0, 0.0)
    with TensorFile(base.files[tensor.file]) as source, TensorFile(merged.files[file]) as target:
        stored = target.read(info).reshape(matrix_shape(info.shape)) if info.shape else target.read(info).reshape(1, 1)
        for start, expected, slack in _expected_rows(tensor, source, device):
            rows = send(stored[start : start + len(expected)], device)
            beyond = _steps_beyond(rows, expected, slack)
            count += int((beyond > allowed).sum())
            largest = int(beyond.argmax()) if beyond.numel() else 0
            if beyond.numel() and float(beyond.flatten()[largest]) > worst[0]:
                at = largest + start * stored.shape[1]
                worst = (
                    float(beyond.flatten()[largest]),
                    at,
                    float(expected.flatten()[largest]),
                    float(rows.flatten()[largest]),
                )
    if not count:
        return worst[0], None
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst[1]), info.shape)) if info.shape else ()
    return worst[0], Mismatch(tensor.name, count, *worst[:1], index, *worst[2:])


def _steps_beyond(found: Tensor, expected: Tensor, slack: Tensor) -> Tensor:
    """The distance of each number from the expected value, in steps of its dtype, beyond what arithmetic may be off by."""
    # A merge copies integers and computes none: any difference is wrong.
    if not found.is_floating_point():
        return torch.zeros_like(expected).masked_fill(found.double() != expected, math.inf)
    wide = found.double()
    steps = rounding.ulp(found).double()
    gap = ((wide - expected).abs() - slack).clamp_min(0) / steps
    # Inf and NaN have no distance: right where the very same is expected, else infinitely wrong.
    same = (wide == expected) | (wide.isnan() & expected.isnan())
    return torch.where(torch.isfinite(wide), gap, math.inf).masked_fill(same, 0.0)


def _expected_rows(tensor: TensorPlan, source: TensorFile, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The rows that a tensor should hold, in blocks: the first row, the numbers in float64, and what float32 may miss."""
    rows, columns = matrix_shape(tensor.shape)
    if tensor.terms and not by_blocks(tensor):
        stored = source.read(tensor.source)
        whole = send(apply_terms(tensor, stored.double())[0].reshape(rows, columns), device)
        # Sizes of single terms are not known here: the mean stands in for those that cancel in a small number.
        yield 0, whole, ARITHMETIC * (whole.abs() + whole.abs().mean())
        return
    segments = [segment.on(device) for segment in segments_of(tensor, rows, columns)]
    base = source.read(tensor.source).reshape(rows, columns)
    for start, stop in row_blocks(rows, columns, _BLOCK):
        part = send(base[start:stop], device).double()
        # Nothing is computed for a tensor without terms: a copy is off by no more than the rounding to another dtype.
        slack = part.abs() if tensor.terms else torch.zeros_like(part)
        for segment in segments:
            _add(segment, start, part, slack)
        yield start, part, ARITHMETIC * slack


def _add(segment: Segment, start: int, part: Tensor, slack: Tensor) -> None:
    """Adds a segment's change to `part`, the rows from `start` on, and the size of the numbers that are added to `slack`."""
    first, last = max(start, segment.start), min(start + len(part), segment.stop)
    if first >= last:
        return
    here, rows = slice(first - start, last - start), slice(first - segment.start, last - segment.start)
    if segment.up is not None and segment.down is not None:
        up, down = segment.up[rows].double(), segment.down.double()
        part[here] += up @ down
        # By Cauchy and Schwarz, no partial sum of a row times a column is larger than the product of their norms.
        slack[here] += torch.outer(up.norm(dim=1), down.norm(dim=0))
    for whole in segment.whole:
        part[here] += whole[rows].double()
        slack[here] += whole[rows].double().abs()
