"""Which format an adapter is in: the rows that every key agrees with. No torch."""

from __future__ import annotations

from loratool.archs import ARCHS, Arch
from loratool.formats.recognise import trainer
from loratool.formats.table import FORMATS, LLM, Format
from loratool.keys.detect import Verdict, named_like
from loratool.keys.listing import Listing
from loratool.keys.routes import as_named, is_spelled
from loratool.names import CONTAINER


def format_of(found: Listing, verdict: Verdict) -> str:
    """Whose format it is, in words: the rows that every key agrees with, else how its keys are made up."""
    prefixes = [prefix for prefix, _ in found.prefix_counts.most_common()]
    shown = ", ".join(prefix + "…" for prefix in prefixes if prefix)
    if CONTAINER in prefixes:
        alone = "in a single file" if found.configs else "names without a config"
        return f"PEFT {'folder' if found.path.is_dir() else alone}"
    archs = _archs(found, verdict)
    agreeing = [row.title for row in FORMATS if any(_agrees(found, row, arch) for arch in archs)]
    if agreeing:
        # Several write the same keys: the trainer's own name for them, else the best known.
        title = next((title for title in agreeing if title == trainer(found.header.metadata)), agreeing[0])
        return f"{title} ({shown})" if shown else f"{title}, bare names"
    families = " and ".join(sorted({family for group in found.groups for family in group.families}))
    if len({prefix.endswith("_") for prefix in prefixes}) > 1:
        return f"a mixture of {', '.join(prefix or 'bare names' for prefix in prefixes)}, {families} leaves"
    return f"{shown or 'bare module names'}, {families} leaves"


def _archs(found: Listing, verdict: Verdict) -> list[Arch]:
    """What the names may be read by."""
    modules = [group.module for group in found.groups]
    if verdict.arch == LLM:
        return [as_named(modules, LLM, verdict.title)]
    named = [arch for arch in ARCHS if arch.name == verdict.arch or arch.title in verdict.candidates]
    return named or named_like(modules) or [as_named(modules, "unknown", "a model without a table")]


def _agrees(found: Listing, row: Format, arch: Arch) -> bool:
    """Whether every key is what the format would call it."""
    if not all(row.spells(group.module.stem, [info.name for info in group.leaves.values()]) for group in found.groups):
        return False
    return is_spelled([group.module for group in found.groups], arch, row)
