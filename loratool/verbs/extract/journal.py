"""The journal of an extraction: outcomes kept beside the output until it is complete, so that a run can be resumed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Final

from safetensors.torch import save_file

from loratool.deltas.registry import class_of
from loratool.deltas.schema import Given
from loratool.errors import OutputError
from loratool.files.header import read_header
from loratool.files.tensors import TensorFile
from loratool.verbs.extract.outcomes import ExtractedModule, Outcome

SUFFIX: Final = ".partial"
JOB: Final = "job.json"


class Journal:
    """The folder of one job's outcomes: those of an earlier run of the same `job`, if there was one, and those of this run.

    `job` is all that outcomes depend on; a folder of another job is emptied. Raises `OutputError` where the folder is not
    one that a journal made.
    """

    def __init__(self, out: Path, job: str) -> None:
        self.folder = out.with_name(out.name + SUFFIX)
        said = self.folder / JOB
        # An empty folder is what a run leaves that was killed before it said what it does.
        if self.folder.exists() and not said.is_file() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise OutputError(
                f"{self.folder}: exists and is not what an extraction left behind; move it, or choose another OUT"
            )
        if not said.is_file() or said.read_text() != job:
            self.discard()
            self.folder.mkdir(exist_ok=True)
            said.write_text(job)

    def get(self, key: str) -> Outcome | None:
        """The outcome kept under `key`; None where there is none."""
        path = self._path(key)
        if not path.exists():
            return None
        header = read_header(path)
        with TensorFile(header) as file:
            tensors = {name: file.read(info) for name, info in header.tensors.items()}
        said = json.loads(header.metadata["outcome"])
        kind, rank = said.pop("kind"), said["figures"]["rank"]
        # Scale and rank are not in the tensors: stacked experts cannot tell their number from their rank.
        given = Given(scale=said["scale"], rank=rank)
        delta = class_of(kind).from_leaves(tensors, given) if kind else None
        return Outcome(delta, ExtractedModule(**said["figures"]))

    def put(self, key: str, outcome: Outcome) -> None:
        """Keeps an outcome under `key`, wholly or not at all."""
        delta, path = outcome.delta, self._path(key)
        said = {
            "kind": delta.kind if delta else "",
            "scale": delta.scale if delta else None,
            "figures": asdict(outcome.figures),
        }
        # safetensors refuses tensors that are not contiguous, such as transposed factors.
        tensors = {name: tensor.contiguous() for name, tensor in delta.leaves().items()} if delta else {}
        beside = path.with_suffix(".tmp")
        save_file(tensors, beside, {"outcome": json.dumps(said)})
        # POSIX renames in one step: a file under this name is always whole.
        os.replace(beside, path)

    def discard(self) -> None:
        """Removes the folder and all outcomes in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
