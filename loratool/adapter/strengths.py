"""How strongly each module of an adapter is to count: one number for all, and factors for components and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite

from loratool.adapter.adapter import Adapter
from loratool.archs import Arch, arch_named
from loratool.archs.blocks import LENGTHS, block_of, weighted
from loratool.errors import LoratoolError
from loratool.keys.identify import archs_of_adapters
from loratool.keys.routes import without_table
from loratool.names import COMPONENTS, WHOLE, Module


@dataclass(frozen=True, slots=True)
class Strength:
    """`value`, times the weight of the module's block in `vector` (12, 17, 20 or 26 numbers, `archs.blocks`), times that of
    each of `parts` that has it: a component (unet, te1, te2, te3, model), or a glob of blocks (IN04, OUT*).

    Raises `LoratoolError` where a number is not finite.
    """

    value: float = 1.0
    vector: tuple[float, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number in (self.value, *self.vector, *self.parts.values()):
            if not isfinite(number):
                raise LoratoolError(f"strength {number} is not a finite number")

    def of(self, modules: Iterable[Module], arch: Arch) -> dict[Module, float]:
        """The strength of each module; raises `LoratoolError` where the architecture has no such vector, and where one of
        `parts` is that of no module."""
        by_block = weighted(self.vector, arch) if self.vector else {}
        found, used = {}, set()
        for module in modules:
            block, strength = block_of(arch, module), self.value
            strength *= by_block.get(block, 1.0)
            for part, factor in self.parts.items():
                if _is_part(part, module, block):
                    used.add(part)
                    strength *= factor
            found[module] = strength
        if missing := sorted(self.parts.keys() - used):
            raise LoratoolError(f"{', '.join(missing)}: no module is of such a component or block")
        return found

    def unnamed(self, modules: Iterable[Module], arch: Arch) -> list[Module]:
        """Modules in blocks that the vector has no number for."""
        by_block = weighted(self.vector, arch) if self.vector else {}
        return [module for module in modules if by_block and block_of(arch, module) not in by_block]


def _is_part(part: str, module: Module, block: str) -> bool:
    if part in (*COMPONENTS, "model"):
        return part == (module.component if module.component != WHOLE else "model")
    return fnmatchcase(block, part)


def architecture(adapter: Adapter, modules: Sequence[Module], name: str | None = None, length: int = 0) -> Arch:
    """The architecture that blocks are named by: the one asked for, else one that explains all modules. Of look-alikes,
    which have the same blocks, it is one that has a vector of `length` block weights."""
    if name:
        return arch_named(name)
    found = archs_of_adapters([adapter.keys]) or [without_table(modules)]
    return next((arch for arch in found if length in LENGTHS.get(arch.name, ())), found[0])
