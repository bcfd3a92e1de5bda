"""Kinds that multiply the weight: (IA)³ scales rows or columns, GLoRA adds W times a low-rank matrix to a LoRA.

Liu et al. 2022, arXiv:2205.05638; Chavan et al. 2023, arXiv:2306.07967. Both trainers of (IA)³ are read: LyCORIS stores what
is added to 1, PEFT the multiplier itself. Changes are linear in the strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from loratool.deltas.base import Delta, Leaves, StoredDelta, scale_exactly, scale_or_one, split_rows, to_compute_dtype
from loratool.deltas.schema import ANY, Given
from loratool.errors import NeedsBase, Unsupported


@dataclass(frozen=True, slots=True)
class IA3(StoredDelta):
    """W' = W ⊙ multiplier, with `vector` of one number per row, or per column where `on_input`.

    The multiplier is the stored vector plus `offset`: 1 in LyCORIS, 0 in PEFT.
    """

    kind: ClassVar[str] = "ia3"
    additive: ClassVar[bool] = False

    vector: Tensor
    on_input: bool
    offset: float
    stored: Leaves

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        if "ia3_l" in leaves:
            vector = leaves["ia3_l"]
            # PEFT stores a convolution's as (1, channels, 1, 1) on whichever side they are.
            unsure = vector.ndim > 2 and given.multiplies_inputs is not None
            on_input = bool(given.multiplies_inputs) if unsure else vector.shape[0] == 1
            return cls(vector, on_input, 0.0, leaves)
        return cls(leaves["ia3_weight"], bool(leaves["on_input"].float().any()), 1.0, leaves)

    def leaves(self) -> dict[str, Tensor]:
        return dict(self.stored)

    @property
    def changes_bias(self) -> bool:
        """Whether the delta is PEFT's on outputs, which include the bias when they are multiplied."""
        return "ia3_l" in self.stored and not self.on_input

    @property
    def shape(self) -> tuple[int, ...]:
        return (ANY, self.vector.numel()) if self.on_input else (self.vector.numel(), ANY)

    def dense(self) -> Tensor:
        raise NeedsBase("(IA)³ multiplies the weight")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = to_compute_dtype(weight)
        axis = 1 if self.on_input else 0
        view = [-1 if dimension == axis else 1 for dimension in range(base.ndim)]
        # Less 1, so that what follows is the change alone, which the strength multiplies.
        multiplier = self.vector.to(base.dtype).flatten() + (self.offset - 1.0)
        return base + strength * base * multiplier.reshape(view)

    def scaled(self, by: float) -> Self:
        raise NeedsBase("(IA)³ multiplies the weight; give a strength to merge instead")

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        if self.on_input:
            return [self for _ in sizes]
        return [replace(self, vector=rows) for rows in split_rows(self.vector.flatten(), sizes)]


@dataclass(frozen=True, slots=True)
class GLoRA(StoredDelta):
    """ΔW = scale · (W a1 a2 + b1 b2): `a1` (in, r), `a2` (r, in), `b1` (out, r), `b2` (r, in, *kernel).

    Source: LyCORIS modules/glora.py.
    """

    kind: ClassVar[str] = "glora"
    additive: ClassVar[bool] = False

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    scale: float | None = None

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        if "bm" in leaves:
            raise Unsupported("is a GLoRA with a Tucker core, which no trainer has written so far")
        return cls(leaves["a1"], leaves["a2"], leaves["b1"], leaves["b2"], given.scale)

    def leaves(self) -> dict[str, Tensor]:
        return {"a1": self.a1, "a2": self.a2, "b1": self.b1, "b2": self.b2}

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.b1.shape[0], self.b2.shape[1], *self.b2.shape[2:])

    def dense(self) -> Tensor:
        raise NeedsBase("GLoRA adds a multiple of the weight")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = to_compute_dtype(weight)
        a1, a2, b1, b2 = (factor.flatten(1).to(base.dtype) for factor in (self.a1, self.a2, self.b1, self.b2))
        # W a1 a2 runs over the inputs of each place in a kernel alike, so that the input axis must be the last one.
        times = ((base.movedim(1, -1) @ a1) @ a2).movedim(-1, 1)
        added = (b1 @ b2).reshape(base.shape)
        return base + strength * scale_or_one(self.scale) * (times + added)

    def scaled(self, by: float) -> Self:
        return replace(self, scale=by * scale_or_one(self.scale))

    def folded(self) -> GLoRA:
        # Once in each of the two products, which are added.
        return replace(self, a1=scale_exactly(self.a1, self.scale), b1=scale_exactly(self.b1, self.scale), scale=None)

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        # The rows of W itself are cut by whoever cuts the weight.
        return [replace(self, b1=rows) for rows in split_rows(self.b1, sizes)]
