"""LoHa: ΔW = scale · (w1_a w1_b) ⊙ (w2_a w2_b), the elementwise product of two low-rank matrices.

Hyeon-Woo et al. 2022, arXiv:2108.06098; layout of LyCORIS functional/loha.py. The Tucker form has a core for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.base import Delta, Leaves, StoredDelta, block_diagonal, scale_exactly, scale_or_one, split_rows
from loratool.deltas.schema import Given
from loratool.errors import Unsupported


@dataclass(frozen=True, slots=True)
class LoHa(StoredDelta):
    """`w_a` (out, rank) and `w_b` (rank, in·kernel); with cores `t` (rank, rank, *kernel), (rank, out) and (rank, in)."""

    kind: ClassVar[str] = "loha"

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    scale: float | None = None

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        return cls(
            w1_a=leaves["hada_w1_a"],
            w1_b=leaves["hada_w1_b"],
            w2_a=leaves["hada_w2_a"],
            w2_b=leaves["hada_w2_b"],
            t1=leaves.get("hada_t1"),
            t2=leaves.get("hada_t2"),
            scale=given.scale,
        )

    def leaves(self) -> dict[str, Tensor]:
        named = {"w1_a": self.w1_a, "w1_b": self.w1_b, "w2_a": self.w2_a, "w2_b": self.w2_b, "t1": self.t1, "t2": self.t2}
        return {f"hada_{name}": tensor for name, tensor in named.items() if tensor is not None}

    @property
    def shape(self) -> tuple[int, ...]:
        if self.t1 is None:
            return self.w1_a.shape[0], self.w1_b.shape[1]
        return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])

    @property
    def kernel_flattened(self) -> bool:
        return True

    def dense(self) -> Tensor:
        first, second = _product(self.w1_a, self.w1_b, self.t1), _product(self.w2_a, self.w2_b, self.t2)
        # In place, as each of the two is as large as the weight.
        return first.mul_(second).mul_(scale_or_one(self.scale))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Exact factors of rank r₁ · r₂, by products of one side's columns and rows with the other's (Khatri-Rao)."""
        if self.t1 is not None:
            return None
        scale = scale_or_one(self.scale)
        # (Σᵢ aᵢ bᵢ)(Σⱼ cⱼ dⱼ) = Σᵢⱼ (aᵢ cⱼ)(bᵢ dⱼ) holds for every entry of ΔW: each pair (i, j) is one rank.
        up = (self.w1_a.float()[:, :, None] * self.w2_a.float()[:, None, :]).flatten(1)
        down = (self.w1_b.float()[:, None, :] * self.w2_b.float()[None, :, :]).flatten(0, 1)
        return up * scale, down

    def scaled(self, by: float) -> Self:
        return replace(self, scale=by * scale_or_one(self.scale))

    def folded(self) -> LoHa:
        return replace(self, w1_a=scale_exactly(self.w1_a, self.scale), scale=None)

    def stack_with(self, parts: Sequence[Self]) -> LoHa:
        """Stacks parts by making both left factors block-diagonal: ranks add."""
        if any(part.t1 is not None for part in parts):
            raise Unsupported("LoHa with Tucker cores has no common form")
        alike = all(part.scale == parts[0].scale for part in parts)
        folded: Sequence[LoHa] = parts if alike else [part.folded() for part in parts]
        return LoHa(
            w1_a=block_diagonal([part.w1_a for part in folded]),
            w1_b=torch.cat([part.w1_b for part in folded]),
            w2_a=block_diagonal([part.w2_a for part in folded]),
            w2_b=torch.cat([part.w2_b for part in folded]),
            scale=parts[0].scale if alike else None,
        )

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        # Rows of the weight are rows of both left factors, which are stored transposed beside a core.
        axis = 0 if self.t1 is None else 1
        pairs = zip(split_rows(self.w1_a, sizes, axis), split_rows(self.w2_a, sizes, axis), strict=True)
        return [replace(self, w1_a=one, w2_a=two) for one, two in pairs]


def _product(left: Tensor, right: Tensor, core: Tensor | None) -> Tensor:
    if core is None:
        return left.float() @ right.float()
    return torch.einsum("ij...,jr,ip->pr...", core.float(), right.float(), left.float())
