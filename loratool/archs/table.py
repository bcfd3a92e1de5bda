"""What an architecture's table is: the modules of each component in two namings, and what tells look-alikes apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loratool.names import Link, flat, mentioned


@dataclass(frozen=True, eq=False)
class Component:
    """One network of an architecture: its `links`, and facts that hold for it alone.

    `inputs` maps the end of a module path to the width of its input; a file whose shapes disagree is another model.
    `parameters` is how many the whole network has, 0 where sizes vary.
    """

    name: str
    rows: Callable[[], Iterable[Link]]
    inputs: Mapping[str, int] = field(default_factory=dict)
    parameters: int = 0

    @cached_property
    def links(self) -> tuple[Link, ...]:
        return tuple(self.rows())

    @cached_property
    def known(self) -> Mapping[str, str]:
        """Flattened module path of either naming: the same path with its dots."""
        ours, theirs = mentioned(self.links)
        return {flat(path): path for path in (*theirs, *ours)}

    def contradicts(self, path: str, width: int) -> bool:
        """Whether an input `width` at `path` shows this to be another model."""
        dotted = self.known.get(flat(path), path)
        return any(dotted.endswith(ending) and width != expected for ending, expected in self.inputs.items())


@dataclass(frozen=True, eq=False, slots=True)
class Arch:
    """A base architecture: the name that `--arch` takes, what people call it, and its components."""

    name: str
    title: str
    components: tuple[Component, ...]

    def component(self, name: str) -> Component | None:
        return next((component for component in self.components if component.name == name), None)
