"""What an architecture's table is: the modules of each component in its namings, and what tells look-alikes apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Final

from loratool.archs.links import Link
from loratool.names import (
    CHECKPOINT,
    CONDITIONER,
    DIFFUSERS,
    ENCODERS,
    ORIGINAL,
    TE1,
    TE2,
    TE3,
    UNET,
    WHOLE,
    Module,
    candidate_names,
    flat,
)

Rows = Callable[[], Iterable[Link]]

FOLDERS: Final[Mapping[str, str]] = {
    WHOLE: "model", UNET: "transformer", CONDITIONER: "text_conditioner",
    TE1: "text_encoder", TE2: "text_encoder_2", TE3: "text_encoder_3",
}  # fmt: skip
"""Where diffusers' pipelines keep each component; a denoiser in another folder, such as `unet`, has that in its table."""


@dataclass(frozen=True, slots=True)
class NameReading:
    """How the name of a module is to be read: its `naming`, its `path` there with dots, and the `link` that has it.

    `link` is None in the diffusers naming, whose modules are parts.
    """

    naming: str
    path: str
    link: Link | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The modules of the diffusers naming that the module is made of."""
        return self.link.parts if self.link else (self.path,)


@dataclass(frozen=True, eq=False)
class Component:
    """One network of an architecture: its rows by naming, and facts that hold for it alone.

    Every naming's links have the parts of the diffusers naming on their one side. `inputs` maps the end of a module path
    to the width of its input; a file whose shapes disagree is another model. `parameters` is how many the whole network
    has, 0 where sizes vary. `folder` is its place in a diffusers pipeline, `encoder` what ComfyUI calls a text encoder,
    `kohya` what kohya's prefix calls it where that is not its `name`, and `inside` its path in the denoiser of the original,
    where it is part of that. `same` are namings that are another one here.
    """

    name: str
    rows: Mapping[str, Rows]
    inputs: Mapping[str, int] = field(default_factory=dict)
    parameters: int = 0
    folder: str = ""
    encoder: str = ""
    kohya: str = ""
    inside: str = ""
    same: Mapping[str, str] = field(default_factory=dict)

    @property
    def diffusers_folder(self) -> str:
        """The folder of the component in a diffusers pipeline."""
        return self.folder or FOLDERS[self.name]

    @cached_property
    def links(self) -> Mapping[str, tuple[Link, ...]]:
        """The links of each naming."""
        return {naming: tuple(rows()) for naming, rows in self.rows.items()}

    @property
    def stored_naming(self) -> str:
        """The naming of the original's checkpoints."""
        return CHECKPOINT if CHECKPOINT in self.rows else ORIGINAL

    def naming(self, wanted: Sequence[str]) -> str:
        """The first of the namings `wanted` that the component has, else that of diffusers."""
        found = next((naming for naming in wanted if naming in self.rows or naming in self.same), DIFFUSERS)
        return self.same.get(found, found)

    def read_name(self, path: str) -> NameReading | None:
        """How the module `path`, dotted or flattened, of any naming is read; the first naming that has the name decides."""
        # Some tools leave an underscore behind the name (ComfyUI#4347).
        flattened = flat(path).rstrip("_")
        # A name of diffusers may be a whole's name as well, for layers that are called alike: being a part comes first.
        for naming, names in self._names.items():
            if link := names().get(flattened):
                part = next((part for part in link.parts if flat(part) == flattened), None)
                return NameReading(DIFFUSERS, part) if part else NameReading(naming, link.whole, link)
        return None

    def contradicts(self, path: str, width: int) -> bool:
        """Whether an input of `width` at `path` shows that the module is another model's."""
        # Widths are those of diffusers' modules; the parts of a stack have the input of the whole.
        reading = self.read_name(path)
        paths = reading.parts if reading else (path,)
        return any(
            f".{name}".endswith(f".{ending}") and width != expected
            for ending, expected in self.inputs.items()
            for name in paths
        )

    @cached_property
    def _names(self) -> Mapping[str, Callable[[], Mapping[str, Link]]]:
        """For each naming, a function that gives the links by flattened names."""
        # Only built when first called: a table has thousands of names, and most are for other models than the one at hand.
        return {naming: cache(partial(_by_name, rows)) for naming, rows in self.rows.items()}

    @cached_property
    def owners(self) -> Mapping[str, Mapping[str, Link]]:
        """Naming, then module path of diffusers: the link of that naming which has it as a part."""
        return {naming: {part: link for link in links for part in link.parts} for naming, links in self.links.items()}


def plain(name: str, paths: Sequence[str]) -> Component:
    """A component without a table, whose modules are called alike everywhere."""
    return Component(name, {ORIGINAL: lambda: (Link((path,), path) for path in dict.fromkeys(paths))})


def _by_name(rows: Rows) -> dict[str, Link]:
    """The links of a naming by the flattened names of both their sides."""
    # A part's name goes before a whole's where the two are alike.
    links = tuple(rows())
    return {flat(link.whole): link for link in links} | {flat(part): link for link in links for part in link.parts}


@dataclass(frozen=True, eq=False, slots=True)
class Arch:
    """A base architecture: the name that `--arch` takes, what people call it, and its components.

    `versions` are the beginnings of what trainers write into metadata for it (ss_base_model_version,
    modelspec.architecture).
    """

    name: str
    title: str
    components: tuple[Component, ...]
    versions: tuple[str, ...] = ()

    def component(self, name: str) -> Component | None:
        """The component called `name`, None where the architecture has no such."""
        return next((component for component in self.components if component.name == name), None)

    def readings_of(self, module: Module) -> list[tuple[Component, NameReading]]:
        """The components that have `module`, each with its reading of the name: the component that the prefix names, else
        all that may be meant; empty where none has the module."""
        for name, path in candidate_names(module):
            found = [(owner, reading) for owner in self._owners(name) if (reading := owner.read_name(path))]
            if found:
                return found
        return []

    def _owners(self, name: str) -> Sequence[Component]:
        """The components that the name in a prefix may mean: where the model has no such text encoder, any of its text
        encoders, since T5 is te3 to kohya in every model."""
        if component := self.component(name):
            return (component,)
        if name == WHOLE:
            return self.components
        return [component for component in self.components if name in ENCODERS and component.name in ENCODERS]
