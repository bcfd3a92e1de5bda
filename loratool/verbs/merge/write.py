"""The writing of a planned merge: configs, copied files, computed files, and the undo file."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loratool.adapter.adapter import Assumptions, files_of
from loratool.adapter.load import open_source
from loratool.adapter.selection import Selection
from loratool.adapter.strengths import AdapterLike, weighted_adapters
from loratool.errors import OutputError, error_in_file
from loratool.files.header import stored_dtype
from loratool.files.history import HISTORY_KEY, history_entry, history_of, input_record
from loratool.files.in_place import InPlaceOutput
from loratool.files.output import Destination, Input, NewOutput, commit_together
from loratool.files.writer import copy_file
from loratool.numbers.devices import DevicePool
from loratool.numbers.threads import Progress
from loratool.verbs.merge.blocks import Rounding, RoundingStats
from loratool.verbs.merge.files import PROVENANCE_BYTES, AfterJob, OutputFile, rewritten_files, run_files
from loratool.verbs.merge.plan import MergeInput, Plan
from loratool.verbs.merge.undo_file import UndoWriter


def open_inputs(
    adapters: Sequence[AdapterLike],
    selection: Selection | None = None,
    assume: Assumptions | None = None,
    *,
    allow_pickle: bool = False,
) -> list[MergeInput]:
    """The adapters, read or already open, as inputs of a merge; raises `LoratoolError`."""
    selection, assume = selection or Selection(), assume or Assumptions()
    found = []
    for each in weighted_adapters(adapters):
        adapter = open_source(each.adapter, allow_pickle=allow_pickle, assume=assume)
        found.append(MergeInput(adapter, each.full_strength, selection))
    return found


@dataclass(frozen=True, slots=True)
class MergeRun:
    """A planned merge, ready to be written: the dtype and rounding of its results, and the place of the `undo` file."""

    plan: Plan
    merged: Sequence[MergeInput]
    devices: DevicePool
    command: str = "merge"
    dtype: str | None = None
    rounding: Rounding = field(default_factory=Rounding)
    undo: Path | None = None
    overwrite: bool = False
    follow: AfterJob | None = None

    def write(self, target: Path | None, progress: Progress | None) -> tuple[RoundingStats, tuple[str, ...], int | None]:
        """Writes the output to `target`, or with None into the base itself.

        Returns what was measured, warnings for the report, and the size of the undo file, None where none was asked for.
        """
        plan, rewritten = self.plan, rewritten_files(self.plan)
        with ExitStack() as stack:
            # Open both outputs before any work, so that a place that cannot be written is met at once.
            undo = None
            if self.undo:
                dtype = stored_dtype(self.dtype)
                _require_apart(self.undo, target)
                undo = stack.enter_context(UndoWriter(self.undo, plan, self.merged, dtype, overwrite=self.overwrite))
            output = self._output(target) if target else InPlaceOutput(plan.layout.root, rewritten, self._inputs())
            stack.enter_context(output)
            if not output.in_place:
                self._copy(output, rewritten)
            # Compute. Leaving this block closes the files, and checks that no source was changed while it was read.
            with ExitStack() as opened:
                follow = undo.follow if undo else self.follow
                # In the metadata an entry is a string of JSON inside of JSON, in which every quote takes two letters.
                records = [_record(each) for each in self.merged]
                room = PROVENANCE_BYTES + len(json.dumps(json.dumps(records)))
                files = [
                    OutputFile(plan, file, tensors, output.path(file), opened, room, in_place=output.in_place, follow=follow)
                    for file, tensors in rewritten.items()
                ]
                adapters = ", ".join(str(each.adapter.path) for each in self.merged)
                with error_in_file(f"{adapters} into {plan.layout.root}"):
                    measure = run_files(files, self.rounding, self.devices, progress)
                provenance = _provenance(self.command, self.merged, self._base_history(), self.rounding, measure)
                silent = [file for file in files if not file.finish(provenance)]
            # The undo file hashes the base, which an output in place is about to replace. Both take their places together,
            # so that there is never an output without its way back, nor a way back without its output.
            nbytes = undo.finish(list(rewritten)) if undo else None
            commit_together([undo.output, output] if undo else [output])
        root, no_room = plan.layout.root, "its header has no room to say what was merged into it; nothing else is missing"
        notes = [*([f"{root}: {no_room}"] if silent else []), *(() if output.in_place else plan.layout.notes())]
        return measure, (*notes, *self.devices.warnings()), nbytes

    def _base_history(self) -> Mapping[str, str]:
        """The metadata of the first of the base's files that has a history: its files agree on where they come from."""
        return next((header.metadata for header in self.plan.layout.files.values() if history_of(header.metadata)), {})

    def _output(self, target: Path) -> Destination:
        layout = self.plan.layout
        # Beside the tensors, a megabyte stands for headers and configs.
        needed = sum(tensor.nbytes for tensor in self.plan.tensors.values()) + (1 << 20)
        return NewOutput(
            target,
            folder=layout.is_folder,
            overwrite=self.overwrite,
            nbytes=needed,
            inputs=self._inputs(),
            written=[*layout.files, *layout.indexes, *layout.other_files(), "config.json"],
        )

    def _inputs(self) -> list[Input]:
        return [self.plan.layout, *files_of(each.adapter for each in self.merged)]

    def _copy(self, output: Destination, rewritten: Container[str]) -> None:
        """Copies the files that no tensor changes in, and writes the configs."""
        layout = self.plan.layout
        for name in layout.other_files():
            copy_file(layout.root / name, output.path(name))
        for name, header in layout.files.items():
            if name not in rewritten:
                copy_file(header.path, output.path(name))
        _write_configs(self.plan, output, self.dtype)


