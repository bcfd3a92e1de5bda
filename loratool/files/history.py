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

HISTORY_KEY: Final = "loratool"
_MOST: Final = 6
"""Earlier commands that are kept,"""
BYTES: Final = 6000
"""in so many letters of JSON."""
_NAMED: Final = 20
"""Adapters that are named."""


def history_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file's metadata says of how loratool made it; nothing where it says nothing that can be read."""
    try:
        document = json.loads(metadata.get(HISTORY_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def history_steps(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """What was done to a file, the last command first."""
    newest = history_of(metadata)
    before = newest.pop("before", [])
    older = before if isinstance(before, list) else [before]
    return [step for step in (newest, *older) if isinstance(step, dict) and step.get("command")]


def input_record(path: Path, file: AdapterFile | None, **said: object) -> dict[str, object]:
    """An input by its name, and by its hash where it was read from a file."""
    return {"name": _name(path)[:100], "autov3": file and short_hash(file), **said}


def _name(path: Path) -> str:
    """The file's or folder's, or for a folder in the hub's cache, whose own name is a commit, the repository's."""
    repository = path.parent.parent.name
    return repository.removeprefix("models--").replace("--", "/") if path.parent.name == "snapshots" else path.name


def history_entry(
    command: str, adapters: Iterable[Mapping[str, object]], metadata: Mapping[str, str], **said: object
) -> dict[str, str]:
    """The metadata that tells of `command`, done to `adapters` (see `input_record`), to which what is changed says
    `metadata`."""
    document: dict[str, Any] = {"version": __version__, "command": command}
    made_of = list(adapters)[:_NAMED]
    document |= ({"adapters": made_of} if made_of else {}) | said
    before = [without_module_lists(step) for step in history_steps(metadata)[:_MOST]]
    while before and len(json.dumps(before)) > BYTES:
        before.pop()
    return {HISTORY_KEY: json.dumps(document | ({"before": before} if before else {}))}


def without_module_lists(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step without what it says of single modules."""
    return {key: value for key, value in step.items() if key not in ("modules", "left_out", "columns")}
