"""Linear algebra on factors: norms, spectra and angles of products that are never multiplied out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_NARROW: Final = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
"""Dtypes that `torch.aminmax` does not know."""


def row_blocks(rows: int, columns: int, numbers: int) -> Iterator[tuple[int, int]]:
    """The first row of each block of a matrix and the row behind its last; a block has at most `numbers` numbers, or one
    row."""
    step = max(1, numbers // max(columns, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def bounds(tensor: Tensor) -> tuple[float, float]:
    """The least and the greatest number of a tensor; both are NaN where the tensor holds NaN, and 0 where it is empty."""
    if not tensor.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(tensor.float() if tensor.dtype in _NARROW else tensor)
    return float(low), float(high)


def dtype_name(dtype: torch.dtype) -> str:
    """The user's name of a dtype: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf."""
    # NaN and Inf show in the bounds, which torch finds faster than a mask of `isfinite`.
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
"""The share of ‖up‖² ‖down‖² above which float32 products give a square to a part in a thousand."""
CANCELLED: Final = 1e-12
"""The share of a norm's square below which a difference of float64 Gram matrices has cancelled, and QR takes over."""


def difference_norm(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """‖up₁ · down₁ − up₂ · down₂‖ of two pairs of factors, in float64, without multiplying them out."""
    # The difference is one product of stacked factors, and ‖UV‖² is the sum over (UᵀU) ∘ (VVᵀ).
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
    """How two matrices are related: their norms `one` and `other`, the product `inner` ⟨one, other⟩, `difference`
    ‖one − other‖, and the principal angles, in degrees and smallest first, between their column spaces (`outputs`) and
    between their row spaces (`inputs`)."""

    one: float
    other: float
    inner: float
    difference: float
    outputs: tuple[float, ...] = ()
    inputs: tuple[float, ...] = ()


def relation(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], *, angles: bool = True) -> Relation:
    """The relation of two products, in float64, without multiplying them out: from the inner products of the columns of both
    `up` and of the rows of both `down`; `angles`, where asked for, after Björck and Golub 1973."""
    ups, downs = [pair[0].double() for pair in (one, other)], [pair[1].double().T for pair in (one, other)]
    of_ups, of_downs = _Products(*ups), _Products(*downs)
    norms = [math.sqrt(max(float((of_ups.own[i] * of_downs.own[i]).sum()), 0.0)) for i in (0, 1)]
    inner = float((of_ups.across * of_downs.across).sum())
    squared, whole = norms[0] ** 2 + norms[1] ** 2 - 2 * inner, norms[0] ** 2 + norms[1] ** 2
    difference = math.sqrt(squared) if squared > CANCELLED * whole else difference_norm(one, other)
    if not angles or not all(norms):
        return Relation(norms[0], norms[1], inner, difference)
    cosines = [of_ups.cosines(), of_downs.cosines()]
    # Dependent columns span less than they number: then the spans are those of the product, by QR and SVD.
    if any(found is None for found in cosines):
        bases = [_bases(up, down.T) for up, down in zip(ups, downs, strict=True)]
        cosines = [torch.linalg.svdvals(bases[0][side].T @ bases[1][side]) for side in (0, 1)]
    outputs, inputs = (
        tuple(torch.rad2deg(torch.arccos(found.clamp(-1, 1))).tolist()) for found in cosines if found is not None
    )
    return Relation(norms[0], norms[1], inner, difference, outputs, inputs)


# A pivot ratio of 1e-4 costs the cosines about 2e-16 / 1e-8; unlike in `krylov`, no second pass repairs a larger loss.
_INDEPENDENT: Final = 1e-4
"""The least ratio of Cholesky pivots at which columns are made orthonormal by their inner products."""
_NOISE: Final = 1e-7
"""The share of the largest singular value below which directions are no part of a product in float32."""


