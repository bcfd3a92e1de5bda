"""Restores the base of a merge to the bit, from the merged checkpoint and the headers and residuals of an undo file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from loratool.adapter.load import load
from loratool.errors import InvalidFile, LoratoolError, error_context, first_few
from loratool.files.header import TensorInfo
from loratool.files.layout import Layout, open_layout
from loratool.files.output import NewOutput
from loratool.files.tensors import TensorFile, tensor_bytes
from loratool.files.transaction import remove
from loratool.files.writer import Writer, copy_file
from loratool.numbers.residuals import unpack_residual
from loratool.numbers.threads import Progress, map_on_threads, progress_counter, run_all
from loratool.verbs.merge.added import PlannedChange, rows_of
from loratool.verbs.merge.blocks import RowsJob, by_blocks
from loratool.verbs.merge.plan import MergeInput, Plan, TensorPlan, make_plan
from loratool.verbs.merge.segments import matrix_shape
from loratool.verbs.merge.undo_file import UndoRecord, read_undo, sha256


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What was written: the plan of the undone merge, its adapters, and the SHA-256 of each file that the merge rewrote."""

    plan: Plan
    adapters: tuple[tuple[str, float], ...]
    sha256: Mapping[str, str]
    nbytes: int


def restore_base(merged: Path, out: Path, undo_path: Path, *, overwrite: bool, progress: Progress | None) -> RestoreResult:
    """Writes to `out` the base that the checkpoint `merged` was made of.

    Raises `LoratoolError`, and leaves nothing behind, where the undo file is of another checkpoint.
    """
    undo, layout = read_undo(undo_path), open_layout(merged)
    if ("" in undo.files) == layout.is_folder or (not layout.is_folder and undo.names("file/")):
        kind = "one file" if "" in undo.files else "a folder"
        raise InvalidFile(f"{undo_path}: is of a merge into {kind}, {merged} is not")
    lacking = [name for name in undo.files if name not in layout.files]
    if lacking:
        raise InvalidFile(
            f"{undo_path}: is of a checkpoint with the files {first_few(lacking)}, which {merged} does not have: it is of "
            "another checkpoint, or one that was saved anew in other files"
        )
    nbytes = sum(size for size, _ in undo.files.values())
    with ExitStack() as stack:
        kept = stack.enter_context(TensorFile(undo.header))
        output = stack.enter_context(
            NewOutput(
                out,
                folder=layout.is_folder,
                overwrite=overwrite,
                nbytes=nbytes,
                inputs=[layout, undo.header],
                written=[*layout.files, *layout.indexes, *layout.other_files(), *undo.files, *undo.names("file/")],
            )
        )
        # First what the merge did not compute: other files, configs, and the headers of the files to restore.
        _copy_others(layout, undo, kept, output)
        writers = {file: stack.enter_context(_begin_file(file, layout, undo, kept, output)) for file in undo.files}
        adapters = stack.enter_context(_adapters(undo, kept, output.scratch()))
        # With headers and configs in place, the output has the layout of the base though no tensor is there yet: the plan
        # of the merge can be made again. A module without a target now had none in the merge, which was allowed then.
        with error_context(undo_path):
            plan = make_plan(open_layout(output.temporary), adapters, dtype=undo.dtype, allow_unmatched=True)
        # Then the tensors, and only if every hash is the base's does the output take its place.
        _fill(RestoreRun(plan, layout, undo, kept, writers), progress)
        digests = _check_hashes(merged, undo, output)
        output.commit()
    pairs = tuple((held.name, held.strength.value) for held in undo.adapters)
    return RestoreResult(plan, pairs, digests, nbytes)


def _check_hashes(merged: Path, undo: UndoRecord, output: NewOutput) -> dict[str, str]:
    """The SHA-256 of each restored file; raises `LoratoolError` where one is not that of the base's file."""
    digests = dict(zip(undo.files, map_on_threads(partial(sha256, output.path(file)) for file in undo.files), strict=True))
    for file, digest in digests.items():
        wanted = undo.files[file][1]
        if digest != wanted:
            raise LoratoolError(
                f"{merged}: does not lead back to the base: {file or 'it'} gets SHA-256 {digest}, the base had {wanted}, "
                f"so it is not the checkpoint that {undo.header.path} was written with, or was changed since"
            )
    return digests


def _copy_others(layout: Layout, undo: UndoRecord, kept: TensorFile, output: NewOutput) -> None:
    """Copies the files that the merge only copied, and from the undo file the configs that the merge may have rewritten."""
    for name in layout.other_files():
        copy_file(layout.root / name, output.path(name))
    for name, header in layout.files.items():
        if name not in undo.files:
            copy_file(header.path, output.path(name))
    for name, info in undo.names("file/").items():
        path = output.path(name)
        path.unlink(missing_ok=True)
        with Writer(path, 0) as writer:
            writer.copy(kept.descriptor, info.start, info.nbytes, 0)


def _begin_file(file: str, merged: Layout, undo: UndoRecord, kept: TensorFile, output: NewOutput) -> Writer:
    """A file of the base with its header, and room for its tensors; raises `InvalidFile` where the undo file lacks it."""
    header = undo.header.tensors.get(f"header/{file}")
    if header is None:
        raise InvalidFile(f"{undo.header.path}: lacks the header of {file}")
    size, merged_size = undo.files[file][0], merged.files[file].size
    # A damaged undo file may say any size. A merge changes dtypes at most to ones of a fourth of the bytes or of four times
    # as many, and shapes by a few rows.
    if not header.nbytes <= size <= 16 * merged_size + (1 << 30):
        raise InvalidFile(
            f"{undo.header.path}: says that {file or 'the base'} had {size} bytes; the merged file has {merged_size}"
        )
    writer = Writer(output.path(file), size)
    writer.copy(kept.descriptor, header.start, header.nbytes, 0)
    return writer


