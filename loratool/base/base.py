"""A checkpoint's weights by module, under whatever name another file has for the module, read one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from loratool.deltas.schema import WEIGHT
from loratool.errors import LoratoolError
from loratool.files.layout import Layout
from loratool.files.paths import path_of
from loratool.files.tensors import Checkpoint
from loratool.keys.places import WeightIndex
from loratool.keys.rows import WeightRows
from loratool.names import Module


class BaseCheckpoint:
    """The checkpoint at `path`, and `targets`, the places of its modules.

    With `pinned`, weights are read into memory that a GPU copies from while it computes.
    """

    def __init__(self, path: Path | Layout) -> None:
        self.checkpoint = Checkpoint(path)
        self.layout = self.checkpoint.layout
        self.targets = WeightIndex(self.layout)

    def of(self, module: Module, parameter: str = WEIGHT, *, pinned: bool = False) -> Tensor:
        """The module's weight, (out, in, *kernel), or its bias; raises `LoratoolError` where there is none."""
        return self.at(self._places(module, parameter), pinned=pinned)

    def shape_of(self, module: Module, parameter: str = WEIGHT) -> tuple[int, ...]:
        """The shape of what `of` reads, from the header alone."""
        return self.shape(self._places(module, parameter))

    def _places(self, module: Module, parameter: str) -> tuple[WeightRows, ...]:
        """The places of a parameter; raises `LoratoolError` where the checkpoint has none."""
        places = self.targets.find_twin(module, parameter)
        if not places:
            raise LoratoolError(f"{module}: has no {parameter} in {self.layout.root}")
        return places

    def at(self, places: Sequence[WeightRows], *, pinned: bool = False) -> Tensor:
        """The rows at all of `places`, one below the other."""
        return _join([self._part(place, 0, place.rows, pinned=pinned) for place in places])

    def rows(self, places: Sequence[WeightRows], start: int, stop: int, *, pinned: bool = False) -> Tensor:
        """Rows `start` to `stop` of what `at` returns for `places`, or fewer where these end before; no others are read."""
        parts, first = [], 0
        for place in places:
            low, high = max(start - first, 0), min(stop - first, place.rows)
            if low < high:
                parts.append(self._part(place, low, high, pinned=pinned))
            first += place.rows
        # Without a row in this range, an empty tensor of the right width and dtype.
        return _join(parts) if parts else self._part(places[-1], 0, 0, pinned=pinned)

    def by_rows(self, places: Sequence[WeightRows]) -> bool:
        """Whether the rows of `places` lie together in the files, so that some can be read without the rest."""
        return all(not place.transposed and place.step == 1 and place.expert is None for place in places)

    def _part(self, place: WeightRows, start: int, stop: int, *, pinned: bool) -> Tensor:
        """Rows `start` to `stop` of one place, counted from its first. Where rows lie apart, all of the tensor is read, or
        of the expert's matrix."""
        if self.by_rows([place]):
            return self.checkpoint.rows(place.tensor, place.start + start, place.start + stop, pinned=pinned)
        stored = (
            self.checkpoint.tensor(place.tensor, pinned=pinned)
            if place.expert is None
            else self.checkpoint.rows(place.tensor, place.expert, place.expert + 1, pinned=pinned)[0]
        )
        rows = (stored.T if place.transposed else stored)[place.start : place.stop : place.step]
        return rows[start:stop].contiguous()

    def shape(self, places: Sequence[WeightRows]) -> tuple[int, ...]:
        """The shape of what lies at `places`: (out, in, *kernel) for a weight."""
        shape = places[0].matrix_of(self.layout.info(places[0].tensor).shape)
        if not shape:
            return ()
        # A transposed weight (GPT-2's Conv1D) is stored as (in, out).
        inner = shape[:1] if places[0].transposed else shape[1:]
        return (sum(place.rows for place in places), *inner)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def open_base(base: str | Path | BaseCheckpoint | None) -> BaseCheckpoint | None:
    """The checkpoint at a path, `base` itself where it is open already, or None for None. Raises `LoratoolError`."""
    if base is None or isinstance(base, BaseCheckpoint):
        return base
    return BaseCheckpoint(path_of(base))
