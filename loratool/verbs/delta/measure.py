"""The measures of a change: its norm, its largest singular value, its stable and its effective rank, and its spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loratool.base.effects import Effect
from loratool.errors import NonFinite, error_context
from loratool.numbers.factor import rescaled_to_safe_range
from loratool.numbers.krylov import spectral_norm, squared_norm, truncated_svd
from loratool.numbers.linalg import OVERFLOWN, ProductSVD, effective_rank

_SMALL: Final = 512
"""Smaller side of a matrix up to which the whole spectrum is found, asked for or not."""


@dataclass(frozen=True, slots=True)
class ModuleMeasure:
    """One parameter's change: ‖ΔW‖, its largest singular value σ₁, the stable rank ‖ΔW‖² / σ₁², and the effective rank, the
    exponential of the entropy of the singular values (None where only some of them were computed); its share of the square
    of all changes; ‖ΔW‖ / ‖W₀‖ where a base tells; and its singular values, largest first, where they were asked for."""

    name: str
    shape: tuple[int, ...]
    norm: float
    sigma: float
    stable_rank: float
    effective_rank: float | None
    share: float
    relative: float | None
    spectrum: tuple[float, ...] = ()


def measure_module(name: str, effect: Effect, *, spectrum: bool) -> ModuleMeasure:
    """The figures of one change, except its share, which depends on all changes; raises `NonFinite` where it overflows."""
    with error_context(name):
        sigma, norm, complete = _singular_values(effect, whole=spectrum)
        # Norms of vectors are found without a decomposition, which would have refused them; shares are of squares.
        if not math.isfinite(norm * norm):
            raise NonFinite(OVERFLOWN)
    first = float(sigma[0]) if len(sigma) else 0.0
    return ModuleMeasure(
        name=name,
        shape=effect.shape,
        norm=norm,
        sigma=first,
        stable_rank=(norm / first) ** 2 if first else 0.0,
        effective_rank=effective_rank(sigma) if complete else None,
        share=0.0,
        relative=norm / effect.weight_norm if effect.weight_norm else None,
        spectrum=tuple(sigma.tolist()) if spectrum else (),
    )


def _singular_values(effect: Effect, *, whole: bool) -> tuple[Tensor, float, bool]:
    """The leading singular values or all of them, ‖ΔW‖, and whether the values are complete."""
    if effect.factors:
        core = ProductSVD.of(*effect.factors)
        return core.sigma, math.sqrt(float(core.squares.sum())), True
    dense = effect.dense()
    if dense.ndim < 2:
        # A vector is a matrix of one row, whose only singular value is its norm.
        norm = math.sqrt(squared_norm(dense.reshape(1, -1)))
        return torch.tensor([norm], dtype=torch.float64), norm, True
    if dense.ndim == 3:
        # Stacked experts act each on inputs of their own, as blocks along a diagonal: the spectrum is that of all of them.
        found = [_of_matrix(expert, whole=whole) for expert in dense]
        sigma = torch.cat([part for part, *_ in found]).sort(descending=True).values
        return sigma, math.hypot(*(norm for _, norm, _ in found)), all(complete for *_, complete in found)
    return _of_matrix(dense.flatten(1), whole=whole)


def _of_matrix(matrix: Tensor, *, whole: bool) -> tuple[Tensor, float, bool]:
    """`_singular_values` of one matrix: σ₁ alone where the matrix is large and nobody asked for more."""
    low, high = torch.aminmax(matrix)
    if float(low) == float(high) == 0:
        return torch.zeros(1, dtype=torch.float64), 0.0, True
    # Squares of very large or small numbers leave float32's range. A power of two is taken out, and put back exactly.
    scaled, exponent = rescaled_to_safe_range(matrix)
    back = math.ldexp(1.0, exponent)
    if not (whole or min(matrix.shape) <= _SMALL):
        sigma = torch.tensor([spectral_norm(scaled)], dtype=torch.float64)
        return sigma * back, math.sqrt(squared_norm(scaled)) * back, False
    # A rule of rank 0: only the spectrum is wanted, and no factors.
    found = truncated_svd(scaled, lambda spectrum: 0, whole=True).spectrum
    return found.sigma.cpu() * back, math.sqrt(found.total) * back, True
