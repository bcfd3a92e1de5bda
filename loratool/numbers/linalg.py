"""Linear algebra on factors: norms, spectra and angles of products that are never multiplied out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

from loratool.errors import NonFinite

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


OVERFLOWN: Final = "has numbers so large that products of them are NaN or Inf: its training diverged, or the file is damaged"
"""The message of `NonFinite` where nothing but the numbers of an input is to blame."""


def require_decomposable(matrix: Tensor) -> Tensor:
    """`matrix`, or a stack of them, about to be decomposed; raises `NonFinite` where it holds NaN or Inf, on which LAPACK
    does not converge. Adapters that hold these are refused when they are read: most often products have overflowed."""
    if not all_finite(matrix):
        raise NonFinite(OVERFLOWN)
    return matrix


def singular_values(up: Tensor, down: Tensor) -> Tensor:
    """The singular values of `up @ down`, (m, r) and (r, n), largest first, in float64, from a core of at most r × r.

    QR of both factors, then the SVD of the product of the triangles: exact to rounding, O((m + n) r²).
    """
    up_core = torch.linalg.qr(up.double(), mode="r").R
    down_core = torch.linalg.qr(down.double().T, mode="r").R
    sigma: Tensor = torch.linalg.svdvals(require_decomposable(up_core @ down_core.T))
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


Factors = tuple[Tensor, Tensor]
"""The factors of a product: up (m, r) and down (r, n)."""


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
        cosines = [torch.linalg.svdvals(require_decomposable(bases[0][side].T @ bases[1][side])) for side in (0, 1)]
    outputs, inputs = (
        tuple(torch.rad2deg(torch.arccos(found.clamp(-1, 1))).tolist()) for found in cosines if found is not None
    )
    return Relation(norms[0], norms[1], inner, difference, outputs, inputs)


def relations(ones: Sequence[Factors], others: Sequence[Factors], *, angles: bool = True) -> list[Relation]:
    """`relation` of pairs of products, all of one shape: found together, which a GPU is fast at, where there are several."""
    if len(ones) == 1:
        return [relation(ones[0], others[0], angles=angles)]
    sides = [[torch.stack([pair[number] for pair in each]).double() for each in (ones, others)] for number in (0, 1)]
    of_ups, of_downs = _Products(*sides[0]), _Products(*(down.mT for down in sides[1]))
    squares = [(of_ups.own[i] * of_downs.own[i]).sum((-2, -1)) for i in (0, 1)]
    inner = (of_ups.across * of_downs.across).sum((-2, -1))
    cosines = [products.cosines() if angles else None for products in (of_ups, of_downs)]
    numbers = torch.stack([*squares, inner]).cpu().T.tolist()
    degrees = [None if found is None else torch.rad2deg(torch.arccos(found.clamp(-1, 1))).tolist() for found in cosines]
    done = []
    for number, (one, other, product) in enumerate(numbers):
        squared, whole = one + other - 2 * product, one + other
        # What cancels, and spans of dependent columns, are taken one by one: the common case has neither.
        if squared <= CANCELLED * whole or (angles and (None in degrees or not one or not other)):
            done.append(relation(ones[number], others[number], angles=angles))
            continue
        outputs, inputs = (() if found is None else tuple(found[number]) for found in degrees)
        done.append(Relation(math.sqrt(one), math.sqrt(other), product, math.sqrt(squared), outputs, inputs))
    return done


# A pivot ratio of 1e-4 costs the cosines about 2e-16 / 1e-8; unlike in `krylov`, no second pass repairs a larger loss.
_INDEPENDENT: Final = 1e-4
"""The least ratio of Cholesky pivots at which columns are made orthonormal by their inner products."""
_NOISE: Final = 1e-7
"""The share of the largest singular value below which directions are no part of a product in float32."""


class _Products:
    """Inner products of the columns of two matrices, or of two stacks of matrices: `own` of each matrix with itself,
    `across` of one with the other."""

    def __init__(self, one: Tensor, other: Tensor) -> None:
        self.own = one.mT @ one, other.mT @ other
        self.across = one.mT @ other

    def cosines(self) -> Tensor | None:
        """The cosines of the principal angles between the two spans, largest first; None where the columns of any are nearly
        dependent."""
        roots = []
        for gram in self.own:
            root, info = torch.linalg.cholesky_ex(gram)
            pivots = root.diagonal(dim1=-2, dim2=-1)
            if bool(info.any()) or bool((pivots.amin(-1) < _INDEPENDENT * pivots.amax(-1)).any()):
                return None
            roots.append(root)
        # L₁⁻¹ · across · L₂⁻ᵀ holds the inner products of two orthonormal bases.
        left = torch.linalg.solve_triangular(roots[0], self.across, upper=False)
        both = torch.linalg.solve_triangular(roots[1], left.mT, upper=False)
        found: Tensor = torch.linalg.svdvals(require_decomposable(both))
        return found


def _bases(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column space and of the row space of a product in float64, noise left out."""
    up_basis, up_core = torch.linalg.qr(up)
    down_basis, down_core = torch.linalg.qr(down.T)
    left, sigma, right = torch.linalg.svd(require_decomposable(up_core @ down_core.T), full_matrices=False)
    kept = sigma > _NOISE * sigma[:1]
    return up_basis @ left[:, kept], down_basis @ right[kept].T


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = sigma.sum()
    if total == 0:
        return 0.0
    shares = sigma[sigma > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


RankOf = Callable[[Tensor], int]
"""Gives the rank that is wanted of a matrix with these singular values."""
LARGE: Final = 1e15
"""The largest number whose squares float32 can add up, many millions of them, without overflow."""


@dataclass(frozen=True, slots=True)
class ProductSVD:
    """The spectrum of D = `up @ down`, (m, r) and (r, n): `sigma` in float64, largest first, and best factors at any rank.
    `squares` are those of `sigma`. Of a stack of products (b, m, r) and (b, r, n) each has one in a stack of spectra.

    From downᵀ = Q R in float32, and the eigenvectors V of R (upᵀ up) Rᵀ, (r, r). The right singular vectors of D are Q V,
    and D Q V is up Rᵀ V: neither basis is formed, and the factors are a projection of D however small a singular value is.
    Products and eigenvectors in float32, which are fast, leave `sigma` exact to some 1e-4 of its largest value, those in
    float64 to 1e-8.
    """

    up: Tensor
    down: Tensor
    squares: Tensor
    sigma: Tensor
    reflectors: Tensor
    tau: Tensor
    right: Tensor
    turned: Tensor

    @classmethod
    def of(cls, up: Tensor, down: Tensor, dtype: torch.dtype = torch.float64) -> ProductSVD:
        """The decomposition of a product, or of a stack of products, from products and eigenvectors in `dtype`."""
        up, down = up.float(), down.float()
        reflectors, tau = torch.geqrf(down.mT)
        wide, triangle = up.to(dtype), reflectors[..., : tau.shape[-1], :].triu().to(dtype)
        gram = wide.mT @ wide
        # Both are scaled to entries of about 1, so that products of their products stay in range.
        sizes = [_largest(gram.diagonal(dim1=-2, dim2=-1), 1), _largest(triangle.abs(), 2)]
        gram, scaled = gram / sizes[0][..., None, None], triangle / sizes[1][..., None, None]
        values, vectors = torch.linalg.eigh(require_decomposable(scaled @ gram @ scaled.mT))
        whole = sizes[0].double() * sizes[1].double() ** 2
        squares = values.double().flip(-1).clamp_min(0) * whole[..., None]
        return cls(up, down, squares, squares.sqrt(), reflectors, tau, vectors.double().flip(-1), triangle.double().mT)

    @classmethod
    def enough(cls, up: Tensor, down: Tensor, rank_of: RankOf) -> ProductSVD:
        """The decomposition from float32 products where these are exact enough for the energy that the rank leaves out, else
        from float64; `rank_of` gives the rank for a spectrum."""
        if _is_large(up, down):
            return cls.of(up, down)
        core = cls.of(up, down, torch.float32)
        return core if core.tells(rank_of) else cls.of(up, down)

    @classmethod
    def enough_each(cls, ups: Sequence[Tensor], downs: Sequence[Tensor], rank_of: Sequence[RankOf]) -> list[ProductSVD]:
        """`enough` of products of one shape, decomposed together: what a GPU is fast at."""
        if len(ups) == 1:
            return [cls.enough(ups[0], downs[0], rank_of[0])]
        stacks = torch.stack(list(ups)), torch.stack(list(downs))
        found = [] if _is_large(*stacks) else cls.of(*stacks, torch.float32).parts()
        told = {number for number, (core, rank) in enumerate(zip(found, rank_of, strict=False)) if core.tells(rank)}
        rest = [number for number in range(len(ups)) if number not in told]
        exact = iter(cls.of(stacks[0][rest], stacks[1][rest]).parts() if rest else ())
        return [found[number] if number in told else next(exact) for number in range(len(ups))]

    def parts(self) -> list[ProductSVD]:
        """The decompositions of a stack's products."""
        each = zip(*(getattr(self, field.name) for field in fields(self)), strict=True)
        return [ProductSVD(*tensors) for tensors in each]

    def tells(self, rank_of: RankOf) -> bool:
        """Whether the spectrum of float32 products is exact enough for the energy that the rank leaves out."""
        return float(self.squares[rank_of(self.sigma) :].sum()) > _TOLD * self.most

    @property
    def most(self) -> float:
        """‖up‖² ‖down‖², an upper bound of ‖D‖² and the scale of the rounding in products of the factors."""
        return float(self.up.norm()) ** 2 * float(self.down.norm()) ** 2

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Float32 factors of the best approximation at `rank`, with the root of each singular value on either side."""
        root = self.sigma[:rank].sqrt()
        over = torch.where(root > 0, 1 / root, 0.0)
        kept = self.right[:, :rank]
        # LAPACK's reflectors stand for the full Q, (n, n), so V gets zeros below.
        padded = self.up.new_zeros(self.down.shape[1], rank)
        padded[: len(kept)] = kept * root
        downs = torch.ormqr(self.reflectors, self.tau, padded).T
        return self.up @ (self.turned @ kept * over).float(), downs

    def distance(self, up: Tensor, down: Tensor) -> float:
        """‖D − up · down‖ for other factors: from small products in float32 where these give a difference so large to a part
        in a thousand, else by `difference_norm`."""
        ups, downs = up.float(), down.float()
        across = ((self.up.T @ ups).double() * (self.down @ downs.T).double()).sum()
        own = ((ups.T @ ups).double() * (downs @ downs.T).double()).sum()
        whole = float(self.squares.sum())
        squared = whole - 2 * float(across) + float(own)
        return math.sqrt(squared) if squared > _TOLD * self.most else difference_norm((self.up, self.down), (up, down))


def _largest(values: Tensor, dimensions: int) -> Tensor:
    """The largest number over the last dimensions; 1 where that is 0."""
    found = values.amax(tuple(range(-dimensions, 0)))
    return torch.where(found == 0, 1.0, found)


def _is_large(up: Tensor, down: Tensor) -> bool:
    """Whether squares of the numbers of factors might overflow float32."""
    return max(map(abs, (*bounds(up), *bounds(down)))) > LARGE
