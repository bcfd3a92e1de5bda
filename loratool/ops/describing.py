"""What an adapter looks like to people: whose format it is, what is odd about it, what its metadata says. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratool.errors import some
from loratool.formats.leaves import CONTAINER
from loratool.formats.reading import Listing
from loratool.header import TensorInfo

FEW: Final = 200
"""Longest text of one metadata value that is shown."""


def summarised(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata with long values cut, and JSON objects replaced by how many entries they hold."""
    return {key: _summary(value) for key, value in sorted(metadata.items())}


def _summary(value: str) -> str:
    if len(value) <= FEW:
        return value
    try:
        document: Any = json.loads(value)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict | list):
        return f"JSON, {len(document)} entries, {len(value):,} characters"
    return f"{value[:FEW]}… ({len(value):,} characters)"


def format_of(found: Listing) -> str:
    """Who writes keys like these, in words: the layout of modules, and the spelling of leaves where it differs."""
    families = sorted({family for group in found.groups for family in group.families})
    prefixes = [prefix for prefix, _ in found.prefix_counts.most_common()]
    if CONTAINER in prefixes:
        return f"PEFT {'folder' if found.configs else 'names without a config'}"
    flattened = [prefix for prefix in prefixes if prefix.endswith("_")]
    dotted = [prefix for prefix in prefixes if not prefix.endswith("_")]
    if flattened and dotted:
        return f"a mixture of {', '.join(prefix or 'bare names' for prefix in prefixes)}"
    if flattened:
        return f"kohya ({', '.join(prefix + '…' for prefix in flattened)})" + _with(families, "kohya")
    if dotted == [""]:
        return f"bare module names, {' and '.join(families)} leaves"
    maker = "ComfyUI" if any("diffusion_model" in prefix for prefix in dotted) else "diffusers"
    return f"{maker} ({', '.join(prefix + '…' for prefix in dotted if prefix)})" + _with(families, "PEFT")


def _with(families: Sequence[str], usual: str) -> str:
    other = [family for family in families if family != usual]
    return f" with {' and '.join(other)} leaves" if other else ""


def suspicions(found: Listing) -> list[str]:
    """What is odd about an adapter, without saying that it is wrong."""
    odd = [*found.problems, *(config.refusal for config in found.configs.values() if config.refusal)]
    if found.unexplained:
        odd.append(f"{len(found.unexplained)} tensors that no kind explains: {some(found.unexplained, 3)}")
    if found.passengers:
        odd.append(f"{len(found.passengers)} tensors of bundled embeddings travel along")
    needing = [group for group in found.groups if {"down", "hada_w1_a"} & group.leaves.keys()]
    missing = [group for group in needing if "alpha" not in group.leaves and found.config(group.module) is None]
    if missing:
        which = "all" if len(missing) == len(needing) else f"{len(missing)} of {len(needing)}"
        odd.append(f"{which} modules have no alpha: their scale is 1")
    dtypes = {info.dtype for leaf, info in leaves_of(found) if leaf != "alpha"}
    if len(dtypes) > 1:
        odd.append(f"mixed dtypes: {', '.join(sorted(dtypes))}")
    if found.groups[0].module.stem.startswith(CONTAINER) and not found.configs:
        odd.append("adapter_config.json is missing: the scale is unknown")
    return odd


def leaves_of(found: Listing) -> list[tuple[str, TensorInfo]]:
    """Every leaf of every module, with its tensor."""
    return [(leaf, info) for group in found.groups for leaf, info in group.leaves.items()]
