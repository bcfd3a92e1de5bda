"""Where in a network an adapter acts: ‖ΔW‖ by block and by the names of modules inside a block."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loratool.adapter.adapter import Adapter
from loratool.adapter.strengths import architecture_of
from loratool.archs import Arch
from loratool.archs.blocks import block_of
from loratool.deltas.relations import norm_of
from loratool.names import Module
from loratool.numbers.settings import steady_arithmetic
from loratool.text import natural

REPEATED: Final = re.compile(r".*\b(?:\w*blocks?|layers?|resnets|attentions|h|refiner)\.\d+\.")
"""The part of a path up to its last numbered block: behind that stands the name that blocks of one sort share."""


@dataclass(frozen=True, slots=True)
class BlockMap:
    """‖ΔW‖ of each block (`rows`) and sort of module (`columns`); None where there is no such module. `unmeasured` counts
    the changes whose norm only the base could tell."""

    arch: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    unmeasured: int

    @property
    def largest(self) -> float:
        return max((cell for row in self.cells for cell in row if cell is not None), default=0.0)


def sort_of(arch: Arch, module: Module) -> str:
    """The name of a module inside its block, such as attn1.to_q."""
    # diffusers' names are the finest: a fused q, k, v stands under the name of its first part.
    places = arch.readings_of(module)
    path = places[0][1].parts[0] if places else module.path
    found = REPEATED.match(path)
    return path[found.end() :] if found else path


@steady_arithmetic()
def block_map(adapter: Adapter) -> BlockMap:
    """The map of an adapter, computed from its factors; raises `LoratoolError` where they make up no delta."""
    modules = adapter.modules
    arch = architecture_of(adapter, modules)
    squares: dict[tuple[str, str], float] = {}
    unmeasured = 0
    for change in adapter.changes:
        norm = norm_of(change.delta) if change.delta.additive and not change.per_expert else None
        if norm is None:
            unmeasured += 1
            continue
        # Squares add up over the modules of a cell; the root is taken once all are in.
        cell = block_of(arch, change.module), sort_of(arch, change.module)
        squares[cell] = squares.get(cell, 0.0) + norm**2
    return _lay_out(arch.title, squares, unmeasured)


def _lay_out(arch: str, squares: Mapping[tuple[str, str], float], unmeasured: int) -> BlockMap:
    rows = tuple(sorted({row for row, _ in squares}, key=natural))
    columns = tuple(sorted({column for _, column in squares}))
    cells = tuple(
        tuple(math.sqrt(squares[row, column]) if (row, column) in squares else None for column in columns) for row in rows
    )
    return BlockMap(arch, rows, columns, cells, unmeasured)
