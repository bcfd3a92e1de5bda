"""LoRA on the stacked weights of a mixture of experts, a pair of factors for each expert (PEFT's target_parameters)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.base import Delta, Leaves, StoredDelta, scale_exactly, scale_or_one, to_common_dtype
from loratool.deltas.lora import LoRA
from loratool.deltas.schema import Given
from loratool.errors import InvalidAdapter, Unsupported


@dataclass(frozen=True, slots=True)
class ExpertLoRA(StoredDelta):
    """ΔW[e] = scale · up[:, :, e] · down[e]: `down` (experts · rank, in) by expert, `up` (out, rank · experts) by rank.

    The weight is (experts, out, in), or (experts, in, out) where the delta is `turned`. Along which axis the inputs lie is
    settled by `stack_rule` (`formats.peft`) and the model's class, which only a base tells. Source: PEFT
    tuners/lora/layer.py, class ParamWrapper.
    """

    kind: ClassVar[str] = "experts"
    stacked: ClassVar[bool] = True

    scaled_by_config: ClassVar[bool] = True

    down: Tensor
    up: Tensor
    rank: int = 0
    scale: float | None = None
    stack_rule: str = ""
    turned: bool = False

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        """Builds the delta with the config's rank; raises `InvalidAdapter` where `down` has no multiple of it in rows."""
        # The tensors have experts · rank rows and do not say which is which: only the config has the rank.
        down, up, rank = leaves["down"], leaves["up"], given.rank
        if not rank or down.shape[0] % rank:
            raise InvalidAdapter(f"its factors have {down.shape[0]} rows, no multiple of the rank {rank}")
        return cls(down, up, rank, given.scale, given.stack_rule)

    def leaves(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}

    @property
    def experts(self) -> int:
        return self.down.shape[0] // self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        sides = self.up.shape[0], self.down.shape[1]
        return self.experts, *(sides[::-1] if self.turned else sides)

    def per_expert(self) -> list[LoRA]:
        """A LoRA for each expert."""
        # PEFT orders the rows of A by expert and the columns of B by rank (ParamWrapper).
        downs = self.down.reshape(self.experts, self.rank, -1)
        ups = self.up.reshape(-1, self.rank, self.experts)
        pairs = [(downs[e], ups[:, :, e]) for e in range(self.experts)]
        # (B A)ᵀ = Aᵀ Bᵀ: the factors change places.
        return [LoRA(*((up.T, down.T) if self.turned else (down, up)), None, self.scale) for down, up in pairs]

    def turn(self) -> ExpertLoRA:
        """The same factors on a weight that is stored the other way round."""
        return replace(self, turned=not self.turned)

    def padded(self, rank: int) -> ExpertLoRA:
        """The same delta with zeros up to `rank` in every expert."""
        more = rank - self.rank
        downs = self.down.reshape(self.experts, self.rank, -1)
        ups = self.up.reshape(-1, self.rank, self.experts)
        downs = torch.cat([downs, downs.new_zeros(self.experts, more, downs.shape[2])], dim=1)
        ups = torch.cat([ups, ups.new_zeros(len(ups), more, self.experts)], dim=1)
        return replace(self, down=downs.flatten(0, 1), up=ups.flatten(1), rank=rank)

    def dense(self) -> Tensor:
        return torch.stack([expert.dense() for expert in self.per_expert()])

    def scaled(self, by: float) -> Self:
        return replace(self, scale=by * scale_or_one(self.scale))

    def folded(self) -> ExpertLoRA:
        return replace(self, up=scale_exactly(self.up, self.scale), scale=None)

    @classmethod
    def together(cls, terms: Sequence[ExpertLoRA]) -> ExpertLoRA:
        """The sum of several deltas, whose ranks add, expert by expert."""
        # Unfolded to three axes, so that `cat` along the rank keeps each expert's ranks together.
        folded = [term.folded() for term in terms]
        if len({(term.stack_rule, term.turned) for term in folded}) > 1:
            raise Unsupported("was written by versions of PEFT that lay stacked experts' factors to different axes")
        experts = folded[0].experts
        downs = [term.down.reshape(experts, term.rank, -1) for term in folded]
        ups = [term.up.reshape(-1, term.rank, experts) for term in folded]
        down, up = torch.cat(to_common_dtype(downs), dim=1), torch.cat(to_common_dtype(ups), dim=1)
        return cls(down.flatten(0, 1), up.flatten(1), down.shape[1], None, terms[0].stack_rule, terms[0].turned)

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        raise Unsupported("stacked experts are cut one by one")
