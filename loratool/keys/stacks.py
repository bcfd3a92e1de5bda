"""Stacked experts: which way a base stores them, and where in a stack the weight of a single expert lies. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from loratool.archs.classes import is_stack_transposed
from loratool.archs.llm import HALVES_INTERLEAVED, INPUTS_FIRST
from loratool.files.layout import Layout

_EXPERT: Final = re.compile(r"(.*_?experts)_(\d+)_(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)")
_LISTED: Final = re.compile(r"(.*_?experts)_(gate_up_proj|down_proj)s_(\d+)")
"""The flattened names of one expert's weights: transformers', and unsloth's for gpt-oss (`gate_up_projs.7`)."""
_STACKS: Final = {
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "w3": ("gate_up_proj", 1),
    "gate_up_proj": ("gate_up_proj", None), "down_proj": ("down_proj", None), "w2": ("down_proj", None),
}  # fmt: skip
"""The stack that an expert's weight is in, and in which half of it; None for all of it."""
_PAIRS: Final = (("gate_up_proj", "down_proj"), ("input_linear.weight", "output_linear.weight"))
"""Names of the stack of gate and up, and of that of down: most models', and those of GraniteMoE and JetMoE."""


@dataclass(frozen=True, slots=True)
class ExpertName:
    """A single expert's weight: the flattened `stack` that it is in, the `expert`'s number, and the `half` of the stack's
    outputs that it takes (None: all)."""

    stack: str
    expert: int
    half: int | None


def expert_names(path: str) -> list[ExpertName]:
    """What the flattened module path `path` may mean as one of several stacked experts; empty for other modules."""
    if found := _EXPERT.fullmatch(path):
        block, expert, leaf = found[1], int(found[2]), found[3]
    elif found := _LISTED.fullmatch(path):
        block, expert, leaf = found[1], int(found[3]), found[2]
    else:
        return []
    stack, half = _STACKS[leaf]
    # transformers 5 calls Mixtral's block `mlp`.
    blocks = dict.fromkeys((block, block.replace("block_sparse_moe", "mlp")))
    return [ExpertName(f"{each}_{stack}", expert, half) for each in blocks]


def model_types(layout: Layout) -> frozenset[str]:
    """The model types that a base's config.json names: its own, and that of its language model; empty without a config."""
    text = layout.config.get("text_config")
    named = (layout.config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None)
    return frozenset(name for name in named if isinstance(name, str))


def has_inputs_first(layout: Layout, tensor: str) -> bool | None:
    """Whether the stack `tensor` is stored as (experts, in, out): by the stacks beside it, else by the model's class; None
    where neither tells."""
    for pair in _PAIRS:
        for name in pair:
            if tensor.endswith(f".{name}"):
                block = tensor.removesuffix(name)
                shapes = [layout.info(block + each).shape for each in pair if block + each in layout.tensors]
                if len(shapes) == 2 and all(len(shape) == 3 for shape in shapes):
                    # Gate and up have twice the outputs that down has inputs: only one way round do both stacks fit.
                    joined, down = shapes
                    if joined[1] == 2 * down[2] and joined[2] == down[1]:
                        return False
                    if joined[2] == 2 * down[1] and joined[1] == down[2]:
                        return True
    return is_held_inputs_first(layout, tensor) if model_types(layout) else None


def is_held_inputs_first(layout: Layout, parameter: str) -> bool:
    """Whether the model's class holds a stack as (experts, in, out) in memory."""
    return bool(is_stack_transposed(layout.config, parameter) or model_types(layout) & INPUTS_FIRST)


def has_interleaved_halves(layout: Layout) -> bool | None:
    """Whether a stack of gate and up has their outputs by turns, and not one half behind the other; None where no config
    names the model's class."""
    types = model_types(layout)
    return bool(types & HALVES_INTERLEAVED) if types else None
