"""The kinds of delta whose mathematics loratool knows, as data. Adding one: a file here, a line below, a row in `schema`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loratool.deltas.base import Delta
from loratool.deltas.full import Full, Replace
from loratool.deltas.lora import Embedding, LoRA

KINDS: Final[Mapping[str, type[Delta]]] = {
    "lora": LoRA,
    "embedding": Embedding,
    "full": Full,
    "lora bias": Full,
    "replace": Replace,
}
"""Name of the schema's row: the class that computes it."""

__all__ = ["KINDS", "Delta", "Embedding", "Full", "LoRA", "Replace"]
