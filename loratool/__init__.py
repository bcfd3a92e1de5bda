"""Reads, converts, merges, extracts and resizes adapter checkpoints: LoRA and its relatives, in the formats people have.

`inspect` and the reports need no torch; `load`, `merge` and `Checkpoint` import it when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

__version__: Final = "0.1.0"

if TYPE_CHECKING:
    from loratool.adapter import Adapter, Change, load
    from loratool.checkpoint import Checkpoint
    from loratool.errors import LoratoolError
    from loratool.hub import fetched
    from loratool.ops.check import CheckReport, check
    from loratool.ops.combine import CombineOptions, CombineReport, Part, combine
    from loratool.ops.compare import CompareOptions, compare, compare_to
    from loratool.ops.convert import ConvertReport, convert
    from loratool.ops.delta import DeltaOptions, DeltaReport, delta, iter_deltas
    from loratool.ops.edit import EditOptions, EditReport, edit
    from loratool.ops.extract import ExtractOptions, ExtractReport, extract
    from loratool.ops.fixing import fix
    from loratool.ops.hashing import Hashes, file_hashes
    from loratool.ops.inspect import AdapterReport, CheckpointReport, inspect
    from loratool.ops.low_rank import FrontierReport, LowRankReport, frontier, resize, to_lora
    from loratool.ops.mapping import Map, map_of
    from loratool.ops.merge import MergeReport, merge
    from loratool.ops.merging import Options, Source
    from loratool.ops.meta import MetaReport, copy_metadata, delete_metadata, metadata_of, set_metadata, strip_metadata
    from loratool.ops.strengths import Strength
    from loratool.ops.swap import swap
    from loratool.ops.unmerge import UnmergeReport, unmerge
    from loratool.pages.report import PageReport, report
    from loratool.ranks import Budget, Rule

_HOMES: Final = {
    "CheckReport": "loratool.ops.check",
    "Hashes": "loratool.ops.hashing",
    "MetaReport": "loratool.ops.meta",
    "PageReport": "loratool.pages.report",
    "check": "loratool.ops.check",
    "fix": "loratool.ops.fixing",
    "fetched": "loratool.hub",
    "file_hashes": "loratool.ops.hashing",
    "metadata_of": "loratool.ops.meta",
    "set_metadata": "loratool.ops.meta",
    "delete_metadata": "loratool.ops.meta",
    "copy_metadata": "loratool.ops.meta",
    "strip_metadata": "loratool.ops.meta",
    "report": "loratool.pages.report",
    "map_of": "loratool.ops.mapping",
    "Map": "loratool.ops.mapping",
    "Adapter": "loratool.adapter",
    "AdapterReport": "loratool.ops.inspect",
    "Change": "loratool.adapter",
    "Checkpoint": "loratool.checkpoint",
    "CheckpointReport": "loratool.ops.inspect",
    "CombineOptions": "loratool.ops.combine",
    "CombineReport": "loratool.ops.combine",
    "CompareOptions": "loratool.ops.compare",
    "ConvertReport": "loratool.ops.convert",
    "DeltaOptions": "loratool.ops.delta",
    "DeltaReport": "loratool.ops.delta",
    "EditOptions": "loratool.ops.edit",
    "EditReport": "loratool.ops.edit",
    "ExtractOptions": "loratool.ops.extract",
    "ExtractReport": "loratool.ops.extract",
    "Budget": "loratool.ranks",
    "LoratoolError": "loratool.errors",
    "MergeReport": "loratool.ops.merge",
    "Options": "loratool.ops.merging",
    "Source": "loratool.ops.merging",
    "Part": "loratool.ops.combine",
    "Strength": "loratool.ops.strengths",
    "combine": "loratool.ops.combine",
    "compare": "loratool.ops.compare",
    "compare_to": "loratool.ops.compare",
    "convert": "loratool.ops.convert",
    "delta": "loratool.ops.delta",
    "edit": "loratool.ops.edit",
    "extract": "loratool.ops.extract",
    "inspect": "loratool.ops.inspect",
    "iter_deltas": "loratool.ops.delta",
    "load": "loratool.adapter",
    "merge": "loratool.ops.merge",
    "LowRankReport": "loratool.ops.low_rank",
    "FrontierReport": "loratool.ops.low_rank",
    "Rule": "loratool.ranks",
    "frontier": "loratool.ops.low_rank",
    "resize": "loratool.ops.low_rank",
    "to_lora": "loratool.ops.low_rank",
    "UnmergeReport": "loratool.ops.unmerge",
    "swap": "loratool.ops.swap",
    "unmerge": "loratool.ops.unmerge",
}
"""Where each public name lives; it is imported from there on first use."""

__all__ = [
    "Adapter",
    "AdapterReport",
    "Budget",
    "Change",
    "CheckReport",
    "Checkpoint",
    "CheckpointReport",
    "CombineOptions",
    "CombineReport",
    "CompareOptions",
    "ConvertReport",
    "DeltaOptions",
    "DeltaReport",
    "EditOptions",
    "EditReport",
    "ExtractOptions",
    "ExtractReport",
    "FrontierReport",
    "Hashes",
    "LoratoolError",
    "LowRankReport",
    "Map",
    "MergeReport",
    "MetaReport",
    "Options",
    "PageReport",
    "Part",
    "Rule",
    "Source",
    "Strength",
    "UnmergeReport",
    "check",
    "combine",
    "compare",
    "compare_to",
    "convert",
    "copy_metadata",
    "delete_metadata",
    "delta",
    "edit",
    "extract",
    "fetched",
    "file_hashes",
    "fix",
    "frontier",
    "inspect",
    "iter_deltas",
    "load",
    "map_of",
    "merge",
    "metadata_of",
    "report",
    "resize",
    "set_metadata",
    "strip_metadata",
    "swap",
    "to_lora",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loratool' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
