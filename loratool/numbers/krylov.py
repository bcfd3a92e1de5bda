"""The leading singular triples of a dense matrix: a block Krylov range that grows until a rule has what it needs.

Musco and Musco 2015 (arXiv:1504.05477), with the residual of Halko, Martinsson and Tropp 2011: for any orthonormal Q,
‖D − QQᵀD‖² = ‖D‖² − ‖QᵀD‖², so that the residual is known without another look at D. Products with D are in the dtype of D;
the basis, all sums and the small eigenproblem are in float64, which is what keeps small residuals true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loratool.numbers.devices import to_float64
from loratool.numbers.linalg import require_decomposable

OVERSAMPLING: Final = 8
"""Columns of a block beyond the expected rank, without which the last of the wanted triples would converge slowly."""
LEAST_WIDTH: Final = 16
"""Columns of the narrowest block."""
FIRST_WIDTH: Final = 32
"""Columns of the first block where the rank is not known beforehand."""
_TOLERANCE: Final = 2e-4
"""The relative excess over the least error at which a range may end, estimated from what its last blocks added."""
SETTLED: Final = 1e-4
"""The share of σ₁ that the last block may have added to the estimate of σ₁."""
# A pivot ratio of 1e-6 makes one pass of CholeskyQR lose orthogonality by about 2e-16 / 1e-12, which a second pass repairs.
_INDEPENDENT: Final = 1e-6
"""The least ratio of Cholesky pivots at which columns are made orthonormal by their inner products."""
EXACT_BELOW: Final = 96
"""The smaller side of a matrix up to which the whole spectrum is computed at once."""
_CHUNK: Final = 1 << 22
"""Elements that are widened to float64 at a time: 32 MiB of them."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of a matrix's singular values: `sigma`, the leading ones in float64, largest first; `total`, the sum of
    the squares of all; `complete`, whether `sigma` has all; and `noise`, the size that a singular value of pure rounding may
    reach."""

    sigma: Tensor
    total: float
    complete: bool
    noise: float = 0.0


RankRule = Callable[[Spectrum], int | None]
"""Gives the number of triples wanted of a matrix with that spectrum; None where more of the spectrum must be known."""


@dataclass(frozen=True, slots=True)
class TruncatedSVD:
    """`up` (m, r) and `down` (r, n), float64: the best approximation of D at rank r, to the solver's tolerance, with the
    root of each singular value on either side.

    `spectrum` has at least r values. `left` is ‖D − up · down‖, as exact as products in D's dtype are: in float32 to some
    10⁻⁴ of ‖D‖; `factor.residual_norm` measures the true one.
    """

    up: Tensor
    down: Tensor
    spectrum: Spectrum
    left: float


def squared_norm(matrix: Tensor) -> float:
    """‖D‖²: the norm of each row (each column, where those are contiguous) in D's dtype, the sum of squares in float64."""
    along = 1 if matrix.stride(1) == 1 else 0
    return float(to_float64(torch.linalg.vector_norm(matrix, dim=along)).square().sum())


def truncated_svd(
    matrix: Tensor, wanted: RankRule, *, rank: int | None = None, noise: float = 0.0, whole: bool = False, seed: int = 0
) -> TruncatedSVD:
    """The leading triples of `matrix` (m, n), as many as `wanted` says, within 1.001 of the least error at that rank.

    `rank` is the number of triples that `wanted` is expected to name, None where that is not known; with `whole` the rule
    sees the complete spectrum. `matrix` must hold finite numbers whose squares neither over- nor underflow. Equal seeds give
    equal results.
    """
    (found,) = truncated_svd_batch([matrix], [wanted], rank=rank, noises=[noise], whole=whole, seed=seed)
    return found


