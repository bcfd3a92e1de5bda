"""Spells an adapter as the file that it came from: tensors that stay keep their bytes, metadata and config are made true."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from loratool.adapter.adapter import Adapter, Change
from loratool.deltas.base import scale_or_one
from loratool.errors import Unsupported
from loratool.files.adapter_writer import AdapterContents
from loratool.files.tensors import TensorFile
from loratool.formats import kohya
from loratool.formats.peft_writer import LoraFacts, lora_document, with_targets
from loratool.names import CONTAINER, Module

LEAF_NAMES: Final[Mapping[bool, tuple[str, str]]] = {
    False: ("lora_down.weight", "lora_up.weight"),
    True: ("lora_A.weight", "lora_B.weight"),
}
"""The names of `down` and `up`: kohya's, and PEFT's for dotted stems."""
HASH_KEY: Final = "modelspec.hash_sha256"
"""The metadata key of a file's own hash (ModelSpec)."""
EMBEDDING_NAMES: Final = {"embedding_down": "lora_embedding_A", "embedding_up": "lora_embedding_B"}
"""PEFT's names of an embedding's factors."""


def lora_tensors(change: Change) -> dict[str, Tensor]:
    """The tensors of a new LoRA of scale 1, under names in the adapter's own spelling of the module."""
    stem, leaves = change.module.stem, change.delta.leaves()
    if "embedding_down" in leaves:
        return {f"{stem}.{leaf}": leaves[own] for own, leaf in EMBEDDING_NAMES.items()}
    dotted = "." in stem
    down, up = LEAF_NAMES[dotted]
    tensors = {f"{stem}.{down}": leaves["down"], f"{stem}.{up}": leaves["up"]}
    # Scale 1 is an alpha that is the rank; names with dots leave it to PEFT's config, or to their readers' scale of 1.
    return tensors if dotted else tensors | {f"{stem}.alpha": torch.tensor(float(len(leaves["down"])))}


def read_unchanged(adapter: Adapter, kept: Sequence[Change]) -> dict[str, Tensor]:
    """The tensors of the changes that are kept, and the extras, under their own names and to the byte; raises `Unsupported`
    for an adapter that was computed or read from a pickle."""
    # Of a pickle the header is that of a temporary file, which is gone.
    source = adapter.file
    if not kept:
        return dict(adapter.extras)
    if source is None or source.is_pickle:
        raise Unsupported(f"{adapter.path}: is not a safetensors file with tensors to keep; convert it first")
    with TensorFile(source.header) as file:
        tensors = source.header.tensors
        return dict(adapter.extras) | {name: file.read(tensors[name]) for change in kept for name in change.keys}


def rescaled_biases(kept: Sequence[Change], converted: set[str]) -> dict[str, Tensor]:
    """The biases (PEFT's lora_bias) of modules whose factors were replaced, multiplied by the scale that both shared: the
    new factors hold that scale, and have scale 1."""
    return {
        change.keys[0]: change.delta.dense()
        for change in kept
        if change.keys[0].endswith(".lora_B.bias") and str(change.module) in converted
    }


def contents_like_source(
    adapter: Adapter, tensors: Mapping[str, Tensor], kept: Sequence[Change], ranks: Sequence[int]
) -> AdapterContents:
    """`tensors` as the contents of a file like the one that `adapter` came from; `kept` are the changes that stayed what
    they were, `ranks` the ranks of the new factors."""
    return AdapterContents(tensors, kohya.of_new_factors(adapter.metadata, ranks), _config(adapter, tensors, kept))


def _config(adapter: Adapter, tensors: Mapping[str, Tensor], kept: Sequence[Change]) -> dict[str, Any] | None:
    """adapter_config.json with each module's own rank, and an alpha that leaves its scale alone; None where no tensor has
    PEFT's prefix."""
    if not any(name.startswith(CONTAINER) for name in tensors):
        return None
    stacked = {change.module.stem: change for change in kept if change.delta.stacked}
    ranks = {
        stem.removeprefix(CONTAINER): tensor.shape[0]
        for suffix in (".lora_A.weight", ".lora_embedding_A")
        for name, tensor in tensors.items()
        if name.endswith(suffix) and (stem := name.removesuffix(suffix)) not in stacked
    } | {change.module.path: change.delta.rank or 0 for change in stacked.values()}
    # New factors have scale 1, for which None stands; those that were kept have their own.
    scales: dict[str, float | None] = dict.fromkeys(ranks)
    for change in kept:
        path = change.stem.removeprefix(CONTAINER)
        if path in scales and change.parameter == "weight":
            scales[path] = scale_or_one(change.delta.scale)
    return lora_document(adapter.config, LoraFacts(ranks, scales, [change.module.path for change in stacked.values()]))


def rescale_metadata(adapter: Adapter, kept: Sequence[Change], factors: Mapping[Module, float]) -> dict[str, str]:
    """The file's own metadata, with kohya's alpha made true of modules whose scales were multiplied by `factors`, and
    without the hash, which is no longer right."""
    metadata = {key: value for key, value in adapter.metadata.items() if key != HASH_KEY}
    if any(factors[change.module] != 1 for change in kept):
        loras = [change for change in kept if "down" in change.delta.leaves()]
        alphas = [c.delta.scale * len(c.delta.leaves()["down"]) * factors[c.module] for c in loras if c.delta.scale]
        metadata |= kohya.of_other_alphas(metadata, alphas)
    return metadata


def with_targets_of(config: Mapping[str, Any], kept: Sequence[Change]) -> dict[str, Any]:
    """A PEFT config that speaks of the modules of `kept` alone."""

    def paths(changes: Iterable[Change]) -> set[str]:
        return {change.stem.removeprefix(CONTAINER) for change in changes}

    saved = [change for change in kept if change.delta.replaces]
    stacked = [change for change in kept if change.delta.stacked]
    targets = [change for change in kept if not (change.delta.replaces or change.delta.stacked)]
    return with_targets(config, paths(targets), paths(saved), paths(stacked))
