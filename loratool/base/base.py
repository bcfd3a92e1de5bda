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
from loratool.keys.places import WeightIndex, WeightRows
from loratool.names import Module


class BaseCheckpoint:
    """The checkpoint at `path`, and `targets`, the places of its modules."""

    def __init__(self, path: Path | Layout, *, pinned: bool = False) -> None:
        self.checkpoint = Checkpoint(path, pinned=pinned)
        self.layout = self.checkpoint.layout
        self.targets = WeightIndex(self.layout)

    def of(self, module: Module, parameter: str = WEIGHT) -> Tensor:
        """The module's weight, (out, in, *kernel), or its bias; raises `LoratoolError` where there is none."""
        return self.at(self._places(module, parameter))

    def shape_of(self, module: Module, parameter: str = WEIGHT) -> tuple[int, ...]:
        """The shape of what `of` reads, from the header alone."""
        return self.shape(self._places(module, parameter))

    def _places(self, module: Module, parameter: str) -> tuple[WeightRows, ...]:
        """The places of a parameter; raises `LoratoolError` where the checkpoint has none."""
        places = self.targets.find(module, parameter)
        if not places:
            raise LoratoolError(f"{module}: has no {parameter} in {self.layout.root}")
        return places

    def at(self, places: Sequence[WeightRows]) -> Tensor:
        """The rows at all of `places`, one below the other."""
        return _join([self._part(place, 0, place.rows) for place in places])

    def rows(self, places: Sequence[WeightRows], start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of what `at` returns for `places`, or fewer where these end before; no others are read."""
        parts, first = [], 0
        for place in places:
            low, high = max(start - first, 0), min(stop - first, place.rows)
            if low < high:
                parts.append(self._part(place, low, high))
            first += place.rows
        # Without a row in this range, an empty tensor of the right width and dtype.
        return _join(parts) if parts else self._part(places[-1], 0, 0)

    def by_rows(self, places: Sequence[WeightRows]) -> bool:
        """Whether the rows of `places` lie together in the files, so that some can be read without the rest."""
        return all(not place.transposed and place.step == 1 for place in places)

    def _part(self, place: WeightRows, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of one place, counted from its first; the whole tensor is read where rows lie apart."""
        if self.by_rows([place]):
            return self.checkpoint.rows(place.tensor, place.start + start, place.start + stop)
        stored = self.checkpoint[place.tensor]
        rows = (stored.T if place.transposed else stored)[place.start : place.stop : place.step]
        return rows[start:stop].contiguous()

    def shape(self, places: Sequence[WeightRows]) -> tuple[int, ...]:
        """The shape of what lies at `places`: (out, in, *kernel) for a weight."""
        shape = self.layout.info(places[0].tensor).shape
        if not shape:
            return ()
        # A transposed weight (GPT-2's Conv1D) is stored as (in, out).
        inner = shape[:1] if places[0].transposed else shape[1:]
        return (sum(place.rows for place in places), *inner)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def open_base(base: str | Path | BaseCheckpoint | None, *, pinned: bool = False) -> BaseCheckpoint | None:
    """The checkpoint at a path, `base` itself where it is open already, or None for None. Raises `LoratoolError`."""
    if base is None or isinstance(base, BaseCheckpoint):
        return base
    return BaseCheckpoint(path_of(base), pinned=pinned)
