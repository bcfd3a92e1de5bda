"""What one parameter of a tuned checkpoint changed, in float32, and how much of it may be the rounding of what is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loratool import rounding
from loratool.deltas.base import widened
from loratool.errors import NonFinite, ShapeMismatch
from loratool.krylov import squares
from loratool.ops.extraction.pairing import Pair
from loratool.ops.weights import Weights

CHUNK: Final = 1 << 22
"""Elements whose rounding is looked at at a time."""
UNIFORM: Final = math.sqrt(12)
"""A number rounded to multiples of s is off by s / √12 on average: the standard deviation of the uniform distribution."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`dense`, W' − W₀ in float32 (float64 where either is stored so) and of the base's shape; `tuned` is W' as stored.

    `noise` is what rounding W' to its dtype alone would come to, as ‖·‖, and `edge` how large a singular value of it may be.
    """

    dense: Tensor
    tuned: Tensor
    norm: float
    noise: float
    edge: float


def difference(base: Weights, tuned: Weights, pair: Pair, device: torch.device) -> Difference | None:
    """What `pair` changed; None where it changed nothing.

    Raises `NonFinite` where either holds NaN or Inf. Rows that only one of them has are a difference to zero.
    """
    before, after = base.at(pair.base), tuned.at(pair.tuned)
    if before.dtype == after.dtype and torch.equal(before, after):
        return None
    wide, dense = widened(before.to(device)), widened(after.to(device))
    if wide.shape != dense.shape:
        wide, dense = _common(pair, wide, dense)
    dense = dense - wide
    del wide
    if not dense.numel():
        return None
    low, high = map(float, torch.aminmax(dense))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFinite(_lost(base, tuned, pair, before, after))
    if low == high == 0:
        return None
    coarse = after if _step(after.dtype) >= _step(before.dtype) else before
    largest = max(-low, high)
    norm = math.sqrt(squares(_rows(dense / largest))) * largest
    noise, edge = rounded_off(coarse, norm / math.sqrt(dense.numel()))
    return Difference(dense, after, norm, noise, edge)


def rounded_off(stored: Tensor, rms: float) -> tuple[float, float]:
    """(‖E‖, edge) of a matrix E of the errors that rounding to `stored` made: its norm, and what its largest singular value
    hardly ever exceeds.

    By the rows and columns that it is largest in (Bandeira and van Handel 2016, arXiv:1408.6185), and the fluctuation of
    the edge (Tracy and Widom). Where the change is so small that most of it was rounded away, its root mean square `rms` is
    less than that of rounding, and the noise is no more than that.
    """
    matrix = _rows(stored)
    rows: list[Tensor] = []
    columns = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for part in torch.split(matrix, max(1, CHUNK // max(matrix.shape[1], 1))):
        squared = rounding.steps(part).square_()
        rows.append(squared.sum(1, dtype=torch.float64))
        columns += squared.sum(0, dtype=torch.float64)
    by_row = torch.cat(rows)
    noise = math.sqrt(float(by_row.sum())) / UNIFORM
    each = noise / math.sqrt(stored.numel())
    height, width = matrix.shape
    fluctuation = 2 * each * (height**-0.5 + width**-0.5) ** (1 / 3)
    edge = (math.sqrt(float(by_row.max())) + math.sqrt(float(columns.max()))) / UNIFORM + fluctuation
    return noise, edge * min(1.0, rms / each if each else 1.0)


def _rows(tensor: Tensor) -> Tensor:
    """A weight as a matrix of its output rows; a vector is one of them."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _step(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _common(pair: Pair, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many rows as either, the missing ones zero; raises `ShapeMismatch` where more than the rows is unlike."""
    if before.ndim < 1 or before.shape[1:] != after.shape[1:]:
        raise ShapeMismatch(f"{pair}: is {list(before.shape)} in the base and {list(after.shape)} in the tuned checkpoint")
    shape = (max(len(before), len(after)), *before.shape[1:])
    return tuple(torch.cat([tensor, tensor.new_zeros(shape[0] - len(tensor), *shape[1:])]) for tensor in (before, after))  # type: ignore[return-value]


def _lost(base: Weights, tuned: Weights, pair: Pair, before: Tensor, after: Tensor) -> str:
    for weights, places, tensor in ((base, pair.base, before), (tuned, pair.tuned, after)):
        if not bool(widened(tensor).isfinite().all()):
            return f"{weights.layout.root}: {places[0].tensor} holds NaN or Inf; --exclude leaves it out"
    return f"{pair}: the difference of the two overflows float32"
