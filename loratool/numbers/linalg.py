"""Linear algebra on factors: norms and spectra of a product without forming it. Tensors in, tensors out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_NARROW: Final = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
"""Dtypes that torch cannot compare numbers of."""


def row_blocks(rows: int, columns: int, numbers: int) -> Iterator[tuple[int, int]]:
    """The first row, and the one behind the last, of each block of a matrix: as many as hold `numbers`, at least one."""
    step = max(1, numbers // max(columns, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def bounds(tensor: Tensor) -> tuple[float, float]:
    """The least and the greatest number of a tensor, NaN where it holds one; (0, 0) where it holds nothing."""
    if not tensor.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(tensor.float() if tensor.dtype in _NARROW else tensor)
    return float(low), float(high)


def dtype_name(dtype: torch.dtype) -> str:
    """What users call a dtype: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


def all_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor Inf: the fastest of torch's ways to tell."""
    return all(map(math.isfinite, bounds(tensor)))


def singular_values(up: Tensor, down: Tensor) -> Tensor:
    """The singular values of `up @ down`, (m, r) and (r, n), largest first, in float64, from a core of at most r × r.

    QR of both factors, then the SVD of the product of the triangles: exact to rounding, O((m + n) r²).
    """
    up_core = torch.linalg.qr(up.double(), mode="r").R
    down_core = torch.linalg.qr(down.double().T, mode="r").R
    sigma: Tensor = torch.linalg.svdvals(up_core @ down_core.T)
    return sigma


_TOLD: Final = 1e-4
"""A share of ‖up‖² ‖down‖² above which float32 products tell a square to a part in a thousand."""
CANCELLED: Final = 1e-12
"""A share of a norm's square below which float64 Gram matrices tell a difference no more, and QR is asked."""


def difference_norm(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """‖up₁ · down₁ − up₂ · down₂‖ of two pairs of factors, in float64, without multiplying them out."""
    ups = torch.cat([one[0].double(), -other[0].double()], dim=1)
    downs = torch.cat([one[1].double(), other[1].double()])
    products = (ups.T @ ups) * (downs @ downs.T)
    rank = one[0].shape[1]
    squared, whole = float(products.sum()), float(products[:rank, :rank].sum())
    if squared > CANCELLED * whole:
        return math.sqrt(squared)
    return float(singular_values(ups, downs).norm())


@dataclass(frozen=True, slots=True)
class Relation:
    """How two matrices are related: their norms, ⟨one, other⟩, ‖one − other‖, and the principal angles, in degrees and
    smallest first, between their column spaces (`outputs`) and between their row spaces (`inputs`)."""

    one: float
    other: float
    inner: float
    difference: float
    outputs: tuple[float, ...] = ()
    inputs: tuple[float, ...] = ()


def relation(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], *, angles: bool = True) -> Relation:
    """The relation of two products, in float64, without multiplying them out: from the inner products of all columns of both
    `up` and of all rows of both `down` (Björck and Golub 1973 for the `angles`, where they are asked for)."""
    ups, downs = [pair[0].double() for pair in (one, other)], [pair[1].double().T for pair in (one, other)]
    of_ups, of_downs = _Products(*ups), _Products(*downs)
    norms = [math.sqrt(max(float((of_ups.own[i] * of_downs.own[i]).sum()), 0.0)) for i in (0, 1)]
    inner = float((of_ups.across * of_downs.across).sum())
    squared, whole = norms[0] ** 2 + norms[1] ** 2 - 2 * inner, norms[0] ** 2 + norms[1] ** 2
    difference = math.sqrt(squared) if squared > CANCELLED * whole else difference_norm(one, other)
    if not angles or not all(norms):
        return Relation(norms[0], norms[1], inner, difference)
    cosines = [of_ups.cosines(), of_downs.cosines()]
    if any(found is None for found in cosines):
        bases = [_bases(up, down.T) for up, down in zip(ups, downs, strict=True)]
        cosines = [torch.linalg.svdvals(bases[0][side].T @ bases[1][side]) for side in (0, 1)]
    outputs, inputs = (
        tuple(torch.rad2deg(torch.arccos(found.clamp(-1, 1))).tolist()) for found in cosines if found is not None
    )
    return Relation(norms[0], norms[1], inner, difference, outputs, inputs)


_INDEPENDENT: Final = 1e-4
"""Least ratio of the pivots of columns that count as independent enough to be made orthonormal by their inner products."""
_NOISE: Final = 1e-7
"""Singular values below so much of the largest are of directions that a product in float32 does not have."""


