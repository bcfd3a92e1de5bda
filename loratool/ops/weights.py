"""A checkpoint's weights by what a module of another file calls them, read one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from loratool.checkpoint import Checkpoint
from loratool.errors import LoratoolError
from loratool.names import Module
from loratool.schema import WEIGHT
from loratool.targets import Place, Targets


class Weights:
    """The checkpoint at `path`, with the places of its modules."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint(path)
        self.layout = self.checkpoint.layout
        self.targets = Targets(self.layout)

    def of(self, module: Module) -> Tensor:
        """The module's weight, (out, in, *kernel); raises `LoratoolError` where there is none."""
        places = self.targets.find(module, WEIGHT)
        if not places:
            raise LoratoolError(f"{module}: has no weight in {self.layout.root}")
        return self.at(places)

    def at(self, places: Sequence[Place]) -> Tensor:
        """What lies at `places`, one below the other; only those rows are read where they lie together."""
        rows = [self._rows(place) for place in places]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _rows(self, place: Place) -> Tensor:
        if place.transposed:
            return self.checkpoint[place.tensor].T[place.start : place.stop : place.step]
        return self.checkpoint.rows(place.tensor, place.start, place.stop)[:: place.step]

    def shape(self, places: Sequence[Place]) -> tuple[int, ...]:
        """The shape of what lies at `places`: (out, in, *kernel) for a weight."""
        shape = self.layout.info(places[0].tensor).shape
        if not shape:
            return ()
        inner = shape[:1] if places[0].transposed else shape[1:]
        return (sum(place.rows for place in places), *inner)
