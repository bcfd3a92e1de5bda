"""Linear algebra on factors: norms and spectra of a product without forming it. Tensors in, tensors out."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor


def singular_values(up: Tensor, down: Tensor) -> Tensor:
    """The singular values of `up @ down`, (m, r) and (r, n), largest first, in float64, from a core of at most r × r.

    QR of both factors, then the SVD of the product of the triangles: exact to rounding, O((m + n) r²).
    """
    up_core = torch.linalg.qr(up.double(), mode="r").R
    down_core = torch.linalg.qr(down.double().T, mode="r").R
    sigma: Tensor = torch.linalg.svdvals(up_core @ down_core.T)
    return sigma


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


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = sigma.sum()
    if total == 0:
        return 0.0
    shares = sigma[sigma > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def core_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(P, U, σ, Vᵀ, Q) with `up @ down` = (P U) σ (Q V)ᵀ: QR of both factors in float32, the SVD of their core in float64.

    U, σ and V are as small as the rank is, σ largest first, so that only the singular vectors that are kept are made.
    """
    up_basis, up_core = torch.linalg.qr(up.float())
    down_basis, down_core = torch.linalg.qr(down.float().T)
    left, sigma, right = torch.linalg.svd(up_core.double() @ down_core.double().T, full_matrices=False)
    return up_basis, left, sigma, right, down_basis
