"""Where in a network an adapter acts: ‖ΔW‖ by block and by what its modules are called there."""

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
from loratool.text import natural

REPEATED: Final = re.compile(r".*\b(?:\w*blocks?|layers?|resnets|attentions|h|refiner)\.\d+\.")
"""What stands before the name that a module has in every block of its sort."""


@dataclass(frozen=True, slots=True)
class BlockMap:
    """‖ΔW‖ of each block (`rows`) and sort of module (`columns`); None where there is no such module. What no factor tells
    the norm of without a base is counted as `unmeasured`."""

    arch: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    unmeasured: int

    @property
    def largest(self) -> float:
        return max((cell for row in self.cells for cell in row if cell is not None), default=0.0)


def sort_of(arch: Arch, module: Module) -> str:
    """What a module is called in each block that has one like it: attn1.to_q."""
    places = arch.readings_of(module)
    path = places[0][1].parts[0] if places else module.path
    found = REPEATED.match(path)
    return path[found.end() :] if found else path


def block_map(adapter: Adapter) -> BlockMap:
    """The map of an adapter, from its factors; raises `LoratoolError`."""
    modules = adapter.modules
    arch = architecture_of(adapter, modules)
    squares: dict[tuple[str, str], float] = {}
    unmeasured = 0
    for change in adapter.changes:
        norm = norm_of(change.delta) if change.delta.additive and not change.per_expert else None
        if norm is None:
            unmeasured += 1
            continue
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
