"""Ways to merge several models' changes of one weight that are no sums: TIES, DARE, KnOTS and Core Space.

Each sees every ΔW in some coordinates, makes most of them zero, and adds what is left, by elected signs or plainly:

- TIES (Yadav et al. 2023, arXiv:2306.01708): the largest numbers of each; of each number, the mean of those that have
  the sign of the weighted sum. As in PEFT (utils/merge_utils.py), numbers are weighted before their mean is taken, so that
  one adapter alone keeps its strength; unlike there, the strengths count in the election too.
- DARE (Yu et al. 2024, arXiv:2311.03099): numbers left by chance, divided by how likely they were.
- KnOTS (Stoica et al. 2024, arXiv:2410.19735): TIES on Σ Vᵢᵀ, where U Σ [V₁ᵀ … Vₙᵀ] is the SVD of [ΔW₁ … ΔWₙ].
- Core Space (Panariello et al. 2025, arXiv:2509.17786): TIES on Uᵀ ΔWᵢ V, with the left singular vectors U of all `up` side
  by side, and V the right ones of all `down`, one below the other.

The last two never form a ΔW of a LoRA, and what they give is of no more rank than all terms together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loratool.deltas.base import Delta
from loratool.deltas.full import Full
from loratool.deltas.lora import LoRA
from loratool.deltas.schema import MERGE_METHOD_NAMES
from loratool.numbers.linalg import require_decomposable

Back = Callable[[Tensor], Delta]
"""Turns coordinates back into a delta."""
Sparsify = Callable[[Tensor, float, torch.Generator], Tensor]

_NOISE: Final = 1e-6
"""Singular values below this share of the largest are rounding: factors come in float32, whose step is 1.2e-7."""


def dense_space(terms: Sequence[Delta]) -> tuple[list[Tensor], Back]:
    """The deltas as they are: their coordinates are the numbers of ΔW."""
    leaf = next((term.leaf for term in terms if isinstance(term, Full)), "diff")
    shape = terms[0].shape
    return [term.dense().reshape(shape) for term in terms], lambda merged: Full(merged, leaf)


def knots_space(terms: Sequence[Delta]) -> tuple[list[Tensor], Back]:
    """The deltas along the output directions of all of them: Σ Vᵢᵀ of the SVD of all ΔW side by side."""
    pairs = [_factors(term) for term in terms]
    # ΔW side by side is basis · [triangle₁ down₁ … triangleₙ downₙ], so that the SVD is of a matrix with as few rows as the
    # ranks have in sum; and Σ Vᵢᵀ is Uᵀ times that of each term.
    basis, triangle = torch.linalg.qr(torch.cat([up for up, _ in pairs], dim=1).double())
    parts = [
        part @ down.double() for part, (_, down) in zip(torch.split(triangle, _ranks(pairs), dim=1), pairs, strict=True)
    ]
    directions = _leading(torch.cat(parts, dim=1))
    coordinates = [(directions.T @ part).float() for part in parts]
    return coordinates, _as_lora(terms[0].shape, up=(basis @ directions).float())


def core_space(terms: Sequence[Delta]) -> tuple[list[Tensor], Back]:
    """The deltas between the directions of all `up` and of all `down`: matrices no larger than the sum of all ranks."""
    pairs = [_factors(term) for term in terms]
    left = _leading(torch.cat([up for up, _ in pairs], dim=1).double())
    right = _leading(torch.cat([down for _, down in pairs]).double().T)
    coordinates = [((left.T @ up.double()) @ (down.double() @ right)).float() for up, down in pairs]
    lora = _as_lora(terms[0].shape, up=left.float())
    return coordinates, lambda merged: lora(merged @ right.T.float())


def trim_smallest(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """`matrix` with zeros for all but the largest numbers, of which the share `density` stays."""
    count = int(density * matrix.numel())
    kept = torch.zeros_like(matrix).flatten()
    # By place and not by a threshold, which numbers of one size would pass or fail together.
    largest = matrix.abs().flatten().topk(count).indices
    kept[largest] = matrix.flatten()[largest]
    return kept.reshape(matrix.shape)


def drop_at_random(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """`matrix` whose numbers stay with the chance `density`, divided by that chance, and are zero otherwise."""
    # Divided so that the expectation of every number is what the number was.
    return torch.where(torch.rand(matrix.shape, generator=generator) < density, matrix / density, 0.0)


def elect_signs(weighted: Tensor) -> Tensor:
    """For each number, the mean over the terms (dimension 0) that have the sign of the sum over all; zeros have no sign."""
    sign = torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
    agree = weighted.sign() == sign
    return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp_min(1)


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A method: the coordinates of its `space`, how these are made sparse, whether signs are elected, and whether results
    are `dense`, that is of full rank."""

    space: Callable[[Sequence[Delta]], tuple[list[Tensor], Back]]
    sparsify: Sparsify
    elect: bool
    dense: bool = False


MERGE_METHODS: Final[Mapping[str, MergeMethod]] = dict(
    zip(
        MERGE_METHOD_NAMES,
        (
            MergeMethod(dense_space, trim_smallest, elect=True, dense=True),
            MergeMethod(dense_space, drop_at_random, elect=False, dense=True),
            MergeMethod(dense_space, drop_at_random, elect=True, dense=True),
            MergeMethod(knots_space, trim_smallest, elect=True),
            MergeMethod(core_space, trim_smallest, elect=True),
        ),
        strict=True,
    )
)


def merge_deltas(
    terms: Sequence[Delta], strengths: Sequence[float], *, method: str, density: float, seeds: Sequence[str]
) -> Delta:
    """Merges `terms` by `method`; the seed of a term, any text, decides what of it is dropped by chance."""
    row = MERGE_METHODS[method]
    # Vectors have no directions, and are merged as they are.
    coordinates, back = (row.space if len(terms[0].shape) > 1 else dense_space)(terms)
    # Each term has a generator of its own, so that what it loses does not depend on the other terms.
    chances = [_generator(seed) for seed in seeds]
    sparse = [row.sparsify(matrix, density, chance) for matrix, chance in zip(coordinates, chances, strict=True)]
    weighted = torch.stack([strength * matrix for strength, matrix in zip(strengths, sparse, strict=True)])
    return back(elect_signs(weighted) if row.elect else weighted.sum(dim=0))


def _generator(text: str) -> torch.Generator:
    # Python's own hash of a text differs from process to process. 63 bits make a seed that is never negative.
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _factors(term: Delta) -> tuple[Tensor, Tensor]:
    """Exact (up, down) of a delta; where its kind has none, ΔW and an identity matrix."""
    factors = term.factors()
    if factors:
        return factors
    dense = term.dense().flatten(1)
    # On the shorter side, where the identity is smaller and the rank with it.
    one = torch.eye(min(dense.shape), device=dense.device)
    return (dense, one) if len(dense) > dense.shape[1] else (one, dense)


def _ranks(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    return [up.shape[1] for up, _ in pairs]


def _leading(matrix: Tensor) -> Tensor:
    """The left singular vectors of a float64 matrix whose singular values are above `_NOISE`."""
    left, sigma, _ = torch.linalg.svd(require_decomposable(matrix), full_matrices=False)
    found: Tensor = left[:, sigma > _NOISE * sigma[:1]]
    return found


def _as_lora(shape: tuple[int, ...], up: Tensor) -> Back:
    """Makes a LoRA for a weight of `shape` from `up` and from coordinates that stand for `down`."""
    ones = (1,) * len(shape[2:])
    return lambda merged: LoRA(merged.reshape(-1, *shape[1:]), up.reshape(*up.shape, *ones))
