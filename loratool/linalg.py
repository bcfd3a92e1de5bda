"""Linear algebra on factors: norms and spectra of a product without forming it. Tensors in, tensors out."""

from __future__ import annotations

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


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = sigma.sum()
    if total == 0:
        return 0.0
    shares = sigma[sigma > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def factored_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, σ, Vᵀ) of `up @ down`, σ in float64 and largest first, by QR of both factors and the SVD of their small core.

    U and V are in float32. Exact to rounding; the core is taken in float64. At most min(m, r, n) values.
    """
    up_basis, up_core = torch.linalg.qr(up.float())
    down_basis, down_core = torch.linalg.qr(down.float().T)
    left, sigma, right = torch.linalg.svd(up_core.double() @ down_core.double().T, full_matrices=False)
    return up_basis @ left.float(), sigma, right.float() @ down_basis.T
