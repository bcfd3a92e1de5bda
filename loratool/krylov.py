"""The leading singular triples of a dense matrix: a block Krylov range that grows until a rule has what it needs.

Musco and Musco 2015 (arXiv:1504.05477), with the residual of Halko, Martinsson and Tropp 2011: for any orthonormal Q,
‖D − QQᵀD‖² = ‖D‖² − ‖QᵀD‖², so that what is left out is known without another look at D. Products with D are in its own
dtype; the basis, all sums and the small eigenproblem are in float64, which is what keeps small residuals true.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

OVERSAMPLING: Final = 8
LEAST_WIDTH: Final = 16
FIRST_WIDTH: Final = 32
"""Columns of the first block where nobody says how many will be needed."""
TOLERANCE: Final = 2e-4
"""How far above the least error the range may end, relative to it, by what its blocks brought one after the other."""
SETTLED: Final = 1e-4
"""The share of a largest singular value that one more block may still add to it."""
EXACT_BELOW: Final = 96
"""Smaller side of a matrix up to which all of its spectrum is found at once."""
CHUNK: Final = 1 << 22
"""Elements that are widened to float64 at a time."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of a matrix's singular values: the leading ones, `sigma`, in float64, largest first; `total`, the sum of
    the squares of all; whether `sigma` is `complete`; and `noise`, which a singular value of pure rounding may reach."""

    sigma: Tensor
    total: float
    complete: bool
    noise: float = 0.0


Wanted = Callable[[Spectrum], int | None]
"""How many triples of a matrix are wanted; None where more of its spectrum must be known."""


@dataclass(frozen=True, slots=True)
class Leading:
    """`up` (m, r) and `down` (r, n), float64: the best approximation of D at that rank, to the solver's tolerance, with the
    root of each singular value on either side.

    `spectrum` has at least r values; `left` is ‖D − up · down‖, as far as products in D's dtype tell it: in float32 to some
    10⁻⁴ of ‖D‖. `ops.factoring.distance` measures it.
    """

    up: Tensor
    down: Tensor
    spectrum: Spectrum
    left: float


def squares(matrix: Tensor) -> float:
    """‖D‖²: each row's norm in its own dtype, which is fast along the memory, their sum in float64."""
    along = 1 if matrix.stride(1) == 1 else 0
    return float(torch.linalg.vector_norm(matrix, dim=along).double().square().sum())


