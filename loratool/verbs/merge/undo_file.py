"""The undo file of a merge: with it the base is made again of the merged checkpoint, to the bit.

A safetensors file that holds the adapters as they were read, the headers of the base's files, and for each piece of each
changed tensor a residual: how far the base is from what subtracting the adapters gives. Most residuals are zero, since only
rounding makes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from loratool._version import __version__
from loratool.adapter.adapter import Adapter, Assumptions, files_of
from loratool.adapter.selection import Selection
from loratool.adapter.strengths import Strength
from loratool.errors import InvalidFile, LoratoolError, Unsupported, first_few
from loratool.files.adapter_files import AdapterFile
from loratool.files.header import STORED_DTYPES, Header, TensorInfo, read_header
from loratool.files.history import HISTORY_KEY
from loratool.files.output import Input, NewOutput
from loratool.files.strict_json import strict_json
from loratool.files.tensors import DTYPES, TensorFile, tensor_bytes
from loratool.files.transaction import decided_path
from loratool.files.writer import ENTRY_BYTES, SafetensorsAppender, TensorBytes, Writer
from loratool.numbers.residuals import pack_residual
from loratool.numbers.threads import map_on_threads
from loratool.verbs.merge import blocks
from loratool.verbs.merge.added import PlannedChange, rows_of
from loratool.verbs.merge.blocks import RowsJob
from loratool.verbs.merge.plan import MergeInput, Plan, TensorPlan
from loratool.verbs.merge.segments import matrix_shape

HASH_BYTES: Final = 8 << 20
"""Bytes of a file that are hashed at a time."""


class UndoWriter:
    """An undo file that is being written, in a `with`: pass each job of the merge to `follow`, then call `finish`."""

    def __init__(self, path: Path, plan: Plan, merged: Sequence[MergeInput], dtype: str | None, *, overwrite: bool) -> None:
        self.plan, self.merged, self.dtype = plan, merged, dtype
        # An adapter that has no file of safetensors is an error now, and not after the merge.
        for each in merged:
            _file_of(each.adapter)
        inputs: list[Input] = [plan.layout, *files_of(each.adapter for each in merged)]
        self.output = NewOutput(path, folder=False, overwrite=overwrite, nbytes=0, inputs=inputs)
        self._stack = ExitStack()
        self._numbers = count()
        # A safetensors header comes before its tensors, whose number and sizes are known only at the end: keep room for the
        # most that it can take. 4096 bytes are for what does not grow with the model.
        pieces = [tensor for tensor in plan.tensors.values() if tensor.is_touched]
        self._room = 4096 + sum(_most(tensor) * (len(json.dumps(tensor.name)) + ENTRY_BYTES) for tensor in pieces)
        # The metadata is JSON inside JSON: what is escaped in the inner one is escaped again in the outer one.
        self._room += sum(len(json.dumps(json.dumps(self._of(each)))) + 4 * ENTRY_BYTES for each in merged)
        # A file's name is once the name of a tensor, and once in the metadata, where escaping at most doubles it.
        self._room += sum(3 * len(json.dumps(file)) + 4 * ENTRY_BYTES for file in plan.layout.files)

    def __enter__(self) -> UndoWriter:
        output = self._stack.enter_context(self.output)
        self._file = SafetensorsAppender(self._stack.enter_context(Writer(output.path(""), 0)), self._room)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def follow(self, job: RowsJob, added: PlannedChange) -> Callable[[], None]:
        """Numbers a job, and returns what keeps its residual once the job is done: an `AfterJob`."""
        # A tensor that the merge adds, an untied head, has no base to lead back to.
        if job.tensor.name not in self.plan.layout.tensors:
            return lambda: None
        return partial(self._keep, next(self._numbers), job, added)

    def finish(self, files: Sequence[str]) -> int:
        """Writes everything but the residuals, `files` being the files that the merge rewrote, and returns the size.

        The undo file is complete then, and takes its place together with the output.
        """
        layout = self.plan.layout
        digests = map_on_threads(partial(sha256, layout.files[file].path) for file in files)
        of = dict(zip(files, digests, strict=True))
        for file in files:
            header = layout.files[file]
            with TensorFile(header) as source:
                self._file.copy(f"header/{file}", source.descriptor, header.data_start)
        # The indexes and the config that the merge may have rewritten; all other files are the same in its output.
        kept = {**layout.indexes, **({"config.json": layout.config_file} if layout.config_file else {})}
        for name, config in kept.items():
            self._file.append(_bytes(f"file/{name}", config.raw))
        for number, each in enumerate(self.merged):
            read = _file_of(each.adapter)
            with TensorFile(read.header) as source:
                self._file.copy(f"adapter/{number}/{read.weights.name}", source.descriptor, read.header.size)
            if read.config_file:
                self._file.append(_bytes(f"adapter/{number}/{read.config_file.path.name}", read.config_file.raw))
        document = {
            "version": __version__,
            "command": "undo",
            "dtype": self.dtype,
            "files": {file: {"sha256": of[file], "size": layout.files[file].size} for file in files},
            "adapters": [self._of(each) for each in self.merged],
        }
        return self._file.finish({HISTORY_KEY: json.dumps(document)})

    def _keep(self, number: int, job: RowsJob, added: PlannedChange) -> None:
        """Appends the residual of a job's rows, after those of all jobs numbered before."""
        base, merged = _rows(job)
        raw = pack_residual(base.flatten(), added.taken_from(merged, job.start))
        self._file.in_turn(number, [_bytes(f"rows/{job.tensor.name}/{job.start}", raw)])

    def _of(self, each: MergeInput) -> dict[str, Any]:
        """An adapter's entry in the metadata: what is needed to load it and to plan its merge again."""
        file, strength = _file_of(each.adapter), each.strength
        return {
            "name": each.adapter.path.name,
            "strength": strength.value,
            "include": list(each.selection.include),
            "exclude": list(each.selection.exclude),
            "components": dict(strength.parts),
            **({"blocks": list(strength.vector)} if strength.vector else {}),
            "alpha": each.adapter.assume.alpha,
            "slots": list(each.adapter.assume.slots),
            "folder": file.config_file is not None or file.path.is_dir(),
        }


