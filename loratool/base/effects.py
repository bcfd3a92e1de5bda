"""What a delta adds to its weight, as exact factors or as a whole matrix: the one place that gives a delta its base."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.base.base import BaseCheckpoint
from loratool.deltas.base import Delta, to_compute_dtype, to_device
from loratool.deltas.full import Full
from loratool.deltas.schema import WEIGHT
from loratool.errors import NeedsBase, ShapeMismatch
from loratool.names import Module
from loratool.numbers.devices import CPU, pins_memory, send
from loratool.numbers.faults import fault_of
from loratool.numbers.krylov import squared_norm


@dataclass(frozen=True, slots=True)
class Effect:
    """ΔW of a parameter of `shape`, as exact `factors` (out, r) and (r, in · kernel), or `whole`.

    `weight_norm` is ‖W₀‖, None unless `effect_of` was given a base and asked to measure the weight.
    """

    shape: tuple[int, ...]
    factors: tuple[Tensor, Tensor] | None
    whole: Tensor | None
    weight_norm: float | None = None

    def dense(self) -> Tensor:
        """ΔW in float32, of `shape`."""
        if self.whole is not None:
            return self.whole
        assert self.factors
        up, down = self.factors
        return (up @ down).reshape(self.shape)

    def as_delta(self, parameter: str) -> Full:
        """ΔW as a delta of kind full: a difference that is stored whole."""
        return Full(self.dense(), "diff" if parameter == WEIGHT else "diff_b")


def effect_of(
    delta: Delta,
    module: Module,
    parameter: str,
    base: BaseCheckpoint | None,
    device: torch.device = CPU,
    *,
    measure_weight: bool = False,
) -> Effect:
    """What `delta` adds to the weight or the bias of `module`, computed on `device`.

    Returns factors where their rank is no more than either side of ΔW. `base` gives the shape of a kernel that a file
    flattens, and the weight to kinds that depend on their weight. Raises `NeedsBase` for such a kind without a base,
    `ShapeMismatch` where the delta does not fit its weight, and `LoratoolError` where the base lacks the weight.
    """
    delta = to_device(delta.materialise(), device)
    weight = None
    if base and (measure_weight or not delta.additive):
        weight = base.of(module, parameter, pinned=pins_memory(device))
    weight = None if weight is None else send(weight, device)
    norm = weight_norm(weight) if weight is not None and measure_weight else None
    if not delta.additive:
        if weight is None:
            raise NeedsBase(f"what a delta of kind {delta.kind} adds depends on its weight; pass `base=`")
        whole = _matrix_added(delta, weight.float())
        return Effect(tuple(whole.shape), None, whole, norm)
    # A bias has no factors, and a rank beyond the sides of ΔW (LoHa's) saves nothing.
    shape = base.shape_of(module, parameter) if base and delta.kernel_flattened else delta.shape
    if (shape[:1], math.prod(shape[1:])) != (delta.shape[:1], math.prod(delta.shape[1:])):
        raise ShapeMismatch(f"is a change of {list(delta.shape)}, the base's weight is {list(shape)}")
    factors = delta.factors() if len(shape) > 1 else None
    if factors is not None and factors[0].shape[1] <= min(len(factors[0]), factors[1].shape[1]):
        return Effect(shape, factors, None, norm)
    return Effect(shape, None, delta.dense().reshape(shape), norm)


def weight_norm(weight: Tensor) -> float:
    """‖W‖, with the squares of its rows' norms summed in float64."""
    wide = to_compute_dtype(weight)
    return math.sqrt(squared_norm(wide.flatten(1) if wide.ndim > 1 else wide.reshape(1, -1)))


def _matrix_added(delta: Delta, weight: Tensor) -> Tensor:
    """W' − W in float32; raises `ShapeMismatch` where the delta and the weight have shapes that torch cannot combine."""
    try:
        return delta.apply(weight) - weight
    except RuntimeError as error:
        # A device that has no memory left says so in the same type of error.
        if fault_of(error):
            raise
        raise ShapeMismatch(f"does not fit its weight of {list(weight.shape)}: is the base another model?") from error
