"""An adapter in the spelling of the file it came from: what stays keeps its bytes, and what says so is made true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from loratool.adapter.adapter import Adapter, Change
from loratool.deltas.base import or_one
from loratool.errors import Unsupported
from loratool.files.adapter_writer import Contents
from loratool.files.tensors import TensorFile
from loratool.formats.kohya import kohya_metadata
from loratool.formats.peft import lora_config
from loratool.names import CONTAINER

LEAF_NAMES: Final[Mapping[bool, tuple[str, str]]] = {
    False: ("lora_down.weight", "lora_up.weight"),
    True: ("lora_A.weight", "lora_B.weight"),
}
"""kohya's spelling, and PEFT's for dotted names."""
EMBEDDING_NAMES: Final = {"embedding_down": "lora_embedding_A", "embedding_up": "lora_embedding_B"}

CARRIED: Final = (
    "base_model_name_or_path", "revision", "task_type", "bias", "lora_bias", "modules_to_save", "fan_in_fan_out",
    "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
"""What a LoRA's config says that a conversion does not change."""


def named_tensors(change: Change) -> dict[str, Tensor]:
    """A new LoRA's tensors under the names that the adapter's own spelling of the module calls for."""
    stem, leaves = change.module.stem, change.delta.leaves()
    if "embedding_down" in leaves:
        return {f"{stem}.{leaf}": leaves[own] for own, leaf in EMBEDDING_NAMES.items()}
    dotted = "." in stem
    down, up = LEAF_NAMES[dotted]
    tensors = {f"{stem}.{down}": leaves["down"], f"{stem}.{up}": leaves["up"]}
    return tensors if dotted else tensors | {f"{stem}.alpha": torch.tensor(float(len(leaves["down"])))}


def as_they_were(adapter: Adapter, kept: Sequence[Change]) -> dict[str, Tensor]:
    """The tensors of changes that stay what they are, and of passengers, under their own names and to the byte."""
    source = adapter.file
    if source is None or source.is_pickle:
        raise Unsupported(f"{adapter.path}: is not a safetensors file with tensors to keep; convert it first")
    with TensorFile(source.header) as file:
        tensors = source.header.tensors
        return dict(adapter.passengers) | {name: file.read(tensors[name]) for change in kept for name in change.keys}


def biases(kept: Sequence[Change], converted: set[str]) -> dict[str, Tensor]:
    """Biases of LoRA modules that were rewritten, with their scale in them: the new factors have it in theirs."""
    return {
        change.keys[0]: change.delta.dense()
        for change in kept
        if change.keys[0].endswith(".lora_B.bias") and str(change.module) in converted
    }


def like_source(adapter: Adapter, tensors: Mapping[str, Tensor], kept: Sequence[Change], ranks: Sequence[int]) -> Contents:
    """`tensors` as an adapter like the one they came from; `kept` are the changes that stayed what they were, `ranks`
    those of the new factors."""
    return Contents(tensors, dict(kohya_metadata(adapter.metadata, ranks)), _config(adapter, tensors, kept))


def before(adapter: Adapter) -> dict[str, Any]:
    """What the source's config says that a conversion does not change."""
    return {key: adapter.config[key] for key in CARRIED if key in adapter.config}


def _config(adapter: Adapter, tensors: Mapping[str, Tensor], kept: Sequence[Change]) -> dict[str, Any] | None:
    """adapter_config.json of a PEFT folder: LoRA, with each module's own rank, and an alpha that leaves its scale alone."""
    if not any(name.startswith(CONTAINER) for name in tensors):
        return None
    ranks = {
        name.removesuffix(suffix).removeprefix(CONTAINER): tensor.shape[0]
        for suffix in (".lora_A.weight", ".lora_embedding_A")
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    }
    scales: dict[str, float | None] = dict.fromkeys(ranks)
    for change in kept:
        path = change.module.stem.removeprefix(CONTAINER)
        if path in scales and change.parameter == "weight":
            scales[path] = or_one(change.delta.scale)
    return {"bias": "none", **before(adapter), "peft_type": "LORA", **lora_config(ranks, scales), "inference_mode": True}