def _file_of(adapter: Adapter) -> AdapterFile:
    """The safetensors file of an adapter, to be copied into the undo file; raises `Unsupported` where there is none."""
    if adapter.file is None:
        raise Unsupported(f"{adapter.path}: was not read from a file, as an undo file holds it; save it first")
    if adapter.file.is_pickle:
        raise Unsupported(f"{adapter.path}: is a pickle, which an undo file does not hold; convert it first")
    return adapter.file


def _bytes(name: str, raw: bytes) -> TensorBytes:
    """Bytes as a tensor: safetensors holds nothing else."""
    return TensorBytes(name, "U8", (len(raw),), raw)


def _most(tensor: TensorPlan) -> int:
    """The most jobs that a tensor is cut into."""
    return 1 + ceil(tensor.nbytes / blocks.TASK_BYTES)


def _rows(job: RowsJob) -> tuple[Tensor, Tensor]:
    """The rows of a job in the base, and as the merge wrote them."""
    tensor, columns = job.tensor, matrix_shape(job.tensor.shape)[1]
    merged = torch.empty(job.stop - job.start, columns, dtype=DTYPES[tensor.dtype])
    job.target.read_into(tensor_bytes(merged), job.offset + job.start * job.row_bytes)
    # A tensor that is changed whole may have had another shape in the base.
    return rows_of(job, tensor.source) if job.by_blocks else job.source.read(tensor.source), merged


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as model hubs show it."""
    with open(path, "rb", buffering=0) as file:
        digest, buffer = hashlib.sha256(), bytearray(HASH_BYTES)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class UndoAdapter:
    """An adapter in an undo file: its name, how it was merged, and whether it was a folder."""

    name: str
    strength: Strength
    selection: Selection
    assume: Assumptions
    folder: bool


@dataclass(frozen=True, slots=True)
class UndoRecord:
    """An undo file as it was read: the dtype of the merge, the base's files (size and SHA-256), and the adapters."""

    header: Header
    dtype: str | None
    files: Mapping[str, tuple[int, str]]
    adapters: tuple[UndoAdapter, ...]

    def starts(self) -> dict[str, list[int]]:
        """By tensor, the first row of each piece whose residual the file holds, in order."""
        found: dict[str, list[int]] = {}
        for name in self.names("rows/"):
            tensor, _, row = name.rpartition("/")
            # As the merge writes it: a row that is spelled otherwise would be looked for under another name.
            if row.isdecimal() and len(row) < 20 and str(int(row)) == row:
                found.setdefault(tensor, []).append(int(row))
        return {tensor: sorted(rows) for tensor, rows in found.items()}

    def names(self, prefix: str) -> dict[str, TensorInfo]:
        """The entries whose names begin with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): info for name, info in self.header.tensors.items() if name.startswith(prefix)}


def read_undo(path: Path) -> UndoRecord:
    """Reads and checks the header of an undo file; raises `InvalidFile`."""
    header = read_header(decided_path(path))
    try:
        document = strict_json(header.metadata.get(HISTORY_KEY, "{}").encode())
        if document.get("command") != "undo":
            raise InvalidFile(f"{path}: is not an undo file; `merge(undo=)` writes one")
        files = {name: (_size(facts["size"]), str(facts["sha256"])) for name, facts in document["files"].items()}
        adapters = tuple(_adapter(each) for each in document["adapters"])
        dtype = document.get("dtype")
        if dtype is not None and dtype not in STORED_DTYPES.values():
            raise InvalidFile(f"dtype {dtype!r}")
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, LoratoolError) as error:
        raise InvalidFile(f"{path}: is not an undo file that this version reads: {error}") from error
    undo = UndoRecord(header, dtype, files, adapters)
    if any(info.dtype != "U8" or len(info.shape) != 1 for info in header.tensors.values()):
        raise InvalidFile(f"{path}: is not an undo file that this version reads")
    # An undo file may come from anybody: no name in it may lead out of the output. "" is a checkpoint of one file.
    whole = set(files) == {""}
    unsafe = [
        name for name in (*files, *undo.names("file/"), *_adapter_files(undo)) if not (_inside(name) or (whole and not name))
    ]
    if unsafe:
        raise InvalidFile(f"{path}: would write {first_few(map(repr, unsafe))}, which does not lie in the output")
    return undo


def _adapter_files(undo: UndoRecord) -> Iterator[str]:
    """The names of the adapters' files, each in a folder of its number."""
    for number in range(len(undo.adapters)):
        yield from undo.names(f"adapter/{number}/")


def _inside(name: str) -> bool:
    """Whether a relative path stays below the folder that it is joined to."""
    # A backslash separates folders on Windows, and no POSIX path holds a NUL.
    return bool(name) and not {"", ".", ".."} & set(name.split("/")) and "\\" not in name and "\0" not in name


def _size(said: object) -> int:
    """The size of a file; raises `ValueError` for what no file has."""
    if type(said) is not int or not 8 <= said < 2**62:
        raise ValueError(f"a size of {said!r}")
    return said


def _adapter(said: Mapping[str, Any]) -> UndoAdapter:
    """An adapter of the metadata, which may be damaged: every value is converted, and what cannot be raises."""
    parts = {str(name): float(factor) for name, factor in said["components"].items()}
    strength = Strength(float(said["strength"]), tuple(map(float, said.get("blocks", ()))), parts)
    selection = Selection(tuple(map(str, said["include"])), tuple(map(str, said["exclude"])))
    alpha = None if said["alpha"] is None else float(said["alpha"])
    assume = Assumptions(alpha, tuple(map(bool, said["slots"])))
    return UndoAdapter(str(said["name"]), strength, selection, assume, bool(said["folder"]))
