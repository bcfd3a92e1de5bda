"""Two checkpoints, tensor by tensor: which tensors differ, by how much, and in how many numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from loratool.base.base import BaseCheckpoint
from loratool.keys.places import module_of
from loratool.keys.rows import WeightRows
from loratool.numbers import rounding
from loratool.numbers.devices import DevicePool, send
from loratool.numbers.linalg import row_blocks
from loratool.numbers.threads import map_on_threads
from loratool.verbs.reports import Report

_BLOCK: Final = 1 << 20
"""Numbers of each of two tensors that are read at a time: some MiB, however large the tensors are."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor of two checkpoints: its name, shape and dtype in each, how many numbers there are and differ, ‖A‖, ‖A − B‖,
    the largest difference of one number, the same in ULP (None where dtypes differ or have none), and the cosine."""

    name: str
    other_name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    count: int = 0
    changed: int = 0
    norm: float = 0.0
    difference: float = 0.0
    largest: float = 0.0
    ulps: int | None = None
    cosine: float | None = None

    @property
    def relative(self) -> float:
        """‖A − B‖ / ‖A‖; infinite where only B is not zero, or their shapes differ."""
        if self.shapes[0] != self.shapes[1]:
            return math.inf
        return self.difference / self.norm if self.norm else math.inf if self.difference else 0.0


@dataclass(frozen=True, slots=True)
class CheckpointComparison(Report):
    """Two checkpoints: how many tensors are the same to the bit, the tensors that differ, and those that only one has."""

    one: str
    other: str
    identical: int
    different: tuple[TensorDifference, ...]
    only_one: tuple[str, ...]
    only_other: tuple[str, ...]
    norm: float
    difference: float
    tolerance: float
    same: bool
    what: str = "checkpoints"


def compare_checkpoints(
    one: BaseCheckpoint, other: BaseCheckpoint, tolerance: float, devices: DevicePool
) -> CheckpointComparison:
    """Compares all tensors, whose names are the same or those of two namings. The checkpoints are the `same` where nothing
    is missing and no tensor differs by more than `tolerance` of its norm."""
    pairs, missing = [], []
    met: Counter[str] = Counter()
    for name in one.layout.tensors:
        # The very same name first; else the places of the module, which may be several tensors, or rows of a stacked one.
        direct = other.targets.own.get(name)
        # What the one has under its name on disk, the other may have under the name in memory, or the other way about.
        memory, _ = one.targets.in_memory(name)[0]
        places = (direct,) if direct else other.targets.find(*module_of(name)) or other.targets.find(*module_of(memory))
        if places:
            pairs.append((name, places))
            for place in places:
                met[place.tensor] += place.rows
        else:
            missing.append(name)
    found = map_on_threads(
        partial(devices.run_one, name, partial(_compare_tensor, one, other, name, places)) for name, places in pairs
    )
    different = tuple(tensor for tensor in found if tensor.changed or tensor.shapes[0] != tensor.shapes[1])
    only_other = tuple(name for name in other.layout.tensors if met[name] < other.targets.own[name].rows)
    within = all(tensor.relative <= tolerance for tensor in different)
    return CheckpointComparison(
        str(one.layout.root),
        str(other.layout.root),
        len(found) - len(different),
        different,
        tuple(missing),
        only_other,
        math.hypot(*(tensor.norm for tensor in found)),
        math.hypot(*(tensor.difference for tensor in found)),
        tolerance,
        within and not missing and not only_other,
    )


@dataclass(slots=True)
class _Sums:
    """Sums over the blocks of a tensor: ‖A‖², ‖B‖², ⟨A, B⟩, ‖A − B‖², and what differs; `steps` has the most ULP of each."""

    own: float = 0.0
    theirs: float = 0.0
    inner: float = 0.0
    difference: float = 0.0
    largest: float = 0.0
    changed: int = 0
    steps: list[int] = field(default_factory=list)


def _compare_tensor(
    one: BaseCheckpoint, other: BaseCheckpoint, name: str, places: tuple[WeightRows, ...], device: torch.device
) -> TensorDifference:
    """The difference of the tensor `name` of one checkpoint and of what lies at `places` in the other."""
    mine = (one.targets.own[name],)
    info, theirs = one.layout.info(name), other.layout.info(places[0].tensor)
    shapes = one.shape(mine), other.shape(places)
    result = TensorDifference(name, places[0].tensor, shapes, (info.dtype, theirs.dtype), info.numel)
    if shapes[0] != shapes[1]:
        return result
    sums = _Sums()
    for before, after in _blocks(one, mine, other, places):
        _add(sums, send(before, device), send(after, device))
    product = math.sqrt(sums.own * sums.theirs)
    return replace(
        result,
        changed=sums.changed,
        norm=math.sqrt(sums.own),
        difference=math.sqrt(sums.difference),
        largest=sums.largest,
        ulps=max(sums.steps) if sums.steps else None,
        cosine=max(-1.0, min(1.0, sums.inner / product)) if product else None,
    )


def _blocks(
    one: BaseCheckpoint, mine: tuple[WeightRows, ...], other: BaseCheckpoint, theirs: tuple[WeightRows, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of both tensors, block by block; all at once where either cannot be read by rows."""
    shape = one.shape(mine)
    if not shape or not (one.by_rows(mine) and other.by_rows(theirs)):
        yield one.at(mine), other.at(theirs)
        return
    for start, stop in row_blocks(shape[0], math.prod(shape[1:]), _BLOCK):
        yield one.rows(mine, start, stop), other.rows(theirs, start, stop)


def _add(sums: _Sums, before: Tensor, after: Tensor) -> None:
    """Adds a block of both tensors; NaN counts as different from everything but the very same bits."""
    # Most blocks of a tuned checkpoint and its base are equal: their bits tell, before anything is widened or subtracted.
    alike = before.dtype == after.dtype
    if alike and torch.equal(_bits(before), _bits(after)):
        if before.is_floating_point():
            squared = float(before.double().square().sum())
            sums.own, sums.theirs, sums.inner = sums.own + squared, sums.theirs + squared, sums.inner + squared
        return
    wide, other = before.double().flatten(), after.double().flatten()
    gap = wide - other
    sums.own, sums.theirs = sums.own + float(wide @ wide), sums.theirs + float(other @ other)
    sums.inner, sums.difference = sums.inner + float(wide @ other), sums.difference + float(gap @ gap)
    sums.changed += int((_bits(before) != _bits(after)).sum()) if alike else int((gap != 0).sum())
    sums.largest = max(sums.largest, float(gap.abs().max()))
    # Between neighbours the integers differ by one, so a difference in ULP is exact at every size of number.
    if alike and before.is_floating_point():
        sums.steps.append(int((_ordered_bits(before) - _ordered_bits(after)).abs().max()))


def _bits(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as integers of the same bits."""
    return tensor.contiguous().flatten().view(rounding.INTEGERS[tensor.element_size()])


def _ordered_bits(tensor: Tensor) -> Tensor:
    """Floating-point numbers as integers in the same order, neighbours one apart."""
    bits = _bits(tensor).long()
    # IEEE floats are a sign and a magnitude: the magnitude of negative ones counts downwards, and both zeros become 0.
    magnitude = bits & ((1 << (8 * tensor.element_size() - 1)) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)
