"""Which modules of an adapter a verb takes, by globs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite

from loratool.deltas.schema import WEIGHT
from loratool.errors import LoratoolError
from loratool.names import Module


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of an adapter's changes are merged, and how strongly.

    Globs match a module's name in the file, or its path. `components` multiplies the strength of whole components.
    """

    strength: float = 1.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    components: Mapping[str, float] = field(default_factory=dict)

    def takes(self, module: Module, parameter: str = WEIGHT) -> bool:
        """Whether the globs let this parameter of `module` through."""
        names = (module.stem, module.path, f"{module.path}.{parameter}")
        included = not self.include or _any_match(names, self.include)
        return included and not _any_match(names, self.exclude)

    def strength_of(self, module: Module) -> float:
        """The strength at which `module` is merged."""
        return self.strength * self.components.get(module.component or "model", 1.0)


def _any_match(names: tuple[str, ...], globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def check_strength(value: float, what: str) -> float:
    """`value`, if it is finite; raises `LoratoolError` naming `what`."""
    if not isfinite(value):
        raise LoratoolError(f"{what}: strength {value} is not a finite number")
    return value
