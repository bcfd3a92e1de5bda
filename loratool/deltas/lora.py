"""LoRA: ΔW = (alpha / rank) · up · down, on linear, embedding and convolution weights (Hu et al. 2021, arXiv:2106.09685).

Convolutions hold the kernel in `down` (kohya's LoCon), or in `mid`, between two 1×1 factors (LyCORIS's Tucker form).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.base import Delta, Leaves, cut


@dataclass(frozen=True, slots=True)
class LoRA(Delta):
    """`down` (rank, in, *kernel), `up` (out, rank, *ones), `mid` (rank, rank, *kernel) or None; alpha None is scale 1."""

    kind: ClassVar[str] = "lora"

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    alpha: float | None = None

    @classmethod
    def from_leaves(cls, leaves: Leaves, alpha: float | None) -> Self:
        return cls(leaves["down"], leaves["up"], leaves.get("mid"), alpha)

    def leaves(self) -> dict[str, Tensor]:
        mid = {} if self.mid is None else {"mid": self.mid}
        return {"down": self.down, "up": self.up, **mid}

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def factors(self) -> tuple[Tensor, Tensor]:
        up = self.up.flatten(1).float() * self.scale
        if self.mid is None:
            return up, self.down.flatten(1).float()
        # mid[m, n]: m pairs with up, n with down (LyCORIS functional/locon.py).
        core = torch.einsum("mn...,ni->mi...", self.mid.float(), self.down.flatten(1).float())
        return up, core.flatten(1)

    def dense(self) -> Tensor:
        up, down = self.factors()
        return (up @ down).reshape(self.shape)

    def split(self, sizes: Sequence[int]) -> list[Self]:
        return [replace(self, up=rows) for rows in cut(self.up, sizes)]


@dataclass(frozen=True, slots=True)
class Embedding(Delta):
    """PEFT's LoRA on an embedding, E += scale · (B A)ᵀ: `down` A (rank, vocabulary), `up` B (width, rank).

    Source: PEFT tuners/lora/layer.py, class Embedding.
    """

    kind: ClassVar[str] = "embedding"

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @classmethod
    def from_leaves(cls, leaves: Leaves, alpha: float | None) -> Self:
        return cls(leaves["embedding_down"], leaves["embedding_up"], alpha)

    def leaves(self) -> dict[str, Tensor]:
        return {"embedding_down": self.down, "embedding_up": self.up}

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.down.shape[1], self.up.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down.float().T * self.scale, self.up.float().T

    def dense(self) -> Tensor:
        up, down = self.factors()
        return up @ down

    def split(self, sizes: Sequence[int]) -> list[Self]:
        return [replace(self, down=rows) for rows in cut(self.down, sizes, 1)]
