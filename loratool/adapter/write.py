"""Writes an adapter as a file of some format: spelled, with true metadata and config, read again, compared, put in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.adapter.adapter import Adapter
from loratool.adapter.load import LazyAdapter
from loratool.adapter.rename import RenamedDelta, rename_changes
from loratool.adapter.spell import FormatTensors, spell_adapter
from loratool.adapter.verify import verify_adapter
from loratool.errors import OutputError, Unsupported
from loratool.files.adapter_writer import AdapterContents, contents_size, write_contents
from loratool.files.output import Input
from loratool.formats import kohya
from loratool.formats.peft import PEFT_METADATA_KEY
from loratool.formats.peft_writer import LoraFacts, lora_config, lora_document, metadata_entry
from loratool.formats.table import FOLDED, METADATA, Format
from loratool.keys.routes import Route
from loratool.names import CONTAINER, Module

STALE: Final = ("modelspec.hash_sha256", PEFT_METADATA_KEY)
"""Keys of metadata that is no longer true of a file with other tensors."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What was written: the changes under their new names, the largest relative difference that reading the file again
    found, and the bytes of the tensors' file."""

    moved: tuple[RenamedDelta, ...]
    difference: float
    nbytes: int


def write_adapter(
    adapter: Adapter,
    target: Format,
    routes: Mapping[Module, Route],
    out: Path,
    *,
    inputs: Sequence[Input],
    overwrite: bool = False,
) -> WriteResult:
    """Writes `adapter` to `out` in the format `target`, each module by its route, and compares the file with `adapter`.

    Raises `LoratoolError`, and writes nothing, where a delta has no exact form or no place in that format.
    """
    require_folder_name(target, out)
    moved = rename_changes(adapter.changes, routes)
    contents = pack_adapter(adapter, target, spell_adapter(moved, target, adapter))
    # The comparison runs on the finished file before that takes its place, so that a wrong file never appears.
    differences: list[float] = []

    def check(written: Path) -> None:
        with LazyAdapter(written) as again:
            differences.append(verify_adapter(adapter, again, routes, target))

    nbytes = write_contents(contents, inputs, out, overwrite=overwrite, check=check)
    return WriteResult(tuple(moved), max(differences), nbytes)


def size_in_format(adapter: Adapter, target: Format, routes: Mapping[Module, Route]) -> int:
    """The bytes that `write_adapter` would write; the deltas may be placeholders, whose shapes alone count."""
    return contents_size(
        pack_adapter(adapter, target, spell_adapter(rename_changes(adapter.changes, routes), target, adapter))
    )


def require_folder_name(target: Format, out: Path) -> None:
    """Raises `OutputError` where `target` is a folder and `out` has a file's name."""
    if target.folder and out.suffix == ".safetensors":
        raise OutputError(f"{out}: {target.title} is a folder; name one, or write a single file with `to='peft-file'`")


def pack_adapter(adapter: Adapter, target: Format, result: FormatTensors) -> AdapterContents:
    """The contents of a file, or a folder, in the format `target`, from an adapter's tensors, which are spelled already."""
    metadata = {key: value for key, value in adapter.metadata.items() if key not in STALE}
    metadata |= _network(adapter, target, result)
    # As diffusers does; and a single file with PEFT's names has no other place for its config.
    declared = target.alpha == METADATA and any(scale is not None for scale in result.scales.values())
    if declared or (target.whole == CONTAINER and not target.folder):
        # Behind PEFT's container the config is the whole file's.
        prefixes = dict.fromkeys(prefix for prefix, _ in result.ranks)
        configs = {"" if prefix == CONTAINER else prefix: lora_config(*_of(result, prefix)) for prefix in prefixes}
        metadata |= metadata_entry(configs)
    tensors = result.tensors | dict(adapter.extras)
    return AdapterContents(tensors, metadata, _config(adapter, result) if target.folder else None)


def common_metadata(adapters: Sequence[Adapter], whole: Adapter) -> dict[str, str]:
    """The metadata that all adapters have in common, made true of `whole`, the adapter that was made of them."""
    first, *others = (adapter.metadata for adapter in adapters)
    common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    common |= {key: first[key] for key in (kohya.MODULE, kohya.DIM, kohya.ALPHA) if key in first}
    if not all(change.delta.resizable or change.delta.stored_whole for change in whole.changes):
        return common
    return kohya.of_new_factors(common, [change.delta.rank or 0 for change in whole.changes if change.delta.resizable])


def new_metadata(target: Format, ranks: Sequence[int]) -> dict[str, str]:
    """The metadata of a new file of LoRA of these `ranks`, whose alphas are the ranks."""
    return {"format": "pt"} | (kohya.new_network(ranks) if target.flat else {})


def _of(result: FormatTensors, prefix: str) -> tuple[dict[str, int], dict[str, float | None]]:
    """The ranks and the scales of the modules of one component, by path."""
    ranks = {path: rank for (of, path), rank in result.ranks.items() if of == prefix}
    return ranks, {path: scale for (of, path), scale in result.scales.items() if of == prefix}


def _config(adapter: Adapter, result: FormatTensors) -> dict[str, Any]:
    """adapter_config.json of PEFT's LoRA, with what the tensors ask for; raises `Unsupported` where no config can say it."""
    if any(result.dora) and not all(result.dora):
        raise Unsupported("PEFT has DoRA for all modules of an adapter or for none; `rule=Rule()` makes LoRA of them")
    biased = any(name.endswith(".lora_B.bias") for name in result.tensors)
    if biased and any(name.endswith(".lora_embedding_A") for name in result.tensors):
        raise Unsupported(
            "PEFT has lora_bias for all modules of an adapter or for none, and cannot have it for an embedding"
        )
    # PEFT's folder holds one component, so that all its modules have one prefix.
    prefix = next((prefix for prefix, _ in result.ranks), CONTAINER)
    ranks, scales = _of(result, prefix)
    facts = LoraFacts(
        ranks or None,
        scales,
        stacked=result.stacked,
        saved=result.whole,
        dora=any(result.dora),
        lora_bias=biased,
        biases=any(name.endswith(".base_layer.bias") for name in result.tensors),
    )
    return lora_document(adapter.config, facts)


def _network(adapter: Adapter, target: Format, result: FormatTensors) -> dict[str, str]:
    """kohya's metadata of ranks and alphas that the conversion changed."""
    before = {
        source.shape[0] for change in adapter.changes for leaf, source in change.delta.leaves().items() if leaf == "down"
    }
    alphas = {rank * scale for key, rank in result.ranks.items() if (scale := result.scales[key]) is not None}
    after = set(result.ranks.values())
    return kohya.of_other_ranks(adapter.metadata, before, after, alphas, folded=target.alpha == FOLDED)
