"""An adapter in memory as a file of some format: spelled, with true metadata and config, written, read again, compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.adapter.adapter import Adapter
from loratool.adapter.load import Stored
from loratool.adapter.rename import Moved, renamed
from loratool.adapter.same_format import before
from loratool.adapter.spell import Spelled, spelled
from loratool.adapter.verify import compared
from loratool.errors import OutputError, Unsupported
from loratool.files.adapter_writer import Contents, size_of, write
from loratool.files.output import Input
from loratool.formats.kohya import one_or_dynamic
from loratool.formats.peft import METADATA_KEY, lora_config
from loratool.formats.table import FOLDED, METADATA, Format
from loratool.keys.routes import Route
from loratool.names import CONTAINER, Module

STALE: Final = ("modelspec.hash_sha256", METADATA_KEY)
"""Metadata that is no longer true of a file of other tensors."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: the changes under their new names, the largest relative difference of a module that reading it again
    found, and its bytes."""

    moved: tuple[Moved, ...]
    difference: float
    nbytes: int


def write_as(
    adapter: Adapter,
    target: Format,
    ways: Mapping[Module, Route],
    out: Path,
    *,
    inputs: Sequence[Input],
    overwrite: bool = False,
) -> Written:
    """Writes `adapter` to `out` in the format `target`, each module as `ways` says, and compares what it wrote with it.

    Raises `LoratoolError`, and writes nothing, where a delta has no exact form or no place there.
    """
    require_room(target, out)
    moved = renamed(adapter.changes, ways)
    contents = packed(adapter, target, spelled(moved, target, adapter))
    differences: list[float] = []

    def check(written: Path) -> None:
        with Stored(written) as again:
            differences.append(compared(adapter, again, ways, target))

    nbytes = write(contents, inputs, out, overwrite=overwrite, check=check)
    return Written(tuple(moved), max(differences), nbytes)


def size_as(adapter: Adapter, target: Format, ways: Mapping[Module, Route]) -> int:
    """The bytes that `write_as` would write, of deltas whose tensors need not hold anything yet."""
    return size_of(packed(adapter, target, spelled(renamed(adapter.changes, ways), target, adapter)))


def require_room(target: Format, out: Path) -> None:
    """Raises `OutputError` where a folder is to be written under a file's name."""
    if target.folder and out.suffix == ".safetensors":
        raise OutputError(f"{out}: {target.title} is a folder; name one, or write a single file with --to peft-file")


def packed(adapter: Adapter, target: Format, result: Spelled) -> Contents:
    """What a file, or a folder, in the format `target` holds of an adapter whose tensors are spelled already."""
    prefixes = dict.fromkeys(prefix for prefix, _ in result.ranks)
    metadata = {key: value for key, value in adapter.metadata.items() if key not in STALE}
    metadata |= dict(_network(adapter, target, result))
    configs = {
        prefix: lora_config(
            {path: rank for (of, path), rank in result.ranks.items() if of == prefix},
            {path: scale for (of, path), scale in result.scales.items() if of == prefix},
        )
        for prefix in prefixes
    }
    declared = target.alpha == METADATA and any(scale is not None for scale in result.scales.values())
    if declared or (target.whole == CONTAINER and not target.folder):
        # Behind PEFT's container the config is the whole file's.
        named = {"" if prefix == CONTAINER else prefix: config for prefix, config in configs.items()}
        document = {f"{prefix}{key}": value for prefix, config in named.items() for key, value in config.items()}
        metadata[METADATA_KEY] = json.dumps(document, sort_keys=True)
    tensors = result.tensors | dict(adapter.passengers)
    return Contents(tensors, metadata, _config(adapter, result, configs) if target.folder else None)


def _config(adapter: Adapter, result: Spelled, configs: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """adapter_config.json: PEFT's LoRA, with what its tensors ask for."""
    if any(result.dora) and not all(result.dora):
        raise Unsupported("PEFT has DoRA for all modules of an adapter or for none; --to-lora makes LoRA of them")
    biased = any(name.endswith(".lora_B.bias") for name in result.tensors)
    if biased and any(name.endswith(".lora_embedding_A") for name in result.tensors):
        raise Unsupported(
            "PEFT has lora_bias for all modules of an adapter or for none, and cannot have it for an embedding"
        )
    saved = {"modules_to_save": sorted(result.whole)} if result.whole else {}
    return {
        "bias": "none",
        **before(adapter),
        "peft_type": "LORA",
        **(_of_experts(result) if result.experts else next(iter(configs.values()), {})),
        **saved,
        "use_dora": any(result.dora),
        "lora_bias": biased,
        **({"bias": "all"} if any(name.endswith(".base_layer.bias") for name in result.tensors) else {}),
        "inference_mode": True,
    }


def _of_experts(result: Spelled) -> dict[str, object]:
    """The config of an adapter with stacked experts, which are all of one rank: no pattern can name them."""
    (rank,) = set(result.experts.values())
    ranks = {path: rank for (_, path), rank in result.ranks.items()}
    scales = {path: scale for (_, path), scale in result.scales.items()}
    return {**lora_config(ranks, scales, rank), "target_parameters": sorted(result.experts)}


def _network(adapter: Adapter, target: Format, result: Spelled) -> Iterator[tuple[str, str]]:
    """kohya's metadata of rank and alpha, made true where the conversion changed them."""
    if "ss_network_dim" not in adapter.metadata:
        return
    ranks = {
        source.shape[0] for change in adapter.changes for leaf, source in change.delta.leaves().items() if leaf == "down"
    }
    after = set(result.ranks.values())
    if after != ranks:
        yield "ss_network_dim", one_or_dynamic(after)
    if after != ranks or target.alpha == FOLDED:
        alphas = {rank * scale for key, rank in result.ranks.items() if (scale := result.scales[key]) is not None} or after
        yield "ss_network_alpha", one_or_dynamic(alphas)
