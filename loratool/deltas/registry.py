"""The kinds of delta whose mathematics loratool knows, as data. Adding one: a file here, a line below, a row in `schema`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loratool.deltas.base import Delta
from loratool.deltas.experts import ExpertLoRA
from loratool.deltas.full import Enlarge, Full, Replace, TokenRows
from loratool.deltas.loha import LoHa
from loratool.deltas.lokr import LoKr
from loratool.deltas.lora import AdaLoRA, Embedding, LoRA, VeRA
from loratool.deltas.loralib import LoRALib
from loratool.deltas.multiply import IA3, GLoRA
from loratool.deltas.orthogonal import OFT, InputBOFT, InputOFT

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
