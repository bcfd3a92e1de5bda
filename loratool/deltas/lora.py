"""LoRA: ΔW = scale · up · down, on linear, embedding and convolution weights (Hu et al. 2021, arXiv:2106.09685).

Convolutions hold the kernel in `down` (kohya's LoCon), or in `mid`, between two 1×1 factors (LyCORIS's Tucker form).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.base import (
    Delta,
    Leaves,
    StoredDelta,
    block_diagonal,
    scale_exactly,
    scale_or_one,
    split_rows,
    to_compute_dtype,
    with_columns,
    with_rows,
)
from loratool.deltas.schema import ANY, Given
from loratool.errors import ShapeMismatch, Unsupported


@dataclass(frozen=True, slots=True)
class LoRA(StoredDelta):
    """`down` (rank, in, *kernel), `up` (out, rank, *ones), `mid` (rank, rank, *kernel) or None."""

    kind: ClassVar[str] = "lora"
    fits_lora_file: ClassVar[bool] = True
    resizable: ClassVar[bool] = True
    scaled_by_config: ClassVar[bool] = True

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    scale: float | None = None

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        return cls(leaves["down"], leaves["up"], leaves.get("mid"), given.scale)

    def leaves(self) -> dict[str, Tensor]:
        mid = {} if self.mid is None else {"mid": self.mid}
        return {"down": self.down, "up": self.up, **mid}

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def factors(self) -> tuple[Tensor, Tensor]:
        up = self.up.flatten(1).float() * scale_or_one(self.scale)
        if self.mid is None:
            return up, self.down.flatten(1).float()
        # mid[m, n]: m pairs with up, n with down (LyCORIS functional/locon.py).
        core = torch.einsum("mn...,ni->mi...", self.mid.float(), self.down.flatten(1).float())
        return up, core.flatten(1)

    def dense(self) -> Tensor:
        up, down = self.factors()
        return (up @ down).reshape(self.shape)

    def scaled(self, by: float) -> Self:
        return replace(self, scale=by * scale_or_one(self.scale))

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        return [replace(self, up=rows) for rows in split_rows(self.up, sizes)]

    def equivalent_forms(self) -> Iterator[Delta]:
        """The LoRA itself and, where it has no kernel, the same as PEFT's LoRA on an embedding."""
        yield self
        if self.mid is None and self.up.ndim == self.down.ndim == 2:
            yield Embedding(self.up.T, self.down.T, self.scale)

    def folded(self) -> LoRA:
        return replace(self, up=scale_exactly(self.up, self.scale), scale=None)

    def padded(self, rank: int) -> LoRA:
        """The same LoRA with zeros up to `rank`; unchanged with a Tucker core."""
        if self.mid is not None or rank == self.rank:
            return self
        return replace(self, down=with_rows(self.down, rank), up=with_columns(self.up, rank))

    def rounded(self, dtype: torch.dtype) -> LoRA:
        # A Tucker core goes into `down`, whose shape is then that of a plain LoRA with a kernel.
        up, down = self.factors()
        return LoRA(down.reshape(-1, *self.shape[1:]).to(dtype), up.reshape(self.up.shape).to(dtype), None, 1.0)

    def without_zero_ranks(self) -> LoRA | None:
        """The same LoRA without the ranks whose column of `up` is zero: those of other parts, where a stack was cut."""
        used = self.up.flatten(1).any(dim=0)
        if bool(used.all()) or self.mid is not None:
            return self
        return replace(self, down=self.down[used], up=self.up[:, used]) if bool(used.any()) else None

    def nothing(self, rows: int) -> LoRA:
        """A part of `rows` rows that adds nothing, to be stacked with this one: of rank 0."""
        return replace(self, down=self.down[:0], up=self.up.new_zeros(rows, 0, *self.up.shape[2:]), mid=None)

    def stack_with(self, parts: Sequence[Self]) -> LoRA:
        """Stacks parts that share `down` and the scale without raising the rank. Otherwise `up` becomes block-diagonal and
        ranks add; unlike scales go into `up`, in float32 where its dtype would round the product.
        """
        if any(part.mid is not None for part in parts):
            raise Unsupported("Tucker factors have no common form")
        # Parts that nothing changes have rank 0, and a scale that says nothing.
        trained = [part for part in parts if part.rank]
        first = trained[0]
        alike = all(part.scale == first.scale for part in trained)
        if alike and all(part.down.shape == first.down.shape and torch.equal(part.down, first.down) for part in trained):
            # The case of a stack that was cut before: its parts still have the whole `down`.
            ups = [part.up if part.rank else part.up.new_zeros(len(part.up), *first.up.shape[1:]) for part in parts]
            return replace(first, up=torch.cat(ups))
        ups = [part.up.flatten(1) if alike else scale_exactly(part.up, part.scale).flatten(1) for part in parts]
        up = block_diagonal(ups)
        up = up.reshape(*up.shape, *first.up.shape[2:])
        # The scale is a number of its own and not an alpha over this rank, which is larger than that of any part.
        return LoRA(torch.cat([part.down for part in trained]), up, None, first.scale if alike else None)


