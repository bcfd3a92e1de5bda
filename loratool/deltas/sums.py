"""Several deltas on one weight as one, computed on demand: their exact weighted sum, or what a method for merging models
(`deltas.methods`) makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.base import Delta, same_bits, scale_exactly, scale_or_one, to_common_dtype
from loratool.deltas.experts import ExpertLoRA
from loratool.deltas.full import Full
from loratool.deltas.lora import Embedding, LoRA
from loratool.errors import ShapeMismatch

Strengths = Sequence[float]
Merge = Callable[[Sequence[Delta], Strengths], Delta]


@dataclass(frozen=True, slots=True)
class LazySum(Delta):
    """What `merge` makes of additive `terms` of one shape and their `strengths`, computed each time that it is needed."""

    kind: ClassVar[str] = "combined"

    terms: tuple[Delta, ...]
    strengths: tuple[float, ...]
    merge: Merge

    def materialise(self) -> Delta:
        return self.merge(self.terms, self.strengths)

    def leaves(self) -> dict[str, Tensor]:
        """The tensors of all terms, those of the first under their own names."""
        first, *others = self.terms
        more = {f"{leaf} of {n}": tensor for n, term in enumerate(others, 2) for leaf, tensor in term.leaves().items()}
        return first.leaves() | more

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight: the longest of the terms' shapes, as some kinds flatten kernels."""
        return max((term.shape for term in self.terms), key=len)

    @property
    def kernel_flattened(self) -> bool:
        return all(term.kernel_flattened for term in self.terms)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.materialise().factors()

    def dense(self) -> Tensor:
        return self.materialise().dense()

    def scaled(self, by: float) -> Self:
        return replace(self, strengths=tuple(by * strength for strength in self.strengths))

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        return self.materialise().split(sizes)


def add_deltas(terms: Sequence[Delta], strengths: Strengths, *, fold: bool = False) -> Delta:
    """Σ wᵢ ΔWᵢ, exactly: a single term is scaled; LoRA become one LoRA whose rank is the sum of theirs, a `down` that
    several have counted once; kinds that have exact factors become a LoRA of these where that is smaller than the difference
    itself.

    Scales go into `up`, in float32 where its own dtype would round them, unless all are the same and `fold` does not ask
    for it.
    """
    # The first term gives the sum its shape: one that has its kernel, if any does.
    ordered = sorted(zip(terms, strengths, strict=True), key=lambda pair: -len(pair[0].shape))
    scaled = [term if strength == 1 else term.scaled(strength) for term, strength in ordered]
    if fold:
        scaled = [term.folded() for term in scaled]
    if len(scaled) == 1:
        return scaled[0]
    plain = [term if isinstance(term, LoRA) and term.mid is None else None for term in scaled]
    if all(plain):
        return concatenate_factors([term for term in plain if term])
    experts = [term for term in scaled if isinstance(term, ExpertLoRA)]
    if len(experts) == len(scaled):
        return ExpertLoRA.together(experts)
    # (B A)ᵀ = Aᵀ Bᵀ: embeddings are summed as LoRA of the same weight and turned back.
    if all(isinstance(term, Embedding) for term in scaled):
        turned = [LoRA(term.up.T, term.down.T, None, term.scale) for term in scaled if isinstance(term, Embedding)]
        whole = concatenate_factors(turned)
        return Embedding(whole.up.T, whole.down.T, whole.scale)
    return _of_kinds(scaled)


def concatenate_factors(terms: Sequence[LoRA]) -> LoRA:
    """The sum of LoRA without Tucker cores as one LoRA, of the shape of the first."""
    # One scale must do for all; where it cannot, each goes into its own `up`.
    scale = terms[0].scale
    if len({term.scale for term in terms}) > 1:
        terms, scale = [term.folded() for term in terms], 1.0
    inner, ones = terms[0].down.shape[1:], terms[0].up.shape[2:]
    # Terms with the same `down`, such as one adapter given twice, add up in `up`, and their ranks do not.
    groups: list[list[LoRA]] = []
    for term in terms:
        shared = next((group for group in groups if same_bits(group[0].down, term.down)), None)
        if shared:
            shared.append(term)
        else:
            groups.append([term])
    ups = [_add([term.up.reshape(*term.up.shape[:2], *ones) for term in group]) for group in groups]
    down = torch.cat(to_common_dtype([group[0].down.reshape(-1, *inner) for group in groups]))
    return LoRA(down, torch.cat(to_common_dtype(ups), dim=1), None, scale)


def _of_kinds(terms: Sequence[Delta]) -> Delta:
    """The sum of deltas of several kinds: a LoRA of their exact factors, or the difference, whichever is smaller."""
    shape = terms[0].shape
    # A bias or a norm has one dimension, and no factors.
    factors = [term.factors() for term in terms] if len(shape) > 1 else [None]
    pairs = [pair for pair in factors if pair]
    cost = sum(up.numel() + down.numel() for up, down in pairs)
    if len(pairs) == len(terms) and cost <= prod(shape):
        ones = (1,) * len(shape[2:])
        up, down = torch.cat([up for up, _ in pairs], dim=1), torch.cat([down for _, down in pairs])
        return LoRA(down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *ones))
    unlike = [term.shape for term in terms if prod(term.shape) != prod(shape)]
    if unlike:
        raise ShapeMismatch(f"changes weights of {list(unlike[0])} and of {list(shape)}: the adapters are for other models")
    leaf = next((term.leaf for term in terms if isinstance(term, Full)), "diff")
    # Not by way of `dense`, which would round a float64 difference to float32 even where no scale changes it.
    if all(isinstance(term, Full) for term in terms):
        parts = [
            scale_exactly(term.difference, scale_or_one(term.scale)).reshape(shape)
            for term in terms
            if isinstance(term, Full)
        ]
        return Full(_add(parts), leaf)
    return Full(_add([term.dense().reshape(shape) for term in terms]), leaf)


def _add(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, in float64 and then rounded to float32; a single tensor stays as it is."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack([tensor.double() for tensor in tensors]).sum(dim=0).float()
