"""An adapter in words for people: whose format it has, what is odd about it, what its metadata says. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from loratool.errors import first_few
from loratool.files.header import TensorInfo
from loratool.formats.recognise import refusal, trainer
from loratool.keys.detect import is_language_model
from loratool.keys.identify import matching_formats
from loratool.keys.listing import AdapterListing
from loratool.names import CONTAINER

FEW: Final = 200
"""The characters of one metadata value that are shown."""


def summarise_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
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


def describe_format(found: AdapterListing) -> str:
    """An adapter's format in words: the title of a row of `FORMATS` that all keys fit, else how its keys are made up."""
    prefixes = [prefix for prefix, _ in found.prefix_counts.most_common()]
    if not prefixes and found.file.config:
        return "PEFT folder"
    shown = ", ".join(prefix + "…" for prefix in prefixes if prefix)
    # The container is PEFT's mark, whatever the names behind it are.
    if CONTAINER in prefixes:
        alone = "in a single file" if found.configs else "names without a config"
        return f"PEFT {'folder' if found.path.is_dir() else alone}"
    if not found.groups:
        return "none that is known"
    titles = [row.title for row in matching_formats(found.keys)]
    if titles:
        # Several write the same keys: the trainer's own name for them, else the best known.
        title = next((title for title in titles if title == trainer(found.header.metadata)), titles[0])
        return f"{title} ({shown})" if shown else f"{title}, bare names"
    # No row fits: say which prefixes and whose leaves there are. A prefix of flattened names ends with an underscore, one of
    # dotted names with a dot: no tool writes both.
    families = " and ".join(sorted({family for group in found.groups for family in group.families}))
    if len({prefix.endswith("_") for prefix in prefixes}) > 1:
        return f"a mixture of {', '.join(prefix or 'bare names' for prefix in prefixes)}, {families} leaves"
    return f"{shown or 'bare module names'}, {families} leaves"


def suspicions(found: AdapterListing) -> list[str]:
    """The odd things about an adapter, in words: what no program can use, what is missing, what is mixed."""
    refusals = (config.refusal for config in found.configs.values())
    odd = [why for why in (refusal(found.header.tensors), *found.problems, *refusals) if why]
    if found.unexplained:
        odd.append(f"{len(found.unexplained)} tensors that no kind explains: {first_few(found.unexplained, 3)}")
    if found.extras:
        odd.append(f"{len(found.extras)} tensors of bundled embeddings travel along")
    needing = [group for group in found.groups if {"down", "hada_w1_a"} & group.leaves.keys()]
    missing = [group for group in needing if "alpha" not in group.leaves and found.config(group.module) is None]
    if missing:
        which = "all" if len(missing) == len(needing) else f"{len(missing)} of {len(needing)}"
        odd.append(f"{which} modules have no alpha: their scale is 1")
    # An alpha in another dtype than its factors is nothing odd: this tool too writes float32 beside half precision.
    dtypes = {info.dtype for leaf, info in leaves_of(found) if leaf != "alpha"}
    if len(dtypes) > 1:
        odd.append(f"mixed dtypes: {', '.join(sorted(dtypes))}")
    if found.lacks_config:
        # Loading refuses a language model's adapter without its config, and takes others at scale 1.
        unknown = is_language_model([group.module for group in found.groups])
        odd.append(f"adapter_config.json is missing: the scale is {'unknown' if unknown else 'taken to be 1'}")
    return odd


def leaves_of(found: AdapterListing) -> list[tuple[str, TensorInfo]]:
    """Every leaf of every module, with what the header says of its tensor."""
    return [(leaf, info) for group in found.groups for leaf, info in group.leaves.items()]