@dataclass(frozen=True, slots=True)
class Embedding(StoredDelta):
    """PEFT's LoRA on an embedding, E += scale · (B A)ᵀ: `down` A (rank, vocabulary), `up` B (width, rank).

    Source: PEFT tuners/lora/layer.py, class Embedding.
    """

    kind: ClassVar[str] = "embedding"
    of_embedding: ClassVar[bool] = True
    fits_lora_file: ClassVar[bool] = True
    scaled_by_config: ClassVar[bool] = True

    down: Tensor
    up: Tensor
    scale: float | None = None

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        return cls(leaves["embedding_down"], leaves["embedding_up"], given.scale)

    def leaves(self) -> dict[str, Tensor]:
        return {"embedding_down": self.down, "embedding_up": self.up}

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.down.shape[1], self.up.shape[0]

    def equivalent_forms(self) -> Iterator[Delta]:
        # (B A)ᵀ = Aᵀ Bᵀ: the transposed factors change places in a LoRA of the same weight.
        yield self
        yield LoRA(self.up.T, self.down.T, None, self.scale)

    def padded(self, rank: int) -> Embedding:
        return replace(self, down=with_rows(self.down, rank), up=with_columns(self.up, rank)) if rank != self.rank else self

    def folded(self) -> Embedding:
        return replace(self, up=scale_exactly(self.up, self.scale), scale=None)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down.float().T * scale_or_one(self.scale), self.up.float().T

    def dense(self) -> Tensor:
        up, down = self.factors()
        return up @ down

    def scaled(self, by: float) -> Self:
        return replace(self, scale=by * scale_or_one(self.scale))

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        return [replace(self, down=rows) for rows in split_rows(self.down, sizes, 1)]


@dataclass(frozen=True, slots=True)
class AdaLoRA(StoredDelta):
    """ΔW = scale · up · diag(values) · down, with `values` (rank, 1) (Zhang et al. 2023, arXiv:2303.10512; PEFT)."""

    kind: ClassVar[str] = "adalora"

    down: Tensor
    up: Tensor
    values: Tensor
    scale: float | None = None

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        return cls(leaves["loralib_a"], leaves["loralib_b"], leaves["lora_e"], given.scale)

    def leaves(self) -> dict[str, Tensor]:
        return {"loralib_a": self.down, "loralib_b": self.up, "lora_e": self.values}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def equivalent_forms(self) -> Iterator[Delta]:
        yield self
        yield LoRA(self.down.float() * self.values.float(), self.up, None, self.scale)

    def folded(self) -> AdaLoRA:
        return replace(self, up=scale_exactly(self.up, self.scale), scale=None)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up.float() * scale_or_one(self.scale), self.down.float() * self.values.float()

    def dense(self) -> Tensor:
        up, down = self.factors()
        return up @ down

    def scaled(self, by: float) -> Self:
        return replace(self, scale=by * scale_or_one(self.scale))

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        return [replace(self, up=rows) for rows in split_rows(self.up, sizes)]


@dataclass(frozen=True, slots=True)
class VeRA(StoredDelta):
    """ΔW = diag(b) · B · diag(d) · A, with `A` and `B` shared by all modules and cut to the size of each one's weight.

    `lambda_b` (out,), `lambda_d` (rank,), `shared_a` (rank, ≥ in), `shared_b` (≥ out, rank); rows of B from `first` on
    (Kopiczko et al. 2023, arXiv:2310.11454; PEFT tuners/vera/layer.py). Only the weight knows in: the kind is not additive.
    """

    kind: ClassVar[str] = "vera"
    additive: ClassVar[bool] = False

    lambda_b: Tensor
    lambda_d: Tensor
    shared_a: Tensor
    shared_b: Tensor
    first: int = 0
    scale: float | None = None

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        return cls(leaves["vera_lambda_b"], leaves["vera_lambda_d"], leaves["vera_a"], leaves["vera_b"], 0, given.scale)

    def leaves(self) -> dict[str, Tensor]:
        own = {"vera_lambda_b": self.lambda_b, "vera_lambda_d": self.lambda_d}
        return own | {"vera_a": self.shared_a, "vera_b": self.shared_b}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lambda_b.shape[0], ANY

    def dense(self) -> Tensor:
        """ΔW as wide as the shared A, which is the widest module's width."""
        rows = self.shared_b[self.first : self.first + len(self.lambda_b)]
        up = self.lambda_b.float()[:, None] * rows.float() * scale_or_one(self.scale)
        return up @ (self.lambda_d.float()[:, None] * self.shared_a.float())

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        inputs, outputs = self.shared_a.shape[1], self.shared_b.shape[0] - self.first
        if weight.ndim != 2 or inputs < weight.shape[1] or outputs < len(weight):
            raise ShapeMismatch(f"its projections are for [{outputs}, {inputs}] at most, its target is {list(weight.shape)}")
        return to_compute_dtype(weight) + strength * self.dense()[:, : weight.shape[1]]

    def scaled(self, by: float) -> Self:
        return replace(self, scale=by * scale_or_one(self.scale))

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        # B is every module's, and not cut: a part begins at a later row of it.
        starts = [self.first + sum(sizes[:position]) for position in range(len(sizes))]
        return [
            replace(self, lambda_b=b, first=start) for b, start in zip(split_rows(self.lambda_b, sizes), starts, strict=True)
        ]
