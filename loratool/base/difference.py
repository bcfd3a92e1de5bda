"""What one parameter of a tuned checkpoint changed, in float32, and how much of it may be the rounding of what is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loratool.base.base import BaseCheckpoint
from loratool.base.pairs import Pair
from loratool.deltas.base import to_compute_dtype
from loratool.errors import NonFinite
from loratool.numbers import rounding
from loratool.numbers.devices import CPU, send, to_float64
from loratool.numbers.krylov import squared_norm
from loratool.numbers.linalg import row_blocks

_BLOCK: Final = 1 << 18
"""Elements that are read and subtracted at a time: few enough to stay in cache."""
BLOCK_THERE: Final = 1 << 24
"""Elements that travel to a device at a time."""
UNIFORM: Final = math.sqrt(12)
"""A number rounded to multiples of s is off by s / √12 on average: the standard deviation of the uniform distribution."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`dense`, W' − W₀ in float32 (float64 where either is stored so), with as many rows as the longer of the two.

    `noise` is what rounding to the coarser of their dtypes alone comes to, as ‖·‖, and `edge` how large a singular value of
    it may be.
    """

    dense: Tensor
    norm: float
    noise: float
    edge: float


def difference(base: BaseCheckpoint, tuned: BaseCheckpoint, pair: Pair, device: torch.device) -> Difference | None:
    """What `pair` changed; None where it changed nothing.

    Raises `NonFinite` where either holds NaN or Inf. Rows that only one of them has are a difference to zero.
    """
    changed, rounded = _Rows(pair, _dtype(base, tuned, pair), device), _Rounding()
    for start, before, after in _blocks(base, tuned, pair, _BLOCK if device == CPU else BLOCK_THERE):
        before, after = send(before, device), send(after, device)  # noqa: PLW2901
        if before.dtype == after.dtype and torch.equal(before, after):
            continue
        rows = changed.rows(start, max(len(before), len(after)))
        rows[: len(after)] = after
        rows[: len(before)] -= before.to(rows.dtype)
        rounded.add(after if _step(after) >= _step(before) else before)
    if changed.dense is None or not changed.dense.numel():
        return None
    dense = changed.dense.reshape(changed.shape if pair.shape else ())
    low, high = map(float, torch.aminmax(dense))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFinite(_lost(base, tuned, pair))
    if low == high == 0:
        return None
    largest = max(-low, high)
    matrix = _matrix(dense)
    norm = math.sqrt(squared_norm(matrix if 1e-15 < largest < 1e15 else matrix / largest))
    norm *= 1.0 if 1e-15 < largest < 1e15 else largest
    return Difference(dense, norm, *rounded.sizes(matrix.shape, norm))


class _Rows:
    """A difference that takes no memory until something differs."""

    def __init__(self, pair: Pair, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (max(pair.shape[0], pair.tuned_shape[0]), *pair.shape[1:]) if pair.shape else (1,)
        self.dtype, self.device = dtype, device
        self.dense: Tensor | None = None

    def rows(self, start: int, count: int) -> Tensor:
        """Some of its rows, zero when they are first asked for."""
        if self.dense is None:
            self.dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self.dense[start : start + count]


class _Rounding:
    """Sums over the blocks of a weight of what rounding each number to its dtype is off by."""

    def __init__(self) -> None:
        self.largest_row = 0.0
        self.columns: Tensor | None = None

    def add(self, stored: Tensor) -> None:
        """Adds the steps of `stored` in the dtype that it is in."""
        squared = _matrix(rounding.ulp(stored)).square_()
        columns = to_float64(squared.sum(0))
        self.columns = columns if self.columns is None else self.columns + columns
        self.largest_row = max(self.largest_row, float(squared.sum(1).max()))

    def sizes(self, shape: tuple[int, ...], norm: float) -> tuple[float, float]:
        """(‖E‖, edge) of a matrix E of these errors: its norm, and what its largest singular value hardly ever exceeds.

        By the row and the column that it is largest in (Bandeira and van Handel 2016, arXiv:1408.6185), and the fluctuation
        of the edge (Tracy and Widom). Where the change is so small that most of it was rounded away, its root mean square is
        less than that of rounding, and the noise is no more than that.
        """
        columns = torch.zeros(1) if self.columns is None else self.columns
        noise = math.sqrt(float(columns.sum())) / UNIFORM
        each, rms = (value / math.sqrt(math.prod(shape)) for value in (noise, norm))
        fluctuation = 2 * each * (shape[0] ** -0.5 + shape[1] ** -0.5) ** (1 / 3)
        edge = (math.sqrt(self.largest_row) + math.sqrt(float(columns.max()))) / UNIFORM + fluctuation
        return noise, edge * min(1.0, rms / each if each else 1.0)


def _blocks(base: BaseCheckpoint, tuned: BaseCheckpoint, pair: Pair, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The rows of both, a few at a time, from the first on; what is not stored row by row comes at once, and a single number
    as a row of one."""
    if not pair.shape:
        yield 0, base.at(pair.base).reshape(1), tuned.at(pair.tuned).reshape(1)
        return
    count = max(pair.shape[0], pair.tuned_shape[0])
    apart = base.by_rows(pair.base) and tuned.by_rows(pair.tuned)
    for start, stop in row_blocks(count, math.prod(pair.shape[1:]), size) if apart else [(0, count)]:
        yield start, base.rows(pair.base, start, stop), tuned.rows(pair.tuned, start, stop)


def _matrix(tensor: Tensor) -> Tensor:
    """A weight as a matrix of its output rows; a vector's have one number each."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def _dtype(base: BaseCheckpoint, tuned: BaseCheckpoint, pair: Pair) -> torch.dtype:
    stored = (base.layout.info(pair.base[0].tensor).dtype, tuned.layout.info(pair.tuned[0].tensor).dtype)
    return torch.float64 if "F64" in stored else torch.float32


def _step(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _lost(base: BaseCheckpoint, tuned: BaseCheckpoint, pair: Pair) -> str:
    for weights, places in ((base, pair.base), (tuned, pair.tuned)):
        if not bool(to_compute_dtype(weights.at(places)).isfinite().all()):
            return f"{weights.layout.root}: {places[0].tensor} holds NaN or Inf; `Selection(exclude=)` leaves it out"
    return f"{pair}: the difference of the two overflows float32; `Selection(exclude=)` leaves it out"
