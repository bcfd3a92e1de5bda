"""Writes adapters: factors under the names their modules had, metadata that stays true, and PEFT's config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from loratool.adapter import Adapter, Change
from loratool.checkpoint import DTYPE_NAMES, TensorFile, tensor_bytes
from loratool.deltas import Embedding, LoRA
from loratool.deltas.base import or_one
from loratool.formats.leaves import CONTAINER
from loratool.formats.peft import CONFIG_NAME
from loratool.formats.reading import WEIGHTS, locate
from loratool.header import TensorInfo, encode_header, read_header, read_json
from loratool.output import Output, Writer

LEAF_NAMES: Final[Mapping[bool, tuple[str, str]]] = {
    False: ("lora_down.weight", "lora_up.weight"),
    True: ("lora_A.weight", "lora_B.weight"),
}
"""kohya's spelling, and PEFT's for dotted names."""


CARRIED: Final = (
    "base_model_name_or_path", "revision", "task_type", "bias", "lora_bias", "modules_to_save", "fan_in_fan_out",
    "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
"""What a LoRA's config says that a conversion does not change."""


def named(change: Change, up: Tensor, down: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The factors under the names that the adapter's own spelling of the module calls for."""
    stem, kernel = change.module.stem, shape[2:]
    if "embedding_down" in change.delta.leaves():
        # PEFT adds the product of an embedding's factors transposed.
        return {f"{stem}.lora_embedding_A": up.T.contiguous(), f"{stem}.lora_embedding_B": down.T.contiguous()}
    dotted = "." in stem
    down_name, up_name = LEAF_NAMES[dotted]
    ones = (1,) * len(kernel)
    tensors = {
        f"{stem}.{down_name}": down.reshape(len(down), -1, *kernel).contiguous(),
        f"{stem}.{up_name}": up.reshape(*up.shape, *ones).contiguous(),
    }
    return tensors if dotted else tensors | {f"{stem}.alpha": torch.tensor(float(len(down)))}


def as_they_were(adapter: Adapter, kept: Sequence[Change]) -> dict[str, Tensor]:
    """The tensors of changes that stay what they are, and of passengers, under their own names and to the byte."""
    header = read_header(locate(adapter.path)[0])
    names = [*(name for change in kept for name in change.keys), *adapter.passengers]
    with TensorFile(header) as file:
        return {name: file.read(header.tensors[name]) for name in names}


def biases(kept: Sequence[Change], converted: set[str]) -> dict[str, Tensor]:
    """Biases of LoRA modules that were rewritten, with their scale in them: the new factors have it in theirs."""
    return {
        change.keys[0]: change.delta.dense()
        for change in kept
        if change.keys[0].endswith(".lora_B.bias") and str(change.module) in converted
    }


def save(
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    kept: Sequence[Change],
    ranks: Sequence[int],
    out: Path,
    *,
    overwrite: bool,
) -> int:
    """Writes `tensors` as an adapter like the one they came from, a file or a PEFT folder, and returns its bytes.

    `kept` are the changes that stayed what they were, `ranks` those of the new factors.
    """
    config = _config(adapter, tensors, kept)
    infos, position = {}, 0
    # safetensors' own order: dtypes from wide to narrow, then names, so that hashes agree with other writers'.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        infos[name] = TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), position, position + size)
        position += size
    raw = encode_header(infos, dict(_metadata(adapter.metadata, ranks)))
    nbytes = len(raw) + position
    folder = config is not None
    with Output(out, folder=folder, overwrite=overwrite, nbytes=nbytes, inputs=[adapter.path]) as output:
        with Writer(output.path(WEIGHTS[0] if folder else ""), nbytes) as writer:
            writer.write(raw, 0)
            for name, info in infos.items():
                writer.write(tensor_bytes(tensors[name].contiguous()), len(raw) + info.start)
        if folder:
            output.path(CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        output.commit()
    return nbytes


def _metadata(metadata: Mapping[str, str], ranks: Sequence[int]) -> Iterator[tuple[str, str]]:
    """The metadata of the source, without what is no longer true of it."""
    yield from ((key, value) for key, value in metadata.items() if not key.startswith("sshs_"))
    if "ss_network_module" in metadata:
        different = set(ranks)
        yield "ss_network_module", "networks.lora"
        yield "ss_network_dim", str(ranks[0]) if len(different) == 1 else "Dynamic"
        yield "ss_network_alpha", metadata.get("ss_network_alpha", "") if not ranks else "Dynamic"
        yield "ss_network_args", "{}"


def _config(adapter: Adapter, tensors: Mapping[str, Tensor], kept: Sequence[Change]) -> dict[str, Any] | None:
    """adapter_config.json of a PEFT folder: LoRA, with each module's own rank, and an alpha that leaves its scale alone."""
    if not any(name.startswith(CONTAINER) for name in tensors):
        return None
    before = read_json(adapter.path / CONFIG_NAME) if (adapter.path / CONFIG_NAME).exists() else {}
    ranks = {
        name.removesuffix(suffix).removeprefix(CONTAINER): tensor.shape[0]
        for suffix in (".lora_A.weight", ".lora_embedding_A")
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    }
    alphas: dict[str, float] = dict(ranks)
    for change in kept:
        if isinstance(change.delta, LoRA | Embedding):
            path = change.module.stem.removeprefix(CONTAINER)
            alphas[path] = change.delta.rank * or_one(change.delta.scale)
    largest = max(ranks.values(), default=1)
    carried: dict[str, Any] = {key: before[key] for key in CARRIED if key in before}
    return {
        "bias": "none",
        **carried,
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "target_modules": sorted(ranks),
        "rank_pattern": {f"^{name}": rank for name, rank in sorted(ranks.items()) if rank != largest},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in sorted(alphas.items()) if alpha != largest},
        "inference_mode": True,
    }
