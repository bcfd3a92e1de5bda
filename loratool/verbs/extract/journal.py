"""The journal of an extraction: outcomes kept beside the output until it is complete, so that a run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Final

from safetensors.torch import save_file

from loratool.deltas.registry import class_of
from loratool.deltas.schema import Given
from loratool.errors import OutputError
from loratool.files.header import read_header
from loratool.files.tensors import TensorFile
from loratool.files.transaction import sync
from loratool.verbs.extract.outcomes import ExtractedModule, Outcome

SUFFIX: Final = ".partial"
JOB: Final = "job.json"
MADE_BY: Final = "loratool extract, to resume"
"""What the job of a journal says of who made it."""
PIECE: Final = re.compile(r"[\w.+-]+\.[0-9a-f]{32}\.safetensors|[\w.+-]+\.tmp|\.tmp\w+")
"""The names of outcomes, which end in a digest of the file, and of outcomes that were not written to
their end: safetensors has a temporary name for them, too."""


class Journal:
    """The folder of one job's outcomes: those of an earlier run of the same `job`, if there was one, and those of this run.

    `job` is all that outcomes depend on; a folder of another job is emptied. Raises `OutputError` where the folder is not
    one that a journal made. An outcome counts only where its file has the digest that is in the file's name: whatever a
    power cut made of it is computed again.
    """

    def __init__(self, out: Path, job: str) -> None:
        self.folder = out.with_name(out.name + SUFFIX)
        said, document = self.folder / JOB, json.dumps({"made_by": MADE_BY, "job": job})
        if os.path.lexists(self.folder) and not self._is_ours():
            raise OutputError(
                f"{self.folder}: exists and is not what an extraction left behind; move it, or choose another OUT"
            )
        if not said.is_file() or said.read_bytes() != document.encode():
            self.discard()
            self.folder.mkdir(exist_ok=True)
            said.write_text(document)
            sync(said)
            sync(self.folder)

    def _is_ours(self) -> bool:
        """Whether there is nothing in the folder but what a journal puts there; a job that a power cut damaged says nothing
        against it."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            return False
        if not all(entry.name == JOB or PIECE.fullmatch(entry.name) for entry in self.folder.iterdir()):
            return False
        try:
            document = json.loads((self.folder / JOB).read_bytes())
        except (OSError, ValueError, RecursionError):
            return True
        return isinstance(document, dict) and document.get("made_by") == MADE_BY

    def get(self, key: str) -> Outcome | None:
        """The outcome kept under `key`; None where there is none, or none that is whole."""
        for path in sorted(self.folder.glob(f"{escape(key)}.*.safetensors")):
            if path.is_file() and not path.is_symlink() and path.name == f"{key}.{_digest(path)}.safetensors":
                return _read_outcome(path)
        return None

    def put(self, key: str, outcome: Outcome) -> None:
        """Keeps an outcome under `key`, wholly or not at all."""
        delta = outcome.delta
        said = {
            "kind": delta.kind if delta else "",
            "scale": delta.scale if delta else None,
            "figures": asdict(outcome.figures),
        }
        # safetensors refuses tensors that are not contiguous, such as transposed factors.
        tensors = {name: tensor.contiguous() for name, tensor in delta.leaves().items()} if delta else {}
        beside = self.folder / f"{key}.tmp"
        save_file(tensors, beside, {"outcome": json.dumps(said)})
        # The file's bytes before its name: a file under a name with its digest is whole, or is seen not to be.
        sync(beside)
        os.replace(beside, self.folder / f"{key}.{_digest(beside)}.safetensors")

    def discard(self) -> None:
        """Removes all outcomes, and the folder."""
        if self.folder.is_dir() and not self.folder.is_symlink():
            for entry in self.folder.iterdir():
                if entry.name == JOB or PIECE.fullmatch(entry.name):
                    entry.unlink()
            self.folder.rmdir()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _read_outcome(path: Path) -> Outcome:
    header = read_header(path)
    with TensorFile(header) as file:
        tensors = {name: file.read(info) for name, info in header.tensors.items()}
    said = json.loads(header.metadata["outcome"])
    kind, rank = said.pop("kind"), said["figures"]["rank"]
    # Scale and rank are not in the tensors: stacked experts cannot tell their number from their rank.
    given = Given(scale=said["scale"], rank=rank)
    delta = class_of(kind).from_leaves(tensors, given) if kind else None
    return Outcome(delta, ExtractedModule(**said["figures"]))
