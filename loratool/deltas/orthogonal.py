"""Kinds that rotate the weight by orthogonal blocks: Diag-OFT and BOFT of LyCORIS, and PEFT's OFT.

Qiu et al. 2023, arXiv:2306.07280; Liu et al. 2024, arXiv:2311.06243. LyCORIS rotates the output by a full Cayley transform,
PEFT the input by its Neumann series. At a strength w other than 1 the result is W + w · (W' − W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.base import Delta, Leaves, StoredDelta, split_rows, to_compute_dtype
from loratool.deltas.schema import ANY, Given
from loratool.errors import NeedsBase, ShapeMismatch, Unsupported


@dataclass(frozen=True, slots=True)
class OFT(StoredDelta):
    """LyCORIS: `blocks` (n, b, b), or (m, n, b, b) for BOFT's m butterfly stages; `rescale` (out, 1, …) or None.

    ‖Q‖ is bounded by `constraint` · out, 0 for no bound; LyCORIS stores the constraint as alpha.
    """

    kind: ClassVar[str] = "oft"
    additive: ClassVar[bool] = False

    blocks: Tensor
    rescale: Tensor | None = None
    constraint: float = 0.0

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        return cls(leaves["oft_blocks"], leaves.get("rescale"), given.alpha or 0.0)

    def leaves(self) -> dict[str, Tensor]:
        return {"oft_blocks": self.blocks} | ({} if self.rescale is None else {"rescale": self.rescale})

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.blocks.shape[-3] * self.blocks.shape[-1], ANY)

    def dense(self) -> Tensor:
        raise NeedsBase("an orthogonal delta rotates the weight")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = to_compute_dtype(weight)
        rotations = self._rotations(base.dtype)
        rotated = base.flatten(1)
        # LyCORIS contracts the first index of a block in Diag-OFT, which turns by Rᵀ, and the second in BOFT.
        if self.blocks.ndim == 3:
            rotated = torch.einsum("knm,kni->kmi", rotations, rotated.reshape(*rotations.shape[:2], -1)).flatten(0, 1)
        else:
            for stage, blocks in enumerate(rotations):
                rotated = _butterfly(rotated, blocks, stage)
        if self.rescale is not None:
            rotated = self.rescale.to(base.dtype).flatten(1) * rotated
        return base + strength * (rotated.reshape(base.shape) - base)

    def scaled(self, by: float) -> Self:
        raise NeedsBase("an orthogonal delta cannot be scaled; give a strength to merge instead")

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """Pieces of whole blocks; raises `Unsupported` where blocks are cut, and for a butterfly, which mixes all rows."""
        # A constraint bounds the norm over all blocks together, which no part knows.
        width = self.blocks.shape[-1]
        if self.blocks.ndim != 3 or any(size % width for size in sizes) or self.constraint:
            raise Unsupported("its orthogonal blocks do not end where the parts of the weight do")
        rescales = split_rows(self.rescale, sizes) if self.rescale is not None else [None] * len(sizes)
        pieces = split_rows(self.blocks, [size // width for size in sizes])
        return [OFT(blocks, rescale) for blocks, rescale in zip(pieces, rescales, strict=True)]

    def _rotations(self, dtype: torch.dtype) -> Tensor:
        """(1 + Q)(1 − Q)⁻¹ of the skew part of each block, ‖Q‖ over all of them bounded."""
        skew = self.blocks.to(dtype) - self.blocks.to(dtype).transpose(-1, -2)
        bound = self.constraint * self.shape[0]
        # As in LyCORIS (modules/diag_oft.py), its 1e-8 included.
        norm = torch.linalg.vector_norm(skew) + 1e-8
        if 0 < bound < norm:
            skew = skew * (bound / norm)
        one = torch.eye(skew.shape[-1], dtype=dtype, device=skew.device)
        rotations: Tensor = (one + skew) @ torch.linalg.inv(one - skew)
        return rotations


@dataclass(frozen=True, slots=True)
class InputOFT(StoredDelta):
    """PEFT: `vectors` (n, b(b−1)/2), the upper triangles of skew blocks that rotate the input; one block may serve for all.

    `terms` is the length of the Neumann series that stands for the Cayley transform, 0 for the transform itself.
    """

    kind: ClassVar[str] = "input oft"
    additive: ClassVar[bool] = False

    vectors: Tensor
    terms: int = 5

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        if given.neumann_terms is None or "scaled_oft" in leaves:
            raise Unsupported("is an OFT whose trainer is unknown: it needs PEFT's adapter_config.json")
        return cls(leaves["oft_r"], given.neumann_terms)

    def leaves(self) -> dict[str, Tensor]:
        return {"oft_r": self.vectors}

    @property
    def shape(self) -> tuple[int, ...]:
        return (ANY, self.vectors.shape[0] * self._width() if len(self.vectors) > 1 else ANY)

    def dense(self) -> Tensor:
        raise NeedsBase("an orthogonal delta rotates the weight")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = to_compute_dtype(weight)
        width = self._width()
        if base[0].numel() % width:
            raise ShapeMismatch(f"rotates inputs by {width}, its target has {base[0].numel()}")
        grouped = base.reshape(len(base), -1, width)
        # A single block (block_share) turns every group of inputs. PEFT turns x into x R before the layer: W becomes W Rᵀ.
        rotations = self._rotations(base.dtype).expand(grouped.shape[1], width, width)
        rotated = torch.einsum("ogb,gab->oga", grouped, rotations).reshape(base.shape)
        return base + strength * (rotated - base)

    def scaled(self, by: float) -> Self:
        raise NeedsBase("an orthogonal delta cannot be scaled; give a strength to merge instead")

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """The same delta for every part of the output: the rotation is of the input, which they share."""
        return [self for _ in sizes]

    def _width(self) -> int:
        """The width b of a block, from the b(b − 1)/2 numbers of its triangle."""
        return int((1 + (1 + 8 * self.vectors.shape[1]) ** 0.5) / 2)

    def _rotations(self, dtype: torch.dtype) -> Tensor:
        width = self._width()
        skew = self.vectors.new_zeros(self.vectors.shape[0], width, width, dtype=dtype)
        rows, columns = torch.triu_indices(width, width, 1, device=skew.device)
        skew[:, rows, columns] = self.vectors.to(dtype)
        skew = skew - skew.transpose(-1, -2)
        one = torch.eye(width, dtype=dtype, device=skew.device)
        if not self.terms:
            # PEFT's exact transform turns the other way from its series; each file is merged as it was trained.
            exact: Tensor = (one - skew) @ torch.linalg.inv(one + skew)
            return exact
        # 1 + 2Q + 2Q² + … + Qⁿ, the last one halved; of three terms PEFT makes four (tuners/oft/layer.py, _cayley_batch).
        total, last = one.expand_as(skew).clone(), max(self.terms - 1, 3) if self.terms > 2 else self.terms - 1
        power = total
        for exponent in range(1, last + 1):
            power = power @ skew
            total = total + (power if exponent == last > 1 else 2 * power)
        return total


@dataclass(frozen=True, slots=True)
class InputBOFT(StoredDelta):
    """PEFT's BOFT: `blocks` (m, n, b, b), m butterfly stages that rotate the input, and `scales` (out, 1) of the rows.

    Source: PEFT tuners/boft/layer.py, block_butterfly_perm and merge.
    """

    kind: ClassVar[str] = "input boft"
    additive: ClassVar[bool] = False

    blocks: Tensor
    scales: Tensor

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        return cls(leaves["boft_r"], leaves["boft_s"])

    def leaves(self) -> dict[str, Tensor]:
        return {"boft_r": self.blocks, "boft_s": self.scales}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scales.numel(), self.blocks.shape[1] * self.blocks.shape[2]

    def dense(self) -> Tensor:
        raise NeedsBase("an orthogonal delta rotates the weight")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = to_compute_dtype(weight)
        turned = base.flatten(1)
        # PEFT halves the skew part, which LyCORIS does not, and (1 − Q)(1 + Q)⁻¹ turns the other way from its transform.
        skew = (self.blocks.to(base.dtype) - self.blocks.to(base.dtype).transpose(-1, -2)) / 2
        one = torch.eye(skew.shape[-1], dtype=base.dtype, device=skew.device)
        rotations = (one - skew) @ torch.linalg.inv(one + skew)
        for stage, blocks in enumerate(rotations):
            order = self._order(stage)
            # The inverse permutation before the blocks, and the permutation behind them: scattered, then gathered.
            gathered = torch.empty_like(turned)
            gathered[:, order] = turned
            grouped = gathered.reshape(len(gathered), *blocks.shape[:2])
            turned = torch.einsum("ogb,gab->oga", grouped, blocks).flatten(1)[:, order]
        full = (turned * self.scales.to(base.dtype).reshape(-1, 1)).reshape(base.shape)
        return base + strength * (full - base)

    def scaled(self, by: float) -> Self:
        raise NeedsBase("an orthogonal delta cannot be scaled; give a strength to merge instead")

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        return [InputBOFT(self.blocks, rows) for rows in split_rows(self.scales.reshape(-1, 1), sizes)]

    def _order(self, stage: int) -> Tensor:
        """The order of a stage's inputs: within groups of 2^stage blocks, the even half-blocks and then the odd ones."""
        half = self.blocks.shape[-1] // 2
        pieces = torch.arange(self.shape[1], device=self.blocks.device).reshape(-1, 2 ** (stage + 1), half)
        return torch.cat([pieces[:, ::2], pieces[:, 1::2]], dim=1).flatten()


def _butterfly(rows: Tensor, blocks: Tensor, stage: int) -> Tensor:
    """One stage of BOFT on `rows`: those that are 2^stage half-blocks apart are brought together, rotated, and put back."""
    width, columns = blocks.shape[-1], rows.shape[1]
    apart = 2**stage * (width // 2)
    mixed = rows.reshape(-1, 2, apart, columns).transpose(1, 2).reshape(-1, width, columns)
    mixed = torch.einsum("bij,bjn->bin", blocks, mixed)
    return mixed.reshape(-1, apart, 2, columns).transpose(1, 2).reshape(-1, columns)
