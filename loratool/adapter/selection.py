"""Selections: which modules of an adapter, or of a checkpoint, a verb takes, by globs."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from loratool.deltas.schema import WEIGHT
from loratool.errors import LoratoolError
from loratool.names import Module


@dataclass(frozen=True, slots=True)
class Selection:
    """Which modules are taken: those that a glob of `include` matches, or all without such a glob, but for modules that a
    glob of `exclude` matches. A glob matches a module's name in the file, its path, or the name of its parameter."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # The letters of a string would be globs too, and its * would match everything.
        given: tuple[object, ...] = (self.include, self.exclude)
        if any(isinstance(globs, str) for globs in given):
            raise LoratoolError("`Selection(include=, exclude=)` takes several globs: a tuple, not one string")

    def takes(self, module: Module, parameter: str = WEIGHT) -> bool:
        """Whether the globs take this `parameter` of `module`."""
        names = (module.stem, module.path, f"{module.path}.{parameter}")
        included = not self.include or _any_match(names, self.include)
        return included and not _any_match(names, self.exclude)


def _any_match(names: tuple[str, ...], globs: tuple[str, ...]) -> bool:
    # Not `fnmatch`, which ignores the case of letters on Windows.
    return any(fnmatchcase(name, glob) for name in names for glob in globs)
