"""The difference of one parameter in two checkpoints, in float32, and how much of it rounding to a dtype may have made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loratool.base.base import BaseCheckpoint
from loratool.base.pairs import Pair
from loratool.deltas.base import to_compute_dtype
from loratool.errors import NonFinite
from loratool.files.tensors import DTYPES
from loratool.numbers import rounding
from loratool.numbers.devices import CPU, pins_memory, send, to_float64
from loratool.numbers.krylov import squared_norm
from loratool.numbers.linalg import row_blocks
from loratool.numbers.threads import read_ahead
from loratool.numbers.workload import OPERATIONS_OF_SPECTRUM, Workload

_BLOCK: Final = 1 << 20
"""Elements that are read and subtracted at a time on the CPU: few enough to stay in cache, and so many that a thread spends
its time in arithmetic and not in the calls, for which threads wait for each other."""
_BLOCK_THERE: Final = 1 << 23
"""Elements that are sent to a GPU and subtracted at a time."""
UNIFORM: Final = math.sqrt(12)
"""Rounding to multiples of s has a root mean square error of s / √12: the deviation of a uniform distribution."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`dense`, W' − W₀ in float32 (float64 where either is stored so), with as many rows as the longer of the two.

    `norm` is ‖W' − W₀‖, `base_norm` ‖W₀‖, `noise` the norm that rounding to the coarser of both dtypes has alone, and `edge`
    the largest singular value that such rounding may have: of the last three those that were asked for, and else 0.
    """

    dense: Tensor
    norm: float
    base_norm: float
    noise: float
    edge: float


def difference(
    base: BaseCheckpoint,
    tuned: BaseCheckpoint,
    pair: Pair,
    device: torch.device,
    *,
    base_norm: bool = False,
    noise: bool = False,
) -> Difference | None:
    """The difference of `pair`, computed on `device`; None where both checkpoints hold the same numbers.

    Raises `NonFinite` where either holds NaN or Inf. Rows that only one checkpoint has are a difference to zero.
    """
    changed, rounded, squares = _Rows(pair, _dtype(base, tuned, pair), device), _Rounding(), 0.0
    blocks = _blocks(base, tuned, pair, device)
    # A core that computes cannot read; a GPU that computes leaves the core free to.
    for start, before, after in read_ahead(blocks) if pins_memory(device) else blocks:
        before, after = send(before, device), send(after, device)  # noqa: PLW2901
        if base_norm:
            squares += squared_norm(_matrix(to_compute_dtype(before)))
        # Equal blocks, as of frozen layers, cost no memory and count no rounding.
        if before.dtype == after.dtype and torch.equal(before, after):
            continue
        rows = changed.rows(start, max(len(before), len(after)))
        rows[: len(after)] = after
        rows[: len(before)] -= before.to(rows.dtype)
        # Of two dtypes the coarser rounds by so much more that the other does not count.
        if noise:
            rounded.add(after if _step(after) >= _step(before) else before)
    if changed.dense is None or not changed.dense.numel():
        return None
    dense = changed.dense.reshape(changed.shape if pair.shape else ())
    low, high = map(float, torch.aminmax(dense))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFinite(_lost(base, tuned, pair))
    if low == high == 0:
        return None
    # Squares of numbers within 1e±15, and their sums, stay in float32's range of 1e±38; others are scaled first.
    largest = max(-low, high)
    matrix = _matrix(dense)
    norm = math.sqrt(squared_norm(matrix if 1e-15 < largest < 1e15 else matrix / largest))
    norm *= 1.0 if 1e-15 < largest < 1e15 else largest
    return Difference(dense, norm, math.sqrt(squares), *(rounded.sizes(matrix.shape, norm) if noise else (0.0, 0.0)))


def pair_bytes(base: BaseCheckpoint, tuned: BaseCheckpoint, pair: Pair) -> int:
    """The bytes that are read of both checkpoints for `pair`."""
    sides = ((base, pair.base, pair.shape), (tuned, pair.tuned, pair.tuned_shape))
    dtypes = [weights.layout.info(places[0].tensor).dtype for weights, places, _ in sides]
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for (*_, shape), dtype in zip(sides, dtypes, strict=True))


def difference_workload(base: BaseCheckpoint, tuned: BaseCheckpoint, pairs: Sequence[Pair]) -> Workload:
    """The work of all differences, and of their leading singular values."""
    numbers = sum(math.prod(pair.shape) for pair in pairs if len(pair.shape) > 1)
    return Workload(sum(pair_bytes(base, tuned, pair) for pair in pairs), products=OPERATIONS_OF_SPECTRUM * numbers)


class _Rows:
    """The dense difference of a pair, which takes no memory until a block differs."""

    def __init__(self, pair: Pair, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (max(pair.shape[0], pair.tuned_shape[0]), *pair.shape[1:]) if pair.shape else (1,)
        self.dtype, self.device = dtype, device
        self.dense: Tensor | None = None

    def rows(self, start: int, count: int) -> Tensor:
        """`count` rows from `start` on, to be written to: zeros at first."""
        if self.dense is None:
            self.dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self.dense[start : start + count]


class _Rounding:
    """Sums over the blocks of a weight of its squared rounding steps (ULPs), by column and for the largest row."""

    def __init__(self) -> None:
        self.largest_row = 0.0
        self.columns: Tensor | None = None

    def add(self, stored: Tensor) -> None:
        """Adds the steps of the rows `stored`, in their own dtype."""
        squared = _matrix(rounding.ulp(stored)).square_()
        columns = to_float64(squared.sum(0))
        self.columns = columns if self.columns is None else self.columns + columns
        self.largest_row = max(self.largest_row, float(squared.sum(1).max()))

    def sizes(self, shape: tuple[int, ...], norm: float) -> tuple[float, float]:
        """(‖E‖, edge) of the matrix E of rounding errors of a weight of `shape`, whose difference has the norm `norm`.

        The edge, which the largest singular value of E hardly ever exceeds, is the norm of E's largest row plus that of its
        largest column (Bandeira and van Handel 2016, arXiv:1408.6185), plus the edge's fluctuation (Tracy and Widom).
        """
        columns = torch.zeros(1) if self.columns is None else self.columns
        noise = math.sqrt(float(columns.sum())) / UNIFORM
        each, rms = (value / math.sqrt(math.prod(shape)) for value in (noise, norm))
        # The Tracy–Widom law of the largest singular value has a unit of ½ · each · (m^−½ + n^−½)^⅓: four of these.
        fluctuation = 2 * each * (shape[0] ** -0.5 + shape[1] ** -0.5) ** (1 / 3)
        edge = (math.sqrt(self.largest_row) + math.sqrt(float(columns.max()))) / UNIFORM + fluctuation
        # Where most of a tiny change was rounded away, the difference is smaller than rounding errors usually are, and so is
        # the noise in it.
        return noise, edge * min(1.0, rms / each if each else 1.0)


def _blocks(
    base: BaseCheckpoint, tuned: BaseCheckpoint, pair: Pair, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, rows of the base, rows of the tuned checkpoint) of each block, in memory that `device` copies from.

    A weight whose rows lie apart in either checkpoint is one block, and a single number is a row of one.
    """
    pinned, size = pins_memory(device), _BLOCK if device == CPU else _BLOCK_THERE
    if not pair.shape:
        yield 0, base.at(pair.base).reshape(1), tuned.at(pair.tuned).reshape(1)
        return
    count = max(pair.shape[0], pair.tuned_shape[0])
    by_rows = base.by_rows(pair.base) and tuned.by_rows(pair.tuned)
    for start, stop in row_blocks(count, math.prod(pair.shape[1:]), size) if by_rows else [(0, count)]:
        yield start, base.rows(pair.base, start, stop, pinned=pinned), tuned.rows(pair.tuned, start, stop, pinned=pinned)


def _matrix(tensor: Tensor) -> Tensor:
    """A weight as a matrix of its output rows, with flattened kernels; a vector is a column."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def _dtype(base: BaseCheckpoint, tuned: BaseCheckpoint, pair: Pair) -> torch.dtype:
    stored = (base.layout.info(pair.base[0].tensor).dtype, tuned.layout.info(pair.tuned[0].tensor).dtype)
    return torch.float64 if "F64" in stored else torch.float32


def _step(tensor: Tensor) -> float:
    """The relative step between neighbours in the dtype of a tensor."""
    return torch.finfo(tensor.dtype).eps


def _lost(base: BaseCheckpoint, tuned: BaseCheckpoint, pair: Pair) -> str:
    """The message of `NonFinite`: which checkpoint holds NaN or Inf, or that the difference overflows."""
    for weights, places in ((base, pair.base), (tuned, pair.tuned)):
        if not bool(to_compute_dtype(weights.at(places)).isfinite().all()):
            return f"{weights.layout.root}: {places[0].tensor} holds NaN or Inf; `Selection(exclude=)` leaves it out"
    return f"{pair}: the difference of the two overflows float32; `Selection(exclude=)` leaves it out"
