"""What every delta can do. A delta is one module's change to one weight, as a value that knows nothing of models.

Subclasses are final and frozen. All arithmetic is in float32 (float64 on weights stored so), whatever the factors are
stored in; whoever stores a result rounds it, once. `dense` and `apply` may be slow but are right: the oracle for `factors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

Leaves = Mapping[str, Tensor]
ANY = -1
"""In a delta's shape: a dimension that it leaves to the weight."""


class Delta(ABC):
    """One module's change to one weight of shape `shape`, (out, in, *kernel), where `ANY` is whatever the weight has."""

    kind: ClassVar[str]
    additive: ClassVar[bool] = True
    """Whether it adds the same matrix to whatever weight it meets, so that deltas may be summed."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it changes."""

    @classmethod
    @abstractmethod
    def from_leaves(cls, leaves: Leaves, scale: float | None) -> Self:
        """Builds it from its tensors; `scale` multiplies the product of its factors, None where the file gives none."""

    @abstractmethod
    def leaves(self) -> dict[str, Tensor]:
        """Its tensors, as `from_leaves` takes them."""

    @abstractmethod
    def dense(self) -> Tensor:
        """ΔW in float32, of shape `shape`; raises `NeedsBase` where it depends on the weight."""

    @abstractmethod
    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """The deltas of `sizes` consecutive output rows each; raises `Unsupported` where there are none without the base."""

    @abstractmethod
    def scaled(self, by: float) -> Self:
        """The delta of `by` · ΔW; raises `NeedsBase` where it is not a multiple."""

    @property
    def flattened(self) -> bool:
        """Whether its files flatten kernels, so that only the weight knows them: `shape` is then (out, in · kernel)."""
        return False

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """`weight` changed at `strength`, in float32."""
        return widened(weight) + strength * self.dense().reshape(weight.shape)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Exact (up, down) in float32 with the scale inside, (out, r) and (r, in · kernel); None where it has none."""
        return None


def widened(weight: Tensor) -> Tensor:
    """A weight as it is computed with: float32, or float64 where it is stored so."""
    return weight if weight.dtype == torch.float64 else weight.float()


def cut(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """`tensor` in pieces of `sizes` along `dim`."""
    return torch.split_with_sizes(tensor, list(sizes), dim)


def or_one(scale: float | None) -> float:
    """A scale as a number: 1 where the file gives none."""
    return 1.0 if scale is None else scale
