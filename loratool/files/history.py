"""What loratool writes into its outputs about where they come from, and reads from them again. No torch.

One JSON object: version, command, what was asked for and what it cost, the adapters that went in with the first letters of
their AutoV3, and `before`: what the input said of itself in the same way, and what that came from. Without times or paths,
so that equal runs write equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from loratool._version import __version__
from loratool.files.adapter_files import AdapterFile
from loratool.files.hashes import short_hash

METADATA_KEY: Final = "loratool"
MOST: Final = 6
"""Earlier commands that are kept,"""
BYTES: Final = 6000
"""in so many letters of JSON."""
NAMED: Final = 20
"""Adapters that are named."""


def history_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file's metadata says of how loratool made it; nothing where it says nothing that can be read."""
    try:
        document = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def chain_of(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """What was done to a file, the last command first."""
    newest = history_of(metadata)
    before = newest.pop("before", [])
    older = before if isinstance(before, list) else [before]
    return [step for step in (newest, *older) if isinstance(step, dict) and step.get("command")]


def named(path: Path, file: AdapterFile | None, **said: object) -> dict[str, object]:
    """An input by its name, and by its hash where it was read from a file."""
    return {"name": _name(path)[:100], "autov3": file and short_hash(file), **said}


def _name(path: Path) -> str:
    """The file's or folder's, or for a folder in the hub's cache, whose own name is a commit, the repository's."""
    repository = path.parent.parent.name
    return repository.removeprefix("models--").replace("--", "/") if path.parent.name == "snapshots" else path.name


def entry(
    command: str, adapters: Iterable[Mapping[str, object]], metadata: Mapping[str, str], **said: object
) -> dict[str, str]:
    """The metadata that tells of `command`, done to `adapters` (see `named`), to which what is changed says `metadata`."""
    document: dict[str, Any] = {"version": __version__, "command": command}
    made_of = list(adapters)[:NAMED]
    document |= ({"adapters": made_of} if made_of else {}) | said
    before = [shortened(step) for step in chain_of(metadata)[:MOST]]
    while before and len(json.dumps(before)) > BYTES:
        before.pop()
    return {METADATA_KEY: json.dumps(document | ({"before": before} if before else {}))}


def shortened(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step without what it says of single modules."""
    return {key: value for key, value in step.items() if key not in ("modules", "left_out", "columns")}
