"""The kinds of delta whose mathematics loratool knows, as data. Adding one: a file here, a line below, a row in `schema`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from loratool.deltas.base import ANY, Delta
from loratool.deltas.dora import DoRA
from loratool.deltas.experts import ExpertLoRA
from loratool.deltas.full import Enlarge, Full, Replace, TokenRows
from loratool.deltas.loha import LoHa
from loratool.deltas.lokr import LoKr
from loratool.deltas.lora import AdaLoRA, Embedding, LoRA, VeRA
from loratool.deltas.loralib import LoRALib
from loratool.deltas.multiply import IA3, GLoRA
from loratool.deltas.orthogonal import OFT, InputBOFT, InputOFT
from loratool.errors import Unsupported

KINDS: Final[Mapping[str, type[Delta]]] = {
    "lora": LoRA,
    "embedding": Embedding,
    "adalora": AdaLoRA,
    "vera": VeRA,
    "loha": LoHa,
    "lokr": LoKr,
    "glora": GLoRA,
    "ia3": IA3,
    "oft": OFT,
    "input oft": InputOFT,
    "input boft": InputBOFT,
    "experts": ExpertLoRA,
    "loralib": LoRALib,
    "tokens": TokenRows,
    "enlarge": Enlarge,
    "full": Full,
    "lora bias": Full,
    "replace": Replace,
}
"""Name of the schema's row: the class that computes it. A magnitude makes a DoRA of whichever it stands beside."""


def stack(parts: Sequence[Delta]) -> Delta:
    """The delta whose output rows are those of `parts`, one after the other: the inverse of `split`.

    LoRA stays LoRA, with its rank where `down` is shared, and a DoRA of rows a DoRA; other sums become a full difference.
    Raises `Unsupported` for kinds whose parts have no common form without the base.
    """
    if all(isinstance(part, LoRA) and part.mid is None for part in parts):
        return LoRA.stack([part for part in parts if isinstance(part, LoRA)])
    if all(isinstance(part, DoRA) and not part.on_input for part in parts):
        return DoRA.stack([part for part in parts if isinstance(part, DoRA)], stack)
    if all(part.additive for part in parts):
        return Full(torch.cat([part.dense() for part in parts]))
    raise Unsupported(
        f"deltas of kind {', '.join(sorted({part.kind for part in parts}))} cannot be stacked without their base"
    )


__all__ = [
    "ANY",
    "IA3",
    "KINDS",
    "Delta",
    "DoRA",
    "Embedding",
    "Enlarge",
    "ExpertLoRA",
    "Full",
    "InputOFT",
    "LoRA",
    "LoRALib",
    "Replace",
    "TokenRows",
    "stack",
]
