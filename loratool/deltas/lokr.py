"""LoKr: ΔW = scale · w1 ⊗ w2, a Kronecker product, each side whole or a product of factors (LyCORIS functional/lokr.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.base import Delta, Leaves, StoredDelta, scale_exactly, scale_or_one, split_rows
from loratool.deltas.full import Full
from loratool.deltas.schema import Given
from loratool.errors import Unsupported


@dataclass(frozen=True, slots=True)
class LoKr(StoredDelta):
    """`w1` (o₁, i₁) or `w1_a` (o₁, r) `w1_b` (r, i₁); `w2` (o₂, i₂, *kernel) or `w2_a` (o₂, r) `w2_b` (r, i₂·kernel),
    or with a core `t2` (r, r, *kernel): `w2_a` (r, o₂), `w2_b` (r, i₂).

    LyCORIS ignores alpha where both sides are whole, PEFT does not: `scale` is settled by whoever reads the file.
    """

    kind: ClassVar[str] = "lokr"

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    scale: float | None = None

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        return cls(**{name.removeprefix("lokr_"): tensor for name, tensor in leaves.items()}, scale=given.scale)

    def leaves(self) -> dict[str, Tensor]:
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        return {f"lokr_{name}": tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def shape(self) -> tuple[int, ...]:
        one, two = self._first(), self._second_shape()
        return (one.shape[0] * two[0], one.shape[1] * two[1], *two[2:])

    @property
    def kernel_flattened(self) -> bool:
        return True

    def dense(self) -> Tensor:
        two = self._second()
        return self._times(torch.kron(self._first(), two.flatten(1).contiguous()).reshape(self.shape))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Exact factors by (a b) ⊗ (c d) = (a ⊗ c)(b ⊗ d); None where neither side is a product, or where w2 has a core."""
        if self.t2 is not None:
            return None
        left, right = self._pair(self.w1, self.w1_a, self.w1_b), self._pair(self.w2, self.w2_a, self.w2_b)
        if left is None and right is None:
            return None
        one, two = self._first(), self._second().flatten(1).contiguous()
        # A side that is whole is its own product with an identity.
        a, b = left or (one, torch.eye(one.shape[1], device=one.device))
        c, d = right or (torch.eye(two.shape[0], device=two.device), two)
        return self._times(torch.kron(a, c)), torch.kron(b, d)

    def scaled(self, by: float) -> Self:
        return replace(self, scale=by * scale_or_one(self.scale))

    def folded(self) -> LoKr:
        return self._with_left(scale_exactly(self._left, self.scale), None)

    def stack_with(self, parts: Sequence[Self]) -> LoKr:
        """Stacks parts that share all but the left factor of w1, as the pieces of a delta that was split do; raises
        `Unsupported` for others, since Kronecker products of unlike w2 do not stack into one."""
        left = "lokr_w1" if self.w1 is not None else "lokr_w1_a"
        # Equal to the last bit: `stack` is the inverse of `split`, and approximates nothing.
        mine = {leaf: tensor for leaf, tensor in self.leaves().items() if leaf != left}
        for part in parts:
            theirs = {leaf: tensor for leaf, tensor in part.leaves().items() if leaf != left}
            alike = mine.keys() == theirs.keys() and part.scale == self.scale
            if not alike or not all(torch.equal(mine[leaf], theirs[leaf]) for leaf in mine):
                raise Unsupported("LoKr of unlike parts has no common form")
        return self._with_left(torch.cat([part._left for part in parts]), self.scale)

    @property
    def _left(self) -> Tensor:
        """The factor whose rows are blocks of the weight's rows: `w1`, or `w1_a`."""
        left = self.w1 if self.w1 is not None else self.w1_a
        assert left is not None
        return left

    def _with_left(self, left: Tensor, scale: float | None) -> LoKr:
        return replace(self, w1=left, scale=scale) if self.w1 is not None else replace(self, w1_a=left, scale=scale)

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """Pieces in factored form where each is a whole number of w2's rows; otherwise whole differences."""
        # A row of the weight is a row of w1 times a row of w2, and the rows of w2 come round once for each of w1.
        rows = self._second_shape()[0]
        if any(size % rows for size in sizes):
            return [Full(piece) for piece in split_rows(self.dense(), sizes)]
        pieces = [size // rows for size in sizes]
        return [self._with_left(piece, self.scale) for piece in split_rows(self._left, pieces)]

    def _times(self, product: Tensor) -> Tensor:
        return product if self.scale is None else product * self.scale

    def _first(self) -> Tensor:
        pair = self._pair(self.w1, self.w1_a, self.w1_b)
        return pair[0] @ pair[1] if pair else _leaves_given(self.w1)

    def _second(self) -> Tensor:
        if self.t2 is not None:
            # Beside a core LyCORIS stores w2_a as (r, o₂), transposed (functional/general.py, rebuild_tucker).
            left, right = _leaves_given(self.w2_a), _leaves_given(self.w2_b)
            return torch.einsum("ij...,jr,ip->pr...", self.t2.float(), right, left)
        pair = self._pair(self.w2, self.w2_a, self.w2_b)
        return pair[0] @ pair[1] if pair else _leaves_given(self.w2)

    def _second_shape(self) -> tuple[int, ...]:
        if self.w2 is not None:
            return tuple(self.w2.shape)
        left, right = _leaves_given(self.w2_a), _leaves_given(self.w2_b)
        if self.t2 is not None:
            return (left.shape[1], right.shape[1], *self.t2.shape[2:])
        return left.shape[0], right.shape[1]

    @staticmethod
    def _pair(whole: Tensor | None, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if whole is not None or left is None or right is None:
            return None
        return left.float(), right.float().flatten(1)


def _leaves_given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the schema lets no LoKr through that lacks a side"
    return tensor.float()
