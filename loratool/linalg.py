"""Linear algebra on factors: norms and spectra of a product without forming it. Tensors in, tensors out."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

EXACT_BELOW: Final = 512
"""The smaller side of a matrix up to which a full SVD is not worth avoiding."""


def singular_values(up: Tensor, down: Tensor) -> Tensor:
    """The singular values of `up @ down`, (m, r) and (r, n), largest first, in float64, from a core of at most r × r.

    QR of both factors, then the SVD of the product of the triangles: exact to rounding, O((m + n) r²).
    """
    up_core = torch.linalg.qr(up.double(), mode="r").R
    down_core = torch.linalg.qr(down.double().T, mode="r").R
    sigma: Tensor = torch.linalg.svdvals(up_core @ down_core.T)
    return sigma


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = sigma.sum()
    if total == 0:
        return 0.0
    shares = sigma[sigma > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def factored_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, σ, Vᵀ) of `up @ down` in float32, σ largest first, by QR of both factors and the SVD of their small core.

    Exact to rounding; the core is taken in float64. At most min(m, r, n) values.
    """
    up_basis, up_core = torch.linalg.qr(up.float())
    down_basis, down_core = torch.linalg.qr(down.float().T)
    left, sigma, right = torch.linalg.svd(up_core.double() @ down_core.double().T, full_matrices=False)
    return up_basis @ left.float(), sigma.float(), right.float() @ down_basis.T


def leading_svd(matrix: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(U, σ, Vᵀ) of the `rank` largest singular values of a dense float32 `matrix`.

    Exact for small matrices. Large ones go through a randomised range finder of twice the rank with four QR-stabilised
    power iterations (Halko, Martinsson, Tropp 2011, algorithm 4.4), within 2e-4 of the best error at that rank.
    """
    smaller = min(matrix.shape)
    width = min(2 * rank + 8, smaller)
    if smaller <= EXACT_BELOW or 2 * width >= smaller:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], sigma[:rank], right[:rank]
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], width, generator=generator)).Q
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, sigma, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], sigma[:rank], right[:rank]


def rank_within(sigma: Tensor, total: float, error: float) -> int:
    """The smallest rank at which what is left out of a matrix of norm `total` is at most `error` of it; 0 if none is."""
    if total == 0:
        return 1
    left_out = (total**2 - torch.cumsum(sigma.double() ** 2, 0)).clamp_min(0).sqrt()
    enough = torch.nonzero(left_out <= error * total)
    return int(enough[0]) + 1 if len(enough) else 0


def balanced(left: Tensor, sigma: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up, down) of the first `rank` terms of an SVD, the root of each singular value on either side."""
    root = sigma[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
