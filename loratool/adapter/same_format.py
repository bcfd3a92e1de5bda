"""Writes adapters: tensors in safetensors' own order, metadata that is true of them, and PEFT's config beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from loratool.adapter.load import Adapter, Change
from loratool.adapter.spell import lora_config
from loratool.deltas.base import or_one
from loratool.files.hashes import LENGTHS, hashes
from loratool.files.header import TensorInfo, encode_header, read_header, stored_order
from loratool.files.output import Output, Writer
from loratool.files.tensors import DTYPE_NAMES, TensorFile, tensor_bytes
from loratool.formats.leaves import CONTAINER
from loratool.formats.peft import CONFIG_NAME
from loratool.keys.listing import WEIGHTS, locate

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


@dataclass(frozen=True, slots=True)
class Contents:
    """What an adapter's file is to hold, and the config of a PEFT folder; None for a single file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = field(default=None)


def write(
    contents: Contents, inputs: Sequence[Path], out: Path, *, overwrite: bool, check: Callable[[Path], None] | None = None
) -> int:
    """Writes an adapter to `out`, a file or a PEFT folder, and returns its bytes.

    `check` is given what was written before it takes its place, and raises where that is not right.
    """
    infos, position = _laid_out(contents.tensors)
    parts = [tensor_bytes(contents.tensors[name].contiguous()) for name in infos]
    metadata = dict(contents.metadata)
    metadata |= hashes(infos, parts, metadata)
    raw = encode_header(infos, metadata)
    nbytes, folder = len(raw) + position, contents.config is not None
    with Output(out, folder=folder, overwrite=overwrite, nbytes=nbytes, inputs=inputs) as output:
        path = output.path(WEIGHTS[0] if folder else "")
        with Writer(path, nbytes) as writer:
            writer.write(raw, 0)
            for info, part in zip(infos.values(), parts, strict=True):
                writer.write(part, len(raw) + info.start)
        if contents.config is not None:
            output.path(CONFIG_NAME).write_text(_text(contents.config))
        if check:
            check(path.parent if folder else path)
        output.commit()
    return nbytes


def size_of(contents: Contents) -> int:
    """The bytes that `write` would write of tensors of these shapes, the config's included."""
    infos, position = _laid_out(contents.tensors)
    config = "" if contents.config is None else _text(contents.config)
    metadata = dict(contents.metadata) | {key: "0" * length for key, length in LENGTHS.items()}
    return len(encode_header(infos, metadata)) + position + len(config.encode())


def _laid_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, TensorInfo], int]:
    """Where each tensor lies, and the end of the last, in safetensors' own order: hashes depend on it."""
    infos, position = {}, 0
    for name in sorted(tensors, key=lambda name: stored_order(DTYPE_NAMES[tensors[name].dtype], name)):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        infos[name] = TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), position, position + size)
        position += size
    return infos, position


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"


def named(change: Change) -> dict[str, Tensor]:
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
    header = read_header(locate(adapter.path)[0])
    with TensorFile(header) as file:
        return dict(adapter.passengers) | {name: file.read(header.tensors[name]) for change in kept for name in change.keys}


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


def kohya_metadata(metadata: Mapping[str, str], ranks: Sequence[int]) -> Iterator[tuple[str, str]]:
    """The metadata of the source, with what it says of the network true of factors of `ranks`, whose scale is 1."""
    yield from metadata.items()
    if "ss_network_module" in metadata:
        yield "ss_network_module", "networks.lora"
        yield "ss_network_dim", one_or_dynamic(ranks)
        yield "ss_network_alpha", metadata.get("ss_network_alpha", "") if not ranks else "Dynamic"
        yield "ss_network_args", "{}"


def one_or_dynamic(values: Iterable[float]) -> str:
    """kohya's word for ranks or alphas: the one that all modules have, or Dynamic."""
    distinct = set(values)
    return f"{min(distinct):g}" if len(distinct) == 1 else "Dynamic"


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
