"""Language models: what Hugging Face names look like, and where one model's experts have two names.

transformers 5 renamed the blocks of mixture-of-experts models in memory while files keep the old names, so that an
adapter says `mlp.gate` where the base on disk says `block_sparse_moe.gate`
(transformers conversion_mapping.py; PEFT utils/transformers_weight_conversion.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from loratool.names import Link, rename

DECODER: Final = re.compile(
    r"(?:.*\.)?(?:layers\.\d+\.(?:self_attn|mlp|block_sparse_moe|linear_attn)|h\.\d+\.(?:attn|mlp))\..*"
    r"|(?:.*\.)?(?:lm_head|embed_tokens|wte|score)"
)
EXPERT: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
CONV1D: Final = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""Modules that GPT-2 and its kin build from transformers' Conv1D, which stores the weight as (in, out)."""


def mixture(names: frozenset[str]) -> Iterator[Link]:
    """The links between the two names of Mixtral's blocks, for those that a base with `names` has."""
    for block in sorted(name.removesuffix(".gate") for name in names if name.endswith(".block_sparse_moe.gate")):
        ours = block.replace("block_sparse_moe", "mlp")
        yield Link((f"{ours}.gate",), f"{block}.gate")
        experts = {name.split(".experts.")[1].split(".")[0] for name in names if name.startswith(f"{block}.experts.")}
        for expert in sorted(experts):
            table = {theirs: old for old, theirs in EXPERT.items()}
            yield from rename(f"{ours}.experts.{expert}", f"{block}.experts.{expert}", table)


def is_decoder(path: str) -> bool:
    """Whether a module path is one of a Hugging Face language model's."""
    return DECODER.fullmatch(path) is not None