class _Products:
    """Inner products of the columns of two matrices: `own` of each matrix with itself, `across` of one with the other."""

    def __init__(self, one: Tensor, other: Tensor) -> None:
        self.own = one.T @ one, other.T @ other
        self.across = one.T @ other

    def cosines(self) -> Tensor | None:
        """The cosines of the principal angles between the two spans, largest first; None where the columns of either are
        nearly dependent."""
        roots = []
        for gram in self.own:
            root, info = torch.linalg.cholesky_ex(gram)
            pivots = root.diagonal()
            if int(info) or float(pivots.min()) < _INDEPENDENT * float(pivots.max()):
                return None
            roots.append(root)
        # L₁⁻¹ · across · L₂⁻ᵀ holds the inner products of two orthonormal bases.
        left = torch.linalg.solve_triangular(roots[0], self.across, upper=False)
        both = torch.linalg.solve_triangular(roots[1], left.T, upper=False)
        found: Tensor = torch.linalg.svdvals(both)
        return found


def _bases(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column space and of the row space of a product in float64, noise left out."""
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
"""The largest number whose squares float32 can add up, many millions of them, without overflow."""


class ProductSVD:
    """The spectrum of D = `up @ down`, (m, r) and (r, n): `sigma` in float64, largest first, and best factors at any rank.

    From downᵀ = Q R in float32, and the eigenvectors V of R (upᵀ up) Rᵀ, (r, r). The right singular vectors of D are Q V,
    and D Q V is up Rᵀ V: neither basis is formed, and the factors are a projection of D however small a singular value is.
    Products and eigenvectors in float32, which are fast, leave `sigma` exact to some 1e-4 of its largest value, those in
    float64 to 1e-8.
    """

    def __init__(self, up: Tensor, down: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.up, self.down = up.float(), down.float()
        self._reflectors, self._tau = torch.geqrf(self.down.T)
        wide, triangle = self.up.to(dtype), self._reflectors[: len(self._tau)].triu().to(dtype)
        gram = wide.T @ wide
        # Both are scaled to entries of about 1, so that products of their products stay in range.
        sizes = float(gram.diagonal().max()) or 1.0, float(triangle.abs().max()) or 1.0
        gram, scaled = gram / sizes[0], triangle / sizes[1]
        values, vectors = torch.linalg.eigh(scaled @ gram @ scaled.T)
        self.squares = values.double().flip(0).clamp_min(0) * (sizes[0] * sizes[1] ** 2)
        self.sigma = self.squares.sqrt()
        self._right, self._turned = vectors.double().flip(1), triangle.double().T

    @classmethod
    def enough(cls, up: Tensor, down: Tensor, rank_of: Callable[[Tensor], int]) -> ProductSVD:
        """The decomposition from float32 products where these are exact enough for the energy that the rank leaves out, else
        from float64; `rank_of` gives the rank for a spectrum."""
        if max(map(abs, (*bounds(up), *bounds(down)))) > LARGE:
            return cls(up, down)
        core = cls(up, down, torch.float32)
        left = float(core.squares[rank_of(core.sigma) :].sum())
        return core if left > _TOLD * core.most else cls(up, down)

    @property
    def most(self) -> float:
        """‖up‖² ‖down‖², an upper bound of ‖D‖² and the scale of the rounding in products of the factors."""
        return float(self.up.norm()) ** 2 * float(self.down.norm()) ** 2

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Float32 factors of the best approximation at `rank`, with the root of each singular value on either side."""
        root = self.sigma[:rank].sqrt()
        over = torch.where(root > 0, 1 / root, 0.0)
        kept = self._right[:, :rank]
        # LAPACK's reflectors stand for the full Q, (n, n), so V gets zeros below.
        padded = self.up.new_zeros(self.down.shape[1], rank)
        padded[: len(kept)] = kept * root
        downs = torch.ormqr(self._reflectors, self._tau, padded).T
        return self.up @ (self._turned @ kept * over).float(), downs

    def distance(self, up: Tensor, down: Tensor) -> float:
        """‖D − up · down‖ for other factors: from small products in float32 where these give a difference so large to a part
        in a thousand, else by `difference_norm`."""
        ups, downs = up.float(), down.float()
        across = ((self.up.T @ ups).double() * (self.down @ downs.T).double()).sum()
        own = ((ups.T @ ups).double() * (downs @ downs.T).double()).sum()
        whole = float(self.squares.sum())
        squared = whole - 2 * float(across) + float(own)
        return math.sqrt(squared) if squared > _TOLD * self.most else difference_norm((self.up, self.down), (up, down))