class _Products:
    """Inner products of the columns of two matrices: each with itself in `own`, with the other's in `across`."""

    def __init__(self, one: Tensor, other: Tensor) -> None:
        self.own = one.T @ one, other.T @ other
        self.across = one.T @ other

    def cosines(self) -> Tensor | None:
        """Those of the principal angles between the two spans, largest first; None where columns are hardly independent."""
        roots = []
        for gram in self.own:
            root, info = torch.linalg.cholesky_ex(gram)
            pivots = root.diagonal()
            if int(info) or float(pivots.min()) < _INDEPENDENT * float(pivots.max()):
                return None
            roots.append(root)
        left = torch.linalg.solve_triangular(roots[0], self.across, upper=False)
        both = torch.linalg.solve_triangular(roots[1], left.T, upper=False)
        found: Tensor = torch.linalg.svdvals(both)
        return found


def _bases(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column and of the row space of a product in float64, without what is noise."""
    up_basis, up_core = torch.linalg.qr(up)
    down_basis, down_core = torch.linalg.qr(down.T)
    left, sigma, right = torch.linalg.svd(up_core @ down_core.T, full_matrices=False)
    kept = sigma > _NOISE * sigma[:1]
    return up_basis @ left[:, kept], down_basis @ right[kept].T


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = sigma.sum()
    if total == 0:
        return 0.0
    shares = sigma[sigma > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


LARGE: Final = 1e15
"""Numbers whose squares float32 adds up without leaving its range."""


class ProductSVD:
    """The spectrum of `up @ down`, (m, r) and (r, n), `sigma` in float64, largest first, and its best factors at any rank.

    QR of downᵀ, in float32, and the eigenvectors of R (upᵀ up) Rᵀ, (r, r): those are the right singular vectors V, behind
    Q, and D Q V is up Rᵀ V, so that neither basis is formed and the factors are a projection of D however small a singular
    value is. Products and eigenvectors in float32, which are fast, leave `sigma` exact to some 1e-4 of its largest, those in
    float64 to 1e-8.
    """

    def __init__(self, up: Tensor, down: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.up, self.down = up.float(), down.float()
        self._reflectors, self._tau = torch.geqrf(self.down.T)
        wide, triangle = self.up.to(dtype), self._reflectors[: len(self._tau)].triu().to(dtype)
        gram = wide.T @ wide
        # Both of a size that leaves room for products of their products.
        sizes = float(gram.diagonal().max()) or 1.0, float(triangle.abs().max()) or 1.0
        gram, scaled = gram / sizes[0], triangle / sizes[1]
        values, vectors = torch.linalg.eigh(scaled @ gram @ scaled.T)
        self.squares = values.double().flip(0).clamp_min(0) * (sizes[0] * sizes[1] ** 2)
        self.sigma = self.squares.sqrt()
        self._right, self._turned = vectors.double().flip(1), triangle.double().T

    @classmethod
    def enough(cls, up: Tensor, down: Tensor, rank_of: Callable[[Tensor], int]) -> ProductSVD:
        """From float32 products where they tell what the rank leaves out, that `rank_of` gives a spectrum."""
        if max(map(abs, (*bounds(up), *bounds(down)))) > LARGE:
            return cls(up, down)
        core = cls(up, down, torch.float32)
        left = float(core.squares[rank_of(core.sigma) :].sum())
        return core if left > _TOLD * core.most else cls(up, down)

    @property
    def most(self) -> float:
        """‖up‖² ‖down‖², which ‖D‖² would be without anything that cancels."""
        return float(self.up.norm()) ** 2 * float(self.down.norm()) ** 2

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Float32 factors of the best approximation at `rank`, with the root of each singular value on either side."""
        root = self.sigma[:rank].sqrt()
        over = torch.where(root > 0, 1 / root, 0.0)
        kept = self._right[:, :rank]
        padded = self.up.new_zeros(self.down.shape[1], rank)
        padded[: len(kept)] = kept * root
        downs = torch.ormqr(self._reflectors, self._tau, padded).T
        return self.up @ (self._turned @ kept * over).float(), downs

    def distance(self, up: Tensor, down: Tensor) -> float:
        """‖D − up · down‖, for other factors: from small products in float32 where the difference is large enough for them
        to tell it to a part in a thousand, else by `difference_norm`."""
        ups, downs = up.float(), down.float()
        across = ((self.up.T @ ups).double() * (self.down @ downs.T).double()).sum()
        own = ((ups.T @ ups).double() * (downs @ downs.T).double()).sum()
        whole = float(self.squares.sum())
        squared = whole - 2 * float(across) + float(own)
        return math.sqrt(squared) if squared > _TOLD * self.most else difference_norm((self.up, self.down), (up, down))
