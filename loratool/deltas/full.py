"""Changes that are stored whole: a difference to add, and a value to put in the weight's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from loratool.deltas.base import Delta, Leaves, cut, widened
from loratool.errors import NeedsBase


@dataclass(frozen=True, slots=True)
class Full(Delta):
    """`difference`, of the weight's shape, times `scale`; `leaf` is the name it is stored under (diff, diff_b, w_norm …).

    PEFT's lora_B.bias is one of these, with the module's scale.
    """

    kind: ClassVar[str] = "full"

    difference: Tensor
    leaf: str = "diff"
    scale: float = 1.0

    @classmethod
    def from_leaves(cls, leaves: Leaves, alpha: float | None) -> Self:
        ((leaf, difference),) = leaves.items()
        return cls(difference, leaf, 1.0 if alpha is None else alpha)

    def leaves(self) -> dict[str, Tensor]:
        return {self.leaf: self.difference}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.difference.shape)

    def dense(self) -> Tensor:
        return self.scale * self.difference.float()

    def split(self, sizes: Sequence[int]) -> list[Self]:
        return [type(self)(rows, self.leaf, self.scale) for rows in cut(self.difference, sizes)]


@dataclass(frozen=True, slots=True)
class Replace(Delta):
    """`value` in the weight's place: PEFT's modules_to_save and trained biases. At strength w, W + w · (value − W)."""

    kind: ClassVar[str] = "replace"
    additive: ClassVar[bool] = False

    value: Tensor
    leaf: str = "weight"

    @classmethod
    def from_leaves(cls, leaves: Leaves, alpha: float | None) -> Self:
        ((leaf, value),) = leaves.items()
        return cls(value, leaf)

    def leaves(self) -> dict[str, Tensor]:
        return {self.leaf: self.value}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def dense(self) -> Tensor:
        raise NeedsBase("a replaced weight is no difference until the base is known")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        if strength == 1.0:
            return widened(self.value).reshape(weight.shape)
        base = widened(weight)
        return base.lerp(self.value.to(base.dtype).reshape(weight.shape), strength)

    def split(self, sizes: Sequence[int]) -> list[Self]:
        return [type(self)(rows, self.leaf) for rows in cut(self.value, sizes)]
