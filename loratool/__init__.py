"""Reads, converts, merges, extracts and resizes adapter checkpoints: LoRA and its relatives, in the formats people have.

`inspect` and the reports need no torch; `load`, `merge` and `Checkpoint` import it when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

__version__: Final = "0.1.0"

if TYPE_CHECKING:
    from loratool.adapter.load import Adapter, Change, load
    from loratool.adapter.strengths import Strength
    from loratool.errors import LoratoolError
    from loratool.files.hashes import Hashes, file_hashes
    from loratool.files.hub import fetched
    from loratool.files.tensors import Checkpoint
    from loratool.numbers.ranks import Budget, Rule
    from loratool.verbs.check.check import CheckReport, check
    from loratool.verbs.check.fix import fix
    from loratool.verbs.combine.combine import CombineOptions, CombineReport, Part, combine
    from loratool.verbs.compare.compare import CompareOptions, compare, compare_to
    from loratool.verbs.convert import ConvertReport, convert
    from loratool.verbs.delta.delta import DeltaOptions, DeltaReport, delta, iter_deltas
    from loratool.verbs.edit.edit import EditOptions, EditReport, edit
    from loratool.verbs.extract.extract import ExtractOptions, ExtractReport, extract
    from loratool.verbs.inspect.block_map import Map, map_of
    from loratool.verbs.inspect.inspect import AdapterReport, CheckpointReport, inspect
    from loratool.verbs.merge.merge import MergeReport, merge
    from loratool.verbs.merge.write import Options, Source
    from loratool.verbs.meta.meta import (
        MetaReport,
        copy_metadata,
        delete_metadata,
        metadata_of,
        set_metadata,
        strip_metadata,
    )
    from loratool.verbs.report.report import PageReport, report
    from loratool.verbs.resize import FrontierReport, LowRankReport, frontier, resize, to_lora
    from loratool.verbs.swap import swap
    from loratool.verbs.unmerge.unmerge import UnmergeReport, unmerge

_HOMES: Final = {
    "CheckReport": "loratool.verbs.check.check",
    "Hashes": "loratool.files.hashes",
    "MetaReport": "loratool.verbs.meta.meta",
    "PageReport": "loratool.verbs.report.report",
    "check": "loratool.verbs.check.check",
    "fix": "loratool.verbs.check.fix",
    "fetched": "loratool.files.hub",
    "file_hashes": "loratool.files.hashes",
    "metadata_of": "loratool.verbs.meta.meta",
    "set_metadata": "loratool.verbs.meta.meta",
    "delete_metadata": "loratool.verbs.meta.meta",
    "copy_metadata": "loratool.verbs.meta.meta",
    "strip_metadata": "loratool.verbs.meta.meta",
    "report": "loratool.verbs.report.report",
    "map_of": "loratool.verbs.inspect.block_map",
    "Map": "loratool.verbs.inspect.block_map",
    "Adapter": "loratool.adapter.load",
    "AdapterReport": "loratool.verbs.inspect.inspect",
    "Change": "loratool.adapter.load",
    "Checkpoint": "loratool.files.tensors",
    "CheckpointReport": "loratool.verbs.inspect.inspect",
    "CombineOptions": "loratool.verbs.combine.combine",
    "CombineReport": "loratool.verbs.combine.combine",
    "CompareOptions": "loratool.verbs.compare.compare",
    "ConvertReport": "loratool.verbs.convert",
    "DeltaOptions": "loratool.verbs.delta.delta",
    "DeltaReport": "loratool.verbs.delta.delta",
    "EditOptions": "loratool.verbs.edit.edit",
    "EditReport": "loratool.verbs.edit.edit",
    "ExtractOptions": "loratool.verbs.extract.extract",
    "ExtractReport": "loratool.verbs.extract.extract",
    "Budget": "loratool.numbers.ranks",
    "LoratoolError": "loratool.errors",
    "MergeReport": "loratool.verbs.merge.merge",
    "Options": "loratool.verbs.merge.write",
    "Source": "loratool.verbs.merge.write",
    "Part": "loratool.verbs.combine.combine",
    "Strength": "loratool.adapter.strengths",
    "combine": "loratool.verbs.combine.combine",
    "compare": "loratool.verbs.compare.compare",
    "compare_to": "loratool.verbs.compare.compare",
    "convert": "loratool.verbs.convert",
    "delta": "loratool.verbs.delta.delta",
    "edit": "loratool.verbs.edit.edit",
    "extract": "loratool.verbs.extract.extract",
    "inspect": "loratool.verbs.inspect.inspect",
    "iter_deltas": "loratool.verbs.delta.delta",
    "load": "loratool.adapter.load",
    "merge": "loratool.verbs.merge.merge",
    "LowRankReport": "loratool.verbs.resize",
    "FrontierReport": "loratool.verbs.resize",
    "Rule": "loratool.numbers.ranks",
    "frontier": "loratool.verbs.resize",
    "resize": "loratool.verbs.resize",
    "to_lora": "loratool.verbs.resize",
    "UnmergeReport": "loratool.verbs.unmerge.unmerge",
    "swap": "loratool.verbs.swap",
    "unmerge": "loratool.verbs.unmerge.unmerge",
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
