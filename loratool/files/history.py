"""Histories: what loratool writes into its outputs about where they come from, and reads from them again. No torch.

One JSON object: version, command, what was asked for and what it cost, the adapters that went in, with the first letters
of their AutoV3, and `before`: the earlier commands, from the input's own history. Without times or paths, so that equal runs
write equal bytes.
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
"""The metadata key of a history."""
LONGEST_NAME: Final = 100
"""Letters of an input's name."""
_MOST: Final = 6
"""How many earlier commands a history keeps at most."""
BYTES: Final = 6000
"""How many letters of JSON these may take, so that metadata does not grow with every command."""
_NAMED: Final = 20
"""How many of the adapters that went in are named."""


def history_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The history in a file's metadata; empty where there is none, or none that can be read."""
    try:
        document = json.loads(metadata.get(HISTORY_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def history_steps(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The commands that were done to a file, the last one first."""
    newest = history_of(metadata)
    # Metadata is a stranger's: whatever is not shaped like a step is passed over.
    before = newest.pop("before", [])
    older = before if isinstance(before, list) else [before]
    return [step for step in (newest, *older) if isinstance(step, dict) and step.get("command")]


def input_record(path: Path, file: AdapterFile | None, **said: object) -> dict[str, object]:
    """The entry of an input in a history: its name, and its hash where it was read from a file."""
    return {"name": input_name(path), "autov3": file and short_hash(file), **said}


def input_name(path: Path) -> str:
    """The name of a file or folder, as a history keeps it; of a folder in the hub's cache, whose own name is a commit, that
    of the repository."""
    # The cache's layout is models--ORG--NAME/snapshots/COMMIT (huggingface_hub).
    repository = path.parent.parent.name
    name = repository.removeprefix("models--").replace("--", "/") if path.parent.name == "snapshots" else path.name
    return name[:LONGEST_NAME]


def history_entry(
    command: str, adapters: Iterable[Mapping[str, object]], metadata: Mapping[str, str], **said: object
) -> dict[str, str]:
    """The metadata that tells of `command`, done to `adapters` (see `input_record`); `metadata` is that of the file that was
    changed, whose history goes on in it."""
    document: dict[str, Any] = {"version": __version__, "command": command}
    made_of = list(adapters)[:_NAMED]
    document |= ({"adapters": made_of} if made_of else {}) | said
    # To stay short, earlier commands lose their lists of modules first, then the oldest of them go.
    before = [without_module_lists(step) for step in history_steps(metadata)[:_MOST]]
    while before and len(json.dumps(before)) > BYTES:
        before.pop()
    return {HISTORY_KEY: json.dumps(document | ({"before": before} if before else {}))}


def without_module_lists(step: Mapping[str, Any]) -> dict[str, Any]:
    """The step of a history without its lists of single modules."""
    return {key: value for key, value in step.items() if key not in ("modules", "left_out", "columns")}