def leading(
    matrix: Tensor, wanted: Wanted, *, rank: int | None = None, noise: float = 0.0, whole: bool = False, seed: int = 0
) -> Leading:
    """The leading triples of `matrix` (m, n), as many as `wanted` says, within 1.001 of the least error at that rank.

    `rank` is how many are expected, None where nobody knows; with `whole` the rule is given the complete spectrum. Finite
    numbers whose squares neither over- nor underflow. The same for the same `seed`.
    """
    if matrix.shape[0] > matrix.shape[1]:
        found = leading(matrix.T, wanted, rank=rank, noise=noise, whole=whole, seed=seed)
        return Leading(found.down.T, found.up.T, found.spectrum, found.left)
    total, size = squares(matrix), len(matrix)
    width = FIRST_WIDTH if rank is None else max(LEAST_WIDTH, -(-(rank + OVERSAMPLING) // 8) * 8)
    if whole or size <= EXACT_BELOW or 4 * width > size:
        return _exact(matrix, wanted, total, noise)
    return _grown(matrix, wanted, width, total, noise, seed) or _exact(matrix, wanted, total, noise)


def largest(matrix: Tensor, *, seed: int = 0) -> float:
    """σ₁ alone: the range grows until a block adds no more than `SETTLED` of it, which of a flat spectrum is a little less
    than all of it. Half of a matrix is never reached but by small ones, whose spectrum is found whole."""
    if len(matrix) > matrix.shape[1]:
        matrix = matrix.T
    span, last = _Range(matrix, seed), 0.0
    while span.width + LEAST_WIDTH <= len(matrix) // 2:
        span.grow(LEAST_WIDTH)
        sigma = math.sqrt(float(span.ritz()[0][0]))
        if sigma - last <= SETTLED * sigma:
            return sigma
        last = sigma
    return math.sqrt(max(float(torch.linalg.eigvalsh(_gram(matrix))[-1]), 0.0))


def _exact(matrix: Tensor, wanted: Wanted, total: float, noise: float) -> Leading:
    """By the eigenvectors of D · Dᵀ in float64, which is exact enough for any float32 matrix and cheaper than its SVD."""
    values, vectors = torch.linalg.eigh(_gram(matrix))
    squared, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    spectrum = Spectrum(squared.sqrt(), total, True, noise)
    rank = min(wanted(spectrum) or 0, len(squared))
    basis = vectors[:, :rank]
    return _balanced(basis, matrix.T @ basis.to(matrix.dtype), spectrum, squared[rank:].sum())


def _gram(matrix: Tensor) -> Tensor:
    """D · Dᵀ in float64, some columns at a time."""
    gram = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
    for columns in torch.split(matrix, max(1, CHUNK // len(matrix)), dim=1):
        wide = columns.double()
        gram.addmm_(wide, wide.T)
    return gram


def _grown(matrix: Tensor, wanted: Wanted, width: int, total: float, noise: float, seed: int) -> Leading | None:
    """By a range that grows until the rule is content and the last block brought next to nothing; None where it would
    become half of the matrix, and all of it is the shorter way."""
    span = _Range(matrix, seed)
    rank: int | None = None
    captured = gain = 0.0
    while span.width + width <= len(matrix) // 2:
        span.grow(width)
        squared, turn = span.ritz()
        # Without a remainder there is nothing more to find.
        exhausted = total - float(squared.sum()) <= span.floor * total
        spectrum = Spectrum(squared.sqrt(), total, exhausted, noise)
        before, rank = rank, wanted(spectrum)
        if rank is None and exhausted:
            rank = len(squared)
        if rank is None:
            width *= 2
            continue
        rank = min(rank, len(squared))
        now = float(squared[:rank].sum())
        last, gain = (gain, now - captured) if rank == before else (0.0, 0.0)
        captured = now
        if exhausted or (rank == before and _to_come(gain, last) <= max(2 * TOLERANCE * (total - now), span.floor * total)):
            basis, image = span.basis @ turn[:, :rank], span.image @ turn[:, :rank].to(matrix.dtype)
            return _balanced(basis, image, spectrum, total - squared[:rank].sum())
    return None


def _to_come(gain: float, last: float) -> float:
    """What further blocks would capture after one that brought `gain` and one before that brought `last`, if they went on
    falling so: they fall faster. As much again, where there is nothing to compare with."""
    return gain * gain / (last - gain) if last > gain else gain


def _balanced(basis: Tensor, image: Tensor, spectrum: Spectrum, left: Tensor) -> Leading:
    """The projection basis · imageᵀ with the root of each singular value on either side; zeros stay zero."""
    root = spectrum.sigma[: basis.shape[1]].sqrt()
    over = torch.where(root > 0, 1 / root, 0.0)
    return Leading(basis * root, (image.double() * over).T, spectrum, float(left.clamp_min(0).sqrt()))


class _Range:
    """An orthonormal `basis` (m, k) that holds more and more of a matrix's leading left singular vectors, and its `image`,
    Dᵀ · basis."""

    def __init__(self, matrix: Tensor, seed: int) -> None:
        self.matrix = matrix
        self.generator = torch.Generator().manual_seed(seed)
        self.basis = matrix.new_zeros(len(matrix), 0, dtype=torch.float64)
        self.image = matrix.new_zeros(matrix.shape[1], 0)
        self.gram = matrix.new_zeros(0, 0, dtype=torch.float64)
        self.last = self.image
        # Rounding in the products moves sums of squares by about so much.
        self.floor = torch.finfo(matrix.dtype).eps / 32

    @property
    def width(self) -> int:
        return self.basis.shape[1]

    def grow(self, width: int) -> None:
        """Adds D · Dᵀ of the last block, and chance where `width` asks for more columns than that has."""
        fresh = torch.randn(self.matrix.shape[1], width - self.last.shape[1], generator=self.generator)
        trial = torch.cat([torch.linalg.qr(self.last).Q, fresh.to(self.matrix)], dim=1)
        block = (self.matrix @ trial).double()
        for _ in range(2):
            block = torch.linalg.qr(block - self.basis @ (self.basis.T @ block)).Q
        self.last = self.matrix.T @ block.to(self.matrix.dtype)
        mine, others = self.last.double(), self.image.double()
        across = others.T @ mine
        self.gram = torch.cat([torch.cat([self.gram, across], 1), torch.cat([across.T, mine.T @ mine], 1)])
        self.basis, self.image = torch.cat([self.basis, block], 1), torch.cat([self.image, self.last], 1)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """The squares of the singular values of basisᵀ · D, largest first, and the rotation of the basis to them."""
        values, vectors = torch.linalg.eigh(self.gram)
        return values.flip(0).clamp_min(0), vectors.flip(1)