def _require_apart(undo: Path, target: Path | None) -> None:
    """Raises `OutputError` where the undo file would be the output, or lie in it, by whatever names they go."""
    # A file that is there lies where its folder is, whatever the path to that folder is called.
    place = Path(os.path.realpath(undo.parent), undo.name)
    out = target and Path(os.path.realpath(target.parent), target.name)
    same = target and target.exists() and undo.exists() and os.path.samefile(target, undo)
    if out and (same or place == out or out in place.parents or Path(os.path.realpath(out)) in place.parents):
        raise OutputError(f"{undo}: is, or lies in, the output of this very run; choose another place")


def _write_configs(plan: Plan, output: Destination, dtype: str | None) -> None:
    """Rewrites the copies of shard indexes and of config.json where the output's tensors differ from the base's."""
    layout = plan.layout
    added = {name: tensor.file for name, tensor in plan.tensors.items() if name not in layout.tensors}
    for name, index in layout.indexes.items():
        weight_map: Mapping[str, str] = index.document["weight_map"]
        mine = [tensor for tensor in plan.tensors.values() if tensor.file in _files_of(weight_map, name)]
        total = sum(tensor.nbytes for tensor in mine)
        if added or total != sum(tensor.source.nbytes for tensor in mine):
            # Hugging Face's index: each tensor's shard, and the bytes of all tensors.
            document = dict(index.document)
            document["weight_map"] = dict(sorted({**weight_map, **added}.items()))
            document["metadata"] = {**(document.get("metadata") or {}), "total_size": total}
            output.path(name).write_text(json.dumps(document, indent=2) + "\n")
    config = layout.config
    # transformers wrote `torch_dtype` before it wrote `dtype`.
    dtypes = {key: dtype for key in ("torch_dtype", "dtype") if dtype and key in config}
    if config and (plan.config or dtypes):
        output.path("config.json").write_text(json.dumps({**config, **plan.config, **dtypes}, indent=2) + "\n")


def _files_of(weight_map: Mapping[str, str], index: str) -> set[str]:
    """The files that a shard index names, relative to the checkpoint's root as the index's own name is."""
    folder = index.rpartition("/")[0]
    return {f"{folder}/{shard}" if folder else shard for shard in weight_map.values()}


def _provenance(
    command: str, merged: Sequence[MergeInput], base: Mapping[str, str], rounding: Rounding, measure: RoundingStats
) -> str:
    """The history entry for the output's metadata, as JSON: without times or paths, so that equal runs write equal bytes."""
    said = history_entry(
        command,
        [_record(each) for each in merged],
        base,
        round=f"stochastic, seed {rounding.seed}" if rounding.stochastic else "nearest",
        realised_strength=_figure(measure.along, measure.wanted),
        unchanged=_figure(measure.unchanged, measure.elements),
    )
    return said[HISTORY_KEY]


def _record(each: MergeInput) -> dict[str, object]:
    """An adapter's record in the history: its strength, and the factors of components and blocks where there are any."""
    strength = each.strength
    more = {"parts": dict(strength.parts), "blocks": strength.vector}
    return input_record(
        each.adapter.path,
        each.adapter.file,
        strength=strength.value,
        **{name: value for name, value in more.items() if value},
    )


def _figure(part: float, whole: float) -> float | None:
    """`part` / `whole` to six decimals; None where nothing was measured."""
    return round(part / whole, 6) if whole else None