@contextmanager
def _adapters(undo: UndoRecord, kept: TensorFile, place: Path) -> Iterator[list[MergeInput]]:
    """The adapters that an undo file holds, unpacked to the temporary folder `place` that is removed at the end."""
    try:
        found = []
        for number, held in enumerate(undo.adapters):
            for name, info in undo.names(f"adapter/{number}/").items():
                # A name with a folder in it could lead out of the temporary one.
                if Path(name).name != name:
                    raise InvalidFile(f"{undo.header.path}: holds an adapter's file called {name}")
                path = place / str(number) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with Writer(path, info.nbytes) as writer:
                    writer.copy(kept.descriptor, info.start, info.nbytes, 0)
            files = sorted((place / str(number)).glob("*"))
            if not files:
                raise InvalidFile(f"{undo.header.path}: lacks its adapter {number + 1}")
            with error_context(undo.header.path):
                adapter = load(files[0].parent if held.folder else files[0], assume=held.assume)
                found.append(MergeInput(adapter, held.strength, held.selection))
        yield found
    finally:
        remove(place)


@dataclass(frozen=True, slots=True)
class RestoreRun:
    """The plan of the undone merge, the merged checkpoint, the undo file, open as `kept`, and a writer for each file."""

    plan: Plan
    merged: Layout
    undo: UndoRecord
    kept: TensorFile
    writers: Mapping[str, Writer]

    def pieces(self, stack: ExitStack) -> Iterator[Callable[[], int]]:
        """The work on each tensor of the files that the merge rewrote; each piece returns the bytes it wrote."""
        opened = {file: stack.enter_context(TensorFile(self.merged.files[file])) for file in self.writers}
        kept = self.undo.starts()
        for tensor in self.plan.tensors.values():
            # A head that the merge untied is in no file of the base.
            if tensor.file not in self.writers or tensor.name not in self.plan.layout.tensors:
                continue
            info = self._merged_rows(tensor)
            if not tensor.is_touched:
                yield partial(self._copy, tensor, info, opened[tensor.file])
                continue
            added, starts = PlannedChange(tensor), kept.get(tensor.name, [])
            if tensor.source.nbytes and starts[:1] != [0]:
                raise InvalidFile(f"{self.undo.header.path}: holds nothing of {tensor.name}")
            # The pieces are those in which the undo file was written, which need not be those of a merge today.
            rows = matrix_shape(tensor.shape)[0]
            if starts and starts[-1] >= max(rows, 1):
                raise InvalidFile(f"{self.undo.header.path}: holds row {starts[-1]} of {tensor.name}, which has {rows}")
            for start, stop in pairwise([*starts, rows]):
                job = RowsJob(tensor, opened[tensor.file], self.writers[tensor.file], 0, (), start, stop, by_blocks(tensor))
                yield partial(self._undo, job, info, added)

    def _merged_rows(self, tensor: TensorPlan) -> TensorInfo:
        """The header entry of a tensor in the merged checkpoint; raises `InvalidFile` unless it is what the merge made."""
        _, info = self.merged.tensors.get(tensor.name, (None, None))
        if info is None or (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            there = f"is {info.dtype} {list(info.shape)}" if info else "is not there"
            raise InvalidFile(
                f"{self.merged.root}: {tensor.name} {there}, the merge of {self.undo.header.path} made it "
                f"{tensor.dtype} {list(tensor.shape)}: it is of another checkpoint"
            )
        return info

    def _copy(self, tensor: TensorPlan, info: TensorInfo, source: TensorFile) -> int:
        """Copies a tensor that the merge did not change."""
        self.writers[tensor.file].copy(source.descriptor, info.start, info.nbytes, tensor.source.start)
        return info.nbytes

    def _undo(self, job: RowsJob, info: TensorInfo, added: PlannedChange) -> int:
        """Restores the rows of a job: the guess that `PlannedChange` makes from the merged rows, and the residual to it."""
        guess = added.taken_from(rows_of(job, info), job.start)
        kept = self.undo.header.tensors[f"rows/{job.tensor.name}/{job.start}"]
        raw = torch.empty(kept.nbytes, dtype=torch.uint8)
        self.kept.read_into(tensor_bytes(raw), kept.start)
        with error_context(f"{self.undo.header.path}: {kept.name}"):
            base = unpack_residual(raw.numpy().tobytes(), guess)
        # The base's row may be of other bytes than the merged one: the merge may have changed dtype or shape.
        row = job.tensor.source.nbytes // max(matrix_shape(job.tensor.source.shape)[0], 1)
        job.target.write(tensor_bytes(base), job.tensor.source.start + job.start * row)
        return base.numel() * base.element_size()


def _fill(work: RestoreRun, progress: Progress | None) -> None:
    """Runs all the work on a few threads."""
    add = progress_counter(sum(tensor.source.nbytes for tensor in work.plan.tensors.values()), progress)
    with ExitStack() as stack:
        run_all(work.pieces(stack), lambda index, nbytes: add(nbytes), threading.Event())
