"""microsoft/loralib, the original: ΔW = (alpha / r) · B A, arranged as the layer that was trained asks for.

Source: loralib/layers.py. Its files say neither what alpha is nor which slots of a fused q, k, v were trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.base import Delta, Leaves, StoredDelta, split_rows, stack, to_compute_dtype
from loratool.deltas.lora import Embedding, LoRA
from loratool.deltas.schema import ANY, Given
from loratool.errors import InvalidAdapter, NeedsBase, ShapeMismatch, Unsupported

SLOTS: dict[int, tuple[bool, ...]] = {2: (True, False, True), 3: (True, True, True)}
"""The slots of a fused q, k, v that are taken to be trained, by their number: q and v, as in loralib's own GPT-2, or all."""


@dataclass(frozen=True, slots=True)
class LoRALib(StoredDelta):
    """`a` and `b` as one of four layers has them; the weight's shape tells which.

    Linear: A (r, in), B (out, r). Embedding: A (r, vocabulary), B (width, r), added transposed. Convolution: A (r·k, in·k),
    B (out·k, r·k). MergedLinear: A (r·g, in), B (rows of g slots, r), into the slots that `slots` says are enabled.
    `alpha` None is scale 1; `guessed` says that nobody told which slots were trained.
    """

    kind: ClassVar[str] = "loralib"
    additive: ClassVar[bool] = False

    a: Tensor
    b: Tensor
    alpha: float | None = None
    slots: tuple[bool, ...] = ()
    guessed: bool = False

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        """Builds the delta with the alpha and slots that its file lacks; raises `InvalidAdapter` where slots do not fit."""
        delta = cls(leaves["loralib_a"], leaves["loralib_b"], given.alpha)
        if delta.groups == 1:
            return delta
        slots = given.slots or SLOTS.get(delta.groups, ())
        if sum(slots) != delta.groups:
            raise InvalidAdapter(
                f"has factors for {delta.groups} slots of a fused weight; say which with `Assumptions(slots=)`, as in 1,0,1"
            )
        return replace(delta, slots=slots, guessed=not given.slots)

    def assumptions(self) -> tuple[str, ...]:
        assumed = "loralib does not store alpha; its scale is taken to be 1 (`Assumptions(alpha=)` says otherwise)"
        scale = (assumed,) if self.alpha is None else ()
        if not self.guessed:
            return scale
        shown = "".join("qkv"[i] for i, enabled in enumerate(self.slots) if enabled)
        slots = (
            f"loralib does not store which slots of a fused weight it trained: taken as {shown} "
            "(`Assumptions(slots=)` says otherwise)"
        )
        return (*scale, slots)

    def leaves(self) -> dict[str, Tensor]:
        return {"loralib_a": self.a, "loralib_b": self.b}

    @property
    def groups(self) -> int:
        """The number of slots of a fused weight that the factors are for, 1 for any other layer."""
        # MergedLinear stacks the A of all slots, (r·g, in), while B has r columns in every row.
        return max(self.a.shape[0] // self.b.shape[1], 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return ANY, ANY

    def dense(self) -> Tensor:
        raise NeedsBase("only the weight tells which of loralib's layers this was")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = to_compute_dtype(weight)
        return base + strength * self._scale(base.shape) * self._arrange(base.shape).to(base.dtype)

    def scaled(self, by: float) -> Self:
        raise NeedsBase("loralib's scale depends on the layer; give a strength to merge instead")

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        raise Unsupported("loralib's factors cannot be cut without the weight they are for")

    def equivalent_forms(self) -> Iterator[Delta]:
        """The delta itself; then as it is on a linear layer and on an embedding. Only the weight knows a kernel."""
        yield self
        rank = self.b.shape[1]
        scale = None if self.alpha is None else self.alpha / rank
        if self.groups == 1:
            yield LoRA(self.a, self.b, None, scale)
            yield Embedding(self.a, self.b, scale)
            return
        rows = len(self.b) // self.groups
        downs, ups = split_rows(self.a, [rank] * self.groups), split_rows(self.b, [rows] * self.groups)
        trained = iter(LoRA(down, up, None, scale) for down, up in zip(downs, ups, strict=True))
        some = LoRA(self.a[:rank], self.b[:rows], None, scale)
        yield stack([next(trained) if enabled else some.nothing(rows) for enabled in self.slots])

    def _scale(self, shape: Sequence[int]) -> float:
        # A convolution multiplies the rank by the side of its kernel (ConvLoRA), and scales by the rank as given.
        rank = self.b.shape[1] // (shape[2] if len(shape) > 2 else 1)
        return 1.0 if self.alpha is None else self.alpha / rank

    def _arrange(self, shape: Sequence[int]) -> Tensor:
        """The product of the factors as the layer with a weight of `shape` adds it; raises `ShapeMismatch`."""
        if self.groups > 1:
            return self._in_slots(shape)
        product = self.b.float() @ self.a.float()
        # ConvLoRA takes the product (out·k, in·k) for the weight as it lies in memory, with no axes exchanged.
        if len(shape) > 2 and product.numel() == prod(shape):
            return product.reshape(tuple(shape))
        # An embedding's product lies transposed; a square weight, which fits both, is taken for that of a linear layer.
        for arranged in (product, product.T):
            if tuple(arranged.shape) == tuple(shape):
                return arranged
        raise ShapeMismatch(f"A {list(self.a.shape)} and B {list(self.b.shape)} do not make up a weight of {list(shape)}")

    def _in_slots(self, shape: Sequence[int]) -> Tensor:
        """The product of each slot's factors in the rows of the slot, and zeros in slots that were not trained."""
        rows, rank = shape[0] // len(self.slots), self.b.shape[1]
        if (rows * self.groups, self.a.shape[1]) != (self.b.shape[0], shape[1]):
            raise ShapeMismatch(f"{self.groups} slots of {self.b.shape[0]} rows in all do not fit a weight of {list(shape)}")
        arranged = torch.zeros(tuple(shape), device=self.a.device)
        trained = (slot for slot, enabled in enumerate(self.slots) if enabled)
        for group, slot in enumerate(trained):
            up, down = self.b[group * rows : (group + 1) * rows], self.a[group * rank : (group + 1) * rank]
            arranged[slot * rows : (slot + 1) * rows] = up.float() @ down.float()
        return arranged
