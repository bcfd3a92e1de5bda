"""Strengths: how strongly each module of an adapter counts, by one number for all and factors for components and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Final

from loratool.adapter.adapter import Adapter
from loratool.archs import Arch, arch_named
from loratool.archs.blocks import VECTOR_LENGTHS, block_of, block_strengths
from loratool.errors import LoratoolError, error_context
from loratool.keys.identify import archs_of_adapters
from loratool.keys.routes import without_table
from loratool.names import COMPONENTS, WHOLE, Module


@dataclass(frozen=True, slots=True)
class Strength:
    """How strongly modules count: `value`, times the number of the module's block in `vector` (12, 17, 20 or 26 numbers,
    `archs.blocks`), times that of each of `parts` that the module is in: a component (unet, te1, te2, te3, model), or a
    glob of blocks (IN04, OUT*).

    Raises `LoratoolError` where a number is not finite.
    """

    value: float = 1.0
    vector: tuple[float, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def by_block(self) -> bool:
        """Whether a module's block says how strongly it counts."""
        return bool(self.vector) or any(part not in (*COMPONENTS, "model") for part in self.parts)

    def __post_init__(self) -> None:
        for number in (self.value, *self.vector, *self.parts.values()):
            if not isfinite(number):
                raise LoratoolError(f"strength {number} is not a finite number")

    def of(self, modules: Iterable[Module], arch: Arch) -> dict[Module, float]:
        """The strength of each module; raises `LoratoolError` where the architecture has no such vector, and where one of
        `parts` has no module."""
        found, used = self.resolve(modules, arch)
        if missing := sorted(self.parts.keys() - used):
            raise LoratoolError(f"{', '.join(missing)}: no module is of such a component or block")
        return found

    def resolve(self, modules: Iterable[Module], arch: Arch) -> tuple[dict[Module, float], set[str]]:
        """The strength of each module, and those of `parts` that have a module."""
        by_block = block_strengths(self.vector, arch) if self.vector else {}
        found: dict[Module, float] = {}
        used: set[str] = set()
        for module in modules:
            block, strength = block_of(arch, module), self.value
            strength *= by_block.get(block, 1.0)
            # Factors multiply: a module may be of a component and of several globs at once.
            for part, factor in self.parts.items():
                if _is_part(part, module, block):
                    used.add(part)
                    strength *= factor
            found[module] = strength
        return found, used

    def opposite(self) -> Strength:
        """The opposite strength, which takes out of a weight what this strength put in."""
        return replace(self, value=-self.value)

    def modules_without_block(self, modules: Iterable[Module], arch: Arch) -> list[Module]:
        """The modules whose blocks have no number in `vector`, if there is a vector."""
        by_block = block_strengths(self.vector, arch) if self.vector else {}
        return [module for module in modules if by_block and block_of(arch, module) not in by_block]


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter, in memory or at a path, and how strongly it counts: one number, or a `Strength`."""

    adapter: Adapter | str | Path
    strength: Strength | float = 1.0

    @property
    def full_strength(self) -> Strength:
        """The strength as a `Strength`; raises `LoratoolError`, naming the adapter, where a number is not finite."""
        with error_context(self.path):
            if not isinstance(self.strength, Strength | int | float):
                raise LoratoolError(f"the strength {self.strength!r} is no number")
            return self.strength if isinstance(self.strength, Strength) else Strength(self.strength)

    @property
    def path(self) -> Path:
        return self.adapter.path if isinstance(self.adapter, Adapter) else Path(self.adapter)

    def opposite(self) -> WeightedAdapter:
        """The same adapter, to be taken out."""
        return replace(self, strength=self.full_strength.opposite())

    def times(self, parts: Mapping[str, float]) -> WeightedAdapter:
        """The same adapter with the strengths of components and blocks multiplied."""
        strength = self.full_strength
        product = {part: strength.parts.get(part, 1.0) * parts.get(part, 1.0) for part in (*strength.parts, *parts)}
        return replace(self, strength=replace(strength, parts=product))


AdapterLike = WeightedAdapter | Adapter | str | Path
"""What verbs take for an adapter: a `WeightedAdapter`, or an adapter or its path, at strength 1."""


def weighted_adapter(source: AdapterLike) -> WeightedAdapter:
    """`source` with a strength, which is 1 where none is given."""
    return source if isinstance(source, WeightedAdapter) else WeightedAdapter(source)


def weighted_adapters(sources: Sequence[AdapterLike]) -> list[WeightedAdapter]:
    """Adapters with their strengths; raises `LoratoolError` where there is none, or where one path stands for several."""
    if isinstance(sources, str | Path | Adapter | WeightedAdapter):
        raise LoratoolError(f"{sources}: expected several adapters, such as a list of one")
    if not sources:
        raise LoratoolError("there is nothing to do: name at least one adapter")
    return [weighted_adapter(each) for each in sources]


def strengths_of(adapters: Sequence[tuple[Adapter, Strength]]) -> list[dict[Module, float]]:
    """The strength of each module of each adapter.

    Raises `LoratoolError` for a component or a block of which none of the adapters has a module.
    """
    found: list[dict[Module, float]] = []
    asked: set[str] = set()
    used: set[str] = set()
    for adapter, strength in adapters:
        # Blocks alone depend on the architecture, which is looked for only where a strength names any.
        arch = (
            architecture_of(adapter, adapter.modules, length=len(strength.vector)) if strength.by_block else WITHOUT_BLOCKS
        )
        with error_context(adapter.path):
            mine, parts = strength.resolve(adapter.modules, arch)
        found.append(mine)
        asked |= strength.parts.keys()
        used |= parts
    # Over all adapters together: one of them may lack a component that another has.
    if missing := sorted(asked - used):
        raise LoratoolError(f"{', '.join(missing)}: no module is of such a component or block")
    return found


WITHOUT_BLOCKS: Final = Arch("unknown", "a model whose blocks nobody asks for", ())
"""Stands for the architecture where no strength is by block."""


def _is_part(part: str, module: Module, block: str) -> bool:
    if part in (*COMPONENTS, "model"):
        return part == (module.component if module.component != WHOLE else "model")
    return fnmatchcase(block, part)


def architecture_of(adapter: Adapter, modules: Sequence[Module], name: str | None = None, length: int = 0) -> Arch:
    """The architecture that blocks are named by: the one called `name`, else one that explains all modules. Of look-alikes,
    which have the same blocks, one that has a vector of `length` block weights is preferred."""
    if name:
        return arch_named(name)
    found = archs_of_adapters([adapter.keys]) or [without_table(modules)]
    return next((arch for arch in found if length in VECTOR_LENGTHS.get(arch.name, ())), found[0])
