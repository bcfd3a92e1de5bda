"""`convert --to`: an adapter under another format's names, exactly, and compared with the source once it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter import Adapter, Unsaid, load
from loratool.checkpoint import TensorFile
from loratool.errors import OutputError, Unsupported
from loratool.formats.leaves import CONTAINER
from loratool.formats.peft import CONFIG_NAME, METADATA_KEY
from loratool.formats.reading import locate
from loratool.formats.table import FOLDED, METADATA, Format, format_named
from loratool.header import read_header, read_json
from loratool.ops.checking import compared
from loratool.ops.choosing import Wanted, choose
from loratool.ops.low_rank import Converted, error_of, lower
from loratool.ops.renaming import renamed
from loratool.ops.saving import Contents, before, write
from loratool.ops.spelling import Spelled, lora_config, spelled
from loratool.ranks import Rule

STALE: Final = ("modelspec.hash_sha256", METADATA_KEY)
"""Metadata that is no longer true of a file of other tensors."""


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did: into which format, for which architecture, how many modules there were and are, how many of
    them were cut or stacked, and the largest relative difference of a module that re-reading it found. `lowered` are the
    modules that became LoRA first, `error` what that left out of all of them."""

    out: str
    format: str
    arch: str
    before: int
    after: int
    cut: int
    stacked: int
    alpha: str
    difference: float
    nbytes: int
    lowered: tuple[Converted, ...] = ()
    error: float = 0.0
    warnings: tuple[str, ...] = ()


def convert(
    path: str | Path,
    out: str | Path,
    to: str,
    *,
    arch: str | None = None,
    base: str | Path | None = None,
    rule: Rule | None = None,
    dtype: str | None = None,
    source: str | None = None,
    unsaid: Unsaid | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> ConvertReport:
    """Writes the adapter at `path` to `out` in the format called `to`, with the same ΔW, and compares what it wrote.

    `arch` overrides what the file is detected to be for, and `source`, a format's name, narrows it to what is spelled so;
    `base` is a checkpoint that has the modules' names. With a `rule`, what is no LoRA becomes one first. Raises
    `LoratoolError`, and writes nothing, where a delta has no exact form or no place there.
    """
    adapter, target = load(path, allow_pickle=allow_pickle, unsaid=unsaid), format_named(to)
    out = Path(out).expanduser()
    if target.folder and out.suffix == ".safetensors":
        raise OutputError(f"{out}: {target.title} is a folder; name one, or write a single file with --to peft-file")
    converted: list[Converted] = []
    if rule is not None:
        adapter, converted, _ = lower(adapter, rule, dtype, base=base)
    elif target.folder and (adapter.path / CONFIG_NAME).exists() and locate(adapter.path)[0].suffix == ".safetensors":
        return _copied(adapter, target, out, overwrite=overwrite)
    found, ways = choose(adapter, target, Wanted(arch, source, Path(base) if base else None))
    moved = renamed(adapter.changes, ways)
    result = spelled(moved, target, adapter)
    differences: list[float] = []

    def check(written: Path) -> None:
        differences.append(compared(adapter, load(written), ways, target))

    nbytes = write(_contents(adapter, target, result), adapter.path, out, overwrite=overwrite, check=check)
    report = _report(adapter, target, out, nbytes)
    return replace(
        report,
        arch=found.title,
        after=len({(item.prefix, item.path) for item in moved}),
        cut=sum(len(way.read.parts) > 1 and not way.renames for way in ways.values()),
        stacked=sum(len(item.sources) > 1 for item in moved),
        difference=max(differences),
        lowered=tuple(converted),
        error=error_of(converted),
    )


def _report(adapter: Adapter, target: Format, out: Path, nbytes: int) -> ConvertReport:
    """Of a conversion that changed nothing."""
    count = len({change.module for change in adapter.changes})
    return ConvertReport(
        str(out), target.title, "any model", count, count, 0, 0, target.alpha, 0.0, nbytes, warnings=adapter.notes
    )


def _copied(adapter: Adapter, target: Format, out: Path, *, overwrite: bool) -> ConvertReport:
    """A PEFT folder as a PEFT folder: all its tensors and its config, whatever its kind."""
    header = read_header(locate(adapter.path)[0])
    with TensorFile(header) as file:
        tensors = {name: file.read(info) for name, info in header.tensors.items()}
    contents = Contents(tensors, adapter.metadata, read_json(adapter.path / CONFIG_NAME))
    return _report(adapter, target, out, write(contents, adapter.path, out, overwrite=overwrite))


def _contents(adapter: Adapter, target: Format, result: Spelled) -> Contents:
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
    saved = {"modules_to_save": sorted(result.whole)} if result.whole else {}
    return {
        "bias": "none",
        **before(adapter),
        "peft_type": "LORA",
        **next(iter(configs.values()), {}),
        **saved,
        "use_dora": any(result.dora),
        "lora_bias": any(name.endswith(".lora_B.bias") for name in result.tensors),
        "inference_mode": True,
    }


def _network(adapter: Adapter, target: Format, result: Spelled) -> Iterator[tuple[str, str]]:
    """kohya's metadata of rank and alpha, made true where the conversion changed them."""
    if "ss_network_dim" not in adapter.metadata:
        return
    ranks = {
        source.shape[0] for change in adapter.changes for leaf, source in change.delta.leaves().items() if leaf == "down"
    }
    after = set(result.ranks.values())
    if after != ranks:
        yield "ss_network_dim", str(*after) if len(after) == 1 else "Dynamic"
    if after != ranks or target.alpha == FOLDED:
        alphas = {rank * scale for key, rank in result.ranks.items() if (scale := result.scales[key]) is not None} or after
        yield "ss_network_alpha", f"{min(alphas):g}" if len(alphas) == 1 else "Dynamic"
