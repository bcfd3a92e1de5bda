"""How each changed parameter is carried by a format: as a LoRA, as a leaf of its own, or not at all, and why."""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from loratool.archs.llm import is_embedding
from loratool.base.pairs import Pair
from loratool.deltas.schema import BIAS
from loratool.formats.table import Format
from loratool.keys.places import HEAD
from loratool.names import VAE

LORA: Final = "lora"
EXPERTS: Final = "experts"
REPLACED: Final = ("weight", "bias")
"""Leaves that hold the new value, and not the difference to the old one."""
BESIDE_LORA: Final = "bias_up"
"""The leaf of a bias that has its place beside a LoRA (PEFT's lora_B.bias)."""

_LEAVES: Final = {
    "a norm's weight": ("w_norm", "weight"),
    "a norm's bias": ("b_norm", "bias"),
    "a bias": ("bias", BESIDE_LORA, "diff_b"),
    "a parameter of no module": ("diff",),
    "a vocabulary of another size": ("weight",),
}
"""The leaves that can hold the change of a parameter that is no matrix, by what the parameter is, in order of preference.

PEFT gets biases as values: its lora_bias is for all layers or none, and layers without a bias can then not be merged."""


def form_of(pair: Pair, target: Format, matrices: Container[str]) -> tuple[str | None, str]:
    """How `target` carries a change of `pair`: `LORA`, `EXPERTS`, a leaf, or None where `target` cannot; and what the
    parameter is, in words.

    `matrices` are the stems of modules that have a weight of two dimensions or more.
    """
    what = _what(pair, matrices)
    if what in (LORA, EXPERTS, "an embedding"):
        # Only the config of a PEFT folder says that factors are those of stacked experts (target_parameters).
        held = {LORA: True, EXPERTS: target.folder, "an embedding": "embedding_up" in target.leaves}[what]
        return (EXPERTS if what == EXPERTS else LORA, what) if held else (None, what)
    # Nobody reads bare parameters under flattened names, except Wan's modulation, which has a name of its own (diff_m).
    nameless = what == "a parameter of no module" and target.flat and not pair.module.path.endswith("modulation")
    leaf = None if nameless else next((leaf for leaf in _LEAVES[what] if leaf in target.leaves), None)
    return leaf, what


def _what(pair: Pair, matrices: Container[str]) -> str:
    """What the parameter is: `LORA`, `EXPERTS`, "an embedding", or a key of `_LEAVES`."""
    if pair.parameter == BIAS:
        return "a bias" if pair.module.stem in matrices else "a norm's bias"
    if pair.raw:
        stacked = len(pair.shape) == 3 and ".experts." in f".{pair.module.path}"
        return EXPERTS if stacked else "a parameter of no module"
    if len(pair.shape) < 2:
        return "a norm's weight"
    embedding = is_embedding(pair.module.path)
    # A LoRA cannot add rows to an embedding or an output layer: a vocabulary of another size is replaced whole.
    if pair.shape != pair.tuned_shape and (embedding or pair.module.path.endswith(HEAD)):
        return "a vocabulary of another size"
    return "an embedding" if embedding else LORA


def no_place(pair: Pair, target: Format, what: str) -> str:
    """Why `target` cannot carry a change of `pair`, in words."""
    if pair.module.component == VAE:
        return "no format of adapters has a place for a VAE"
    named = {LORA: "a matrix", EXPERTS: "stacked experts"}.get(what, what)
    return f"{target.title} has no place for {named}"
