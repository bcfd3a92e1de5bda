"""DoRA: W' = m · (W + ΔW) / ‖W + ΔW‖, a direction from another delta and a magnitude for each row or each column.

Liu et al. 2024, arXiv:2402.09353. PEFT and LyCORIS agree on this; ComfyUI divides rows by ‖W‖ instead, which no trainer
does, and is not followed. At a strength w other than 1 the result is W + w · (W' − W), as ComfyUI has it; LyCORIS
interpolates the magnitude alone. LyCORIS adds the smallest step of float32 to the norm, which only zero rows notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.base import Delta, Leaves, StoredDelta, split_rows, stack, to_compute_dtype
from loratool.deltas.schema import ANY, DORA, Given
from loratool.errors import InvalidAdapter, NeedsBase, ShapeMismatch, Unsupported


@dataclass(frozen=True, slots=True)
class DoRA(StoredDelta):
    """`inner`, whose sum with the weight gives the direction, and `magnitude`, of one number per row or per column.

    The magnitude is stored under the name `leaf`; `on_input` says that it belongs to columns (the weight's dimension 1).
    """

    kind: ClassVar[str] = "dora"
    additive: ClassVar[bool] = False

    inner: Delta
    magnitude: Tensor
    leaf: str
    on_input: bool

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        from loratool.deltas.registry import build

        (leaf,) = [leaf for leaf in leaves if leaf in DORA.split()]
        inner = {name: tensor for name, tensor in leaves.items() if name != leaf}
        return cls.wrap(build(inner, given), leaf, leaves[leaf])

    @classmethod
    def wrap(cls, inner: Delta, leaf: str, magnitude: Tensor) -> Self:
        """Puts a magnitude around `inner`; its shape tells its dimension: PEFT's are of rows, or of an embedding's columns;
        LyCORIS stores (out, 1, …) or, in old files and by OneTrainer's default, (1, in, …)."""
        on_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] != 1
        if leaf == "magnitude":
            on_input = inner.of_embedding
        # Where files flatten kernels, inner.shape has in · kernel for the inputs, and only the weight can tell them.
        expected = inner.shape[1 if on_input else 0]
        if magnitude.numel() != expected and expected != ANY and not (on_input and inner.kernel_flattened):
            of = "inputs" if on_input else "outputs"
            raise InvalidAdapter(f"has a magnitude of {list(magnitude.shape)} for {expected} {of}")
        return cls(inner, magnitude, leaf, on_input=on_input)

    def leaves(self) -> dict[str, Tensor]:
        return {**self.inner.leaves(), self.leaf: self.magnitude}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def scale(self) -> float | None:
        return self.inner.scale

    @property
    def kernel_flattened(self) -> bool:
        return self.inner.kernel_flattened

    def dense(self) -> Tensor:
        raise NeedsBase("what a DoRA adds depends on the weight it normalises")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = to_compute_dtype(weight)
        # The direction is that of training, whatever the strength: the norm is not linear in ΔW.
        target = self.inner.apply(base)
        # The norm runs over every axis but the one that the magnitude has a number for.
        kept = 1 if self.on_input else 0
        others = [axis for axis in range(target.ndim) if axis != kept]
        norm = torch.linalg.vector_norm(target, dim=others, keepdim=True) + torch.finfo(torch.float32).eps
        if self.magnitude.numel() != norm.numel():
            raise ShapeMismatch(f"has a magnitude of {list(self.magnitude.shape)}, its target has {norm.numel()} norms")
        full: Tensor = target * (self.magnitude.to(base.dtype).flatten().reshape(norm.shape) / norm)
        return full if strength == 1.0 else base + strength * (full - base)

    def equivalent_forms(self) -> Iterator[Delta]:
        """The DoRA with a magnitude as PEFT has it, (out,), or as LyCORIS has it, (out, 1, …); only LyCORIS has columns'."""
        for inner in self.inner.equivalent_forms():
            yield replace(self, inner=inner)
            if not self.on_input:
                # A convolution's magnitude is (1, out, 1, 1) in PEFT.
                ones = (1,) * (len(self.inner.shape) - 2)
                shape = (1, -1, *ones) if ones else (-1,)
                yield replace(self, inner=inner, leaf="magnitude", magnitude=self.magnitude.reshape(shape))
                yield replace(self, inner=inner, leaf="dora_scale", magnitude=self.magnitude.reshape(-1, 1, *ones))

    def folded(self) -> DoRA:
        return replace(self, inner=self.inner.folded())

    def scaled(self, by: float) -> Self:
        raise NeedsBase("a DoRA cannot be scaled without its base; give a strength to merge instead")

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """Cuts rows together with their magnitudes; a magnitude of columns is normalised over all rows and cannot be cut."""
        if self.on_input:
            raise Unsupported("a DoRA with a magnitude for each input cannot be cut along the output without its base")
        inner, flat = self.inner.split(sizes), self.magnitude.flatten()
        return [replace(self, inner=part, magnitude=rows) for part, rows in zip(inner, split_rows(flat, sizes), strict=True)]

    def stack_with(self, parts: Sequence[Self]) -> DoRA:
        """Stacks rows with their magnitudes; columns are normalised over each part's rows, which a whole cannot say."""
        if any(part.on_input for part in parts):
            raise Unsupported("DoRA with a magnitude for each input, on parts of a stacked weight, has no common form")
        magnitudes = torch.cat([part.magnitude.flatten() for part in parts])
        return DoRA(stack([part.inner for part in parts]), magnitudes, "magnitude", on_input=False)