def truncated_svd_batch(
    matrices: Sequence[Tensor],
    wanted: Sequence[RankRule],
    *,
    rank: int | None = None,
    noises: Sequence[float],
    whole: bool = False,
    seed: int = 0,
) -> list[TruncatedSVD]:
    """`truncated_svd` of several matrices of one shape, dtype and device, each with a rule and a noise of its own: the same
    results as one by one, from batched products, which are what a GPU is fast at."""
    # The basis stands on the shorter side, where it and its inner products are smallest.
    if matrices[0].shape[0] > matrices[0].shape[1]:
        turned = [matrix.T for matrix in matrices]
        found = truncated_svd_batch(turned, wanted, rank=rank, noises=noises, whole=whole, seed=seed)
        return [TruncatedSVD(each.down.T, each.up.T, each.spectrum, each.left) for each in found]
    width = FIRST_WIDTH if rank is None else max(LEAST_WIDTH, -(-(rank + OVERSAMPLING) // 8) * 8)
    asked = [_Asked(rule, squared_norm(matrix), noise) for rule, matrix, noise in zip(wanted, matrices, noises, strict=True)]
    size = len(matrices[0])
    # A range settles on its second block at the earliest, and `_grow` stops at half of the matrix.
    grown = not (whole or size <= EXACT_BELOW or 4 * width > size)
    found_by: dict[int, TruncatedSVD] = _grow(matrices, asked, width, seed) if grown else {}
    return [
        found_by[number] if number in found_by else _exact(matrix, mine)
        for number, (matrix, mine) in enumerate(zip(matrices, asked, strict=True))
    ]


def spectral_norm(matrix: Tensor, *, seed: int = 0) -> float:
    """σ₁ alone: a range grows until a block adds no more than `SETTLED` of σ₁, so that a flat spectrum gives a little less.
    Only on small matrices does a range reach half of the matrix; there the whole spectrum is computed."""
    if len(matrix) > matrix.shape[1]:
        matrix = matrix.T
    span, last = _Range(matrix[None], seed), 0.0
    while span.width + LEAST_WIDTH <= len(matrix) // 2:
        span.grow(LEAST_WIDTH)
        sigma = math.sqrt(float(span.ritz()[0][0, 0]))
        if sigma - last <= SETTLED * sigma:
            return sigma
        last = sigma
    return math.sqrt(max(float(torch.linalg.eigvalsh(require_decomposable(_gram(matrix)))[-1]), 0.0))


@dataclass(slots=True)
class _Asked:
    """What is wanted of one matrix D, and the state of its range: `total` ‖D‖², the last `rank` that the rule named, the
    energy (sum of squares) `captured` at that rank, and `gain`, what the last block added to that energy."""

    wanted: RankRule
    total: float
    noise: float
    rank: int | None = None
    captured: float = 0.0
    gain: float = 0.0


def _exact(matrix: Tensor, asked: _Asked) -> TruncatedSVD:
    """The triples from the eigenvectors of D · Dᵀ in float64: exact enough for a float32 matrix, and cheaper than an SVD."""
    values, vectors = torch.linalg.eigh(require_decomposable(_gram(matrix)))
    squared, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    spectrum = Spectrum(squared.sqrt(), asked.total, True, asked.noise)
    rank = min(asked.wanted(spectrum) or 0, len(squared))
    basis = vectors[:, :rank]
    return _balance(basis, matrix.T @ basis.to(matrix), spectrum, squared[rank:].sum())


def _gram(matrix: Tensor) -> Tensor:
    """D · Dᵀ in float64, a block of columns at a time, to spare a float64 copy of D."""
    gram = to_float64(matrix[:1, :1]).new_zeros(len(matrix), len(matrix))
    for columns in torch.split(matrix, max(1, _CHUNK // len(matrix)), dim=1):
        part = to_float64(columns)
        gram.addmm_(part, part.T)
    return gram


def _grow(matrices: Sequence[Tensor], asked: Sequence[_Asked], width: int, seed: int) -> dict[int, TruncatedSVD]:
    """The triples, by number of the matrix, from ranges that grow until their rule names a rank and further blocks would add
    next to nothing. Matrices whose range would exceed half of them are left out: their whole spectrum is the shorter way."""
    found: dict[int, TruncatedSVD] = {}
    stacked = matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))
    # Ranges whose rules ask for blocks of the same width grow together.
    growing = [(_Range(stacked, seed), list(range(len(matrices))), width)]
    while growing:
        span, numbers, width = growing.pop()
        if span.width + width > len(matrices[0]) // 2:
            continue
        span.grow(width)
        squared, turns = span.ritz()
        unsettled: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            settled = _settle_rank(asked[number], squared[place], span.floor)
            if settled is None:
                # Without a rank the end is not in sight, so blocks double; with a rank, further blocks only refine.
                unsettled.setdefault(2 * width if asked[number].rank is None else width, []).append(place)
                continue
            rank, spectrum = settled
            # The rotated basis holds the left singular vectors; its image then has the right ones, each times σ.
            turn = turns[place][:, :rank]
            basis, image = span.basis[place] @ turn, span.image[place] @ turn.to(span.image)
            left = asked[number].total - squared[place][:rank].sum()
            found[number] = _balance(basis, image, spectrum, left)
        growing += [(span.only(places), [numbers[place] for place in places], size) for size, places in unsettled.items()]
    return found


def _settle_rank(asked: _Asked, squared: Tensor, floor: float) -> tuple[int, Spectrum] | None:
    """The rank and the spectrum of a range whose singular values have the squares `squared`, or None where the range must
    grow; the gain of its last block is noted in `asked`."""
    total = asked.total
    # Without a remainder there is nothing more to find: the values that are not known are zero.
    exhausted = total - float(squared.sum()) <= floor * total
    spectrum = Spectrum(squared.sqrt(), total, exhausted, asked.noise)
    before, rank = asked.rank, asked.wanted(spectrum)
    if rank is None and exhausted:
        rank = len(squared)
    if rank is None:
        return None
    asked.rank = rank = min(rank, len(squared))
    now = float(squared[:rank].sum())
    # Gains are comparable at one rank only: where the rule now names another, they begin anew.
    last, asked.gain = (asked.gain, now - asked.captured) if rank == before else (0.0, 0.0)
    asked.captured = now
    # A relative excess ε of the error is 2 ε of its square.
    enough = max(2 * _TOLERANCE * (total - now), floor * total)
    if exhausted or (rank == before and _to_come(asked.gain, last) <= enough):
        return rank, spectrum
    return None


def _to_come(gain: float, last: float) -> float:
    """An upper estimate of the energy that further blocks would add: the geometric tail of the last two gains (true gains
    fall faster), or `gain` again after the first block and where gains do not fall."""
    return gain * gain / (last - gain) if last > gain else gain


def _balance(basis: Tensor, image: Tensor, spectrum: Spectrum, left: Tensor) -> TruncatedSVD:
    """The projection basis · imageᵀ as two factors with the root of each singular value on either side; zeros stay zero."""
    root = spectrum.sigma[: basis.shape[1]].sqrt()
    over = torch.where(root > 0, 1 / root, 0.0)
    return TruncatedSVD(basis * root, (to_float64(image) * over).T, spectrum, float(left.clamp_min(0).sqrt()))


class _Range:
    """An orthonormal `basis` (b, m, k) for each matrix D of a stack (b, m, n), which as it grows holds more and more of D's
    leading left singular vectors; the `image` Dᵀ · basis (b, n, k), and imageᵀ · image in `gram`."""

    def __init__(self, matrix: Tensor, seed: int) -> None:
        self.matrix = matrix
        self.generator = torch.Generator().manual_seed(seed)
        count, rows, columns = matrix.shape
        self.basis = to_float64(matrix[:, :1, :1]).new_zeros(count, rows, 0)
        self.image = matrix.new_zeros(count, columns, 0)
        self.gram = self.basis.new_zeros(count, 0, 0)
        self.last = self.image
        # Rounding in the products moves sums of squares by about this share of them.
        self.floor = torch.finfo(matrix.dtype).eps / 32

    @property
    def width(self) -> int:
        return self.basis.shape[2]

    def only(self, places: Sequence[int]) -> _Range:
        """The ranges of the matrices at `places`; this very object where those are all."""
        if len(places) == len(self.matrix):
            return self
        # The generator's state comes along, so that a matrix draws the same columns in any company.
        part = _Range(self.matrix[places], 0)
        part.generator.set_state(self.generator.get_state())
        part.basis, part.image, part.gram, part.last = (
            each[places] for each in (self.basis, self.image, self.gram, self.last)
        )
        return part

    def grow(self, width: int) -> None:
        """Adds the next Krylov block, D · Dᵀ of the last one, filled up with random columns to `width`."""
        count, _, columns = self.matrix.shape
        # Drawn on the CPU: a seed gives the same columns on every device.
        fresh = torch.randn(columns, width - self.last.shape[2], generator=self.generator).to(self.matrix)
        # The last image is made orthonormal first, or its weak directions would drown in the rounding of the product.
        trial = torch.cat([orthonormal(to_float64(self.last)).to(self.matrix), fresh.expand(count, -1, -1)], dim=2)
        block = to_float64(self.matrix @ trial)
        # Twice, since cancellation in the first pass leaves a trace of the basis in the block.
        for _ in range(2):
            block = orthonormal(block - self.basis @ (self.basis.mT @ block))
        self.last = self.matrix.mT @ block.to(self.matrix)
        mine, others = to_float64(self.last), to_float64(self.image)
        across = others.mT @ mine
        self.gram = torch.cat([torch.cat([self.gram, across], 2), torch.cat([across.mT, mine.mT @ mine], 2)], 1)
        self.basis, self.image = torch.cat([self.basis, block], 2), torch.cat([self.image, self.last], 2)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """The squares of the singular values of basisᵀ · D, largest first, and the rotation of the basis to the singular
        vectors."""
        values, vectors = torch.linalg.eigh(require_decomposable(self.gram))
        return values.flip(1).clamp_min(0), vectors.flip(2)


def orthonormal(blocks: Tensor) -> Tensor:
    """An orthonormal basis of the columns of each block (b, m, k) in float64; nearly orthonormal where columns are nearly
    dependent, so that calling this twice is enough.

    Takes the Cholesky factor of the inner products (Yamamoto et al. 2015, CholeskyQR2), a matrix product and a small solve
    for all blocks at once, which a GPU is fast at; Householder's QR of all where the columns of any block are too dependent.
    """
    if not blocks.shape[2]:
        return blocks
    root, info = torch.linalg.cholesky_ex(blocks.mT @ blocks)
    pivots = root.diagonal(dim1=1, dim2=2)
    if bool((info == 0).all()) and bool((pivots.amin(1) > _INDEPENDENT * pivots.amax(1)).all()):
        solved: Tensor = torch.linalg.solve_triangular(root.mT, blocks, upper=True, left=False)
        return solved
    householder: Tensor = torch.linalg.qr(blocks).Q
    return householder
