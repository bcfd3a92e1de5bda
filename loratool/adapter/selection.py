"""Which modules of an adapter, or of a checkpoint, a verb takes: by globs."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from loratool.deltas.schema import WEIGHT
from loratool.names import Module


@dataclass(frozen=True, slots=True)
class Selection:
    """Which modules are taken: those that a glob of `include` matches, or all where there is none, without those that one
    of `exclude` matches. A glob matches a module's name in the file, its path, or the name of its parameter."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, module: Module, parameter: str = WEIGHT) -> bool:
        """Whether the globs let this parameter of `module` through."""
        names = (module.stem, module.path, f"{module.path}.{parameter}")
        included = not self.include or _any_match(names, self.include)
        return included and not _any_match(names, self.exclude)


def _any_match(names: tuple[str, ...], globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)
