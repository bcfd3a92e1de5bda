"""What the modules of an adapter are called in another format, by an architecture's table. Names alone: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loratool.archs import ARCHS
from loratool.archs.flux import FLUX1
from loratool.archs.links import Link
from loratool.archs.table import Arch, Component, NameReading, plain
from loratool.errors import LoratoolError, Unsupported
from loratool.formats.table import LLM, Format
from loratool.names import DIFFUSERS, TRANSFORMERS_5, UNWRAPPED, Module


@dataclass(frozen=True, slots=True)
class Route:
    """Where a module goes: the `prefix` of its component in the target, how its name is `read`, the target's `naming`, and
    in `targets`, for each of the module's parts in diffusers' naming, the path of the target's module that holds the part
    and the link between them (None where that module is the part itself)."""

    prefix: str
    read: NameReading
    naming: str
    targets: tuple[tuple[str, Link | None], ...]

    @property
    def renames(self) -> bool:
        """Whether nothing but the name changes: the naming stays, or the target's module is made of the same parts."""
        # All parts must come to lie in one module, and that module must hold no other part.
        (whole, link), *others = dict.fromkeys(self.targets)
        return self.naming == self.read.naming or (not others and (link.parts if link else (whole,)) == self.read.parts)

    @property
    def swaps_halves(self) -> bool:
        """Whether the halves of the module's output change places on the way."""
        # Exchanged on the way into diffusers' naming and again on the way out, they stand as before.
        if self.naming == self.read.naming:
            return False
        link = self.targets[0][1]
        return bool(self.read.link and self.read.link.swapped) != bool(link and link.swapped)


def route_modules(modules: Iterable[Module], arch: Arch, target: Format) -> dict[Module, Route]:
    """Where each of `modules` goes in `target`, by the table of `arch`; raises `LoratoolError` where one has no place."""
    if not target.holds(arch.name):
        raise Unsupported(f"{target.title} is no format for {arch.title}; `loratool formats` shows which are")
    found = {}
    components: set[str] = set()
    for module in modules:
        component, reading = _the_one(module, readings_in(module, arch), target)
        components.add(component.diffusers_folder)
        if target.single and len(components) > 1:
            several = " and ".join(sorted(components))
            raise Unsupported(f"{target.title} holds one model, this adapter is for {several}; `to='diffusers'` holds all")
        try:
            found[module] = route_of(component, reading, _prefix(component, target), component.naming(target.namings))
        # A naming need not have all parts: that of XLabs is of attention alone.
        except KeyError as part:
            raise Unsupported(f"{module}: {target.title} has no name for {part.args[0]} of {arch.title}") from None
    return found


def is_spelled_as(modules: Iterable[Module], arch: Arch, spelling: Format) -> bool:
    """Whether every module of `arch` has the name that `spelling` gives it, or one that its readers take for the same."""
    try:
        # One by one: most spellings fail at the first.
        return all(_is_right(module, route_modules([module], arch, spelling)[module], spelling) for module in modules)
    except LoratoolError:
        return False


def _is_right(module: Module, route: Route, spelling: Format) -> bool:
    """Whether a module is called as its `way` says, or by a name that readers take for the same: CLIP's path in transformers
    5, and kohya's `lora_te_` for the first of several encoders."""
    unwrapped = route.read.naming in (TRANSFORMERS_5, UNWRAPPED)
    path = route.read.path if unwrapped else route.targets[0][0]
    prefixes = {route.prefix, "lora_te_"} if route.prefix == "lora_te1_" else {route.prefix}
    return route.renames and module.stem in {spelling.stem(prefix, path) for prefix in prefixes}


def routes_keeping_names(modules: Iterable[Module], arch: Arch, target: Format) -> dict[Module, Route]:
    """`route_modules`, except that each module keeps its own name where every one of them is called right already."""
    routes = route_modules(modules, arch, target)
    if not all(_is_right(module, route, target) for module, route in routes.items()):
        return routes
    return {module: _keep_name(module, route.read, target) for module, route in routes.items()}


def _keep_name(module: Module, read: NameReading, target: Format) -> Route:
    # The prefix is the file's own, which may be `lora_te_` where the format would write `lora_te1_`.
    prefix = module.stem.removesuffix(target.stem("", read.path))
    return Route(prefix, read, read.naming, ((read.path, read.link),))


def readings_in(module: Module, arch: Arch) -> list[tuple[Component, NameReading]]:
    """The components of `arch` that have `module`; raises `LoratoolError` where none has it."""
    places = arch.readings_of(module)
    if not places:
        raise LoratoolError(
            f"{module}: {arch.title} has no such module; `arch=` names another model, `base=` a file that has its names"
        )
    return places


def route_of(component: Component, reading: NameReading, prefix: str, naming: str) -> Route:
    """Where a module of `component` goes in `naming`; raises `KeyError` with the part that has no name there."""
    # A stack stays whole in its own naming, and comes apart in that of diffusers; any other naming is reached by way of the
    # parts, which may end up in several of its modules or be a piece of one.
    if naming == reading.naming:
        return Route(prefix, reading, naming, ((reading.path, reading.link),))
    if naming == DIFFUSERS:
        return Route(prefix, reading, naming, tuple((part, None) for part in reading.parts))
    links = [component.owners[naming][part] for part in reading.parts]
    return Route(prefix, reading, naming, tuple((link.whole, link) for link in links))


def _the_one(
    module: Module, places: Sequence[tuple[Component, NameReading]], target: Format
) -> tuple[Component, NameReading]:
    """The one of `places` that `module` is of; raises `LoratoolError` where several remain that `target` tells apart."""
    # Components that have the same prefix in the target need not be told apart.
    prefixes = {_prefix(component, target): (component, reading) for component, reading in places}
    if len(prefixes) > 1:
        owners = " or ".join(component.diffusers_folder for component, _ in places)
        raise LoratoolError(f"{module}: may be of {owners}, which {target.title} tells apart; its name does not")
    return next(iter(prefixes.values()))


def _prefix(component: Component, target: Format) -> str:
    return target.prefix(
        component.name,
        place=component.diffusers_folder,
        kohya=component.kohya,
        encoder=component.encoder,
        inside=component.inside,
    )


def arch_without_table(modules: Iterable[Module], name: str, title: str) -> Arch:
    """An architecture without a table: every module is called in every naming what its own file calls it."""
    paths: dict[str, list[str]] = {}
    for module in modules:
        paths.setdefault(module.component, []).append(module.path)
    return Arch(name, title, tuple(plain(component, tuple(names)) for component, names in paths.items()))


def without_table(modules: Iterable[Module]) -> Arch:
    """The architecture of modules that no table explains, by their own names."""
    return arch_without_table(modules, "unknown", "a model without a table")


def language_model(modules: Iterable[Module]) -> Arch:
    """The architecture of a language model, whose names are its own."""
    return arch_without_table(modules, LLM, "a language model")


def example(target: Format) -> str:
    """An example of a key as `target` spells it: of FLUX.1's attention, or of another model that the format is for."""
    held = [arch for arch in (FLUX1, *ARCHS) if target.holds(arch.name)]
    if not held:
        return target.key(target.stem(target.whole or "", "model.layers.0.self_attn.q_proj"), "down")
    component = held[0].components[0]
    part = next(
        part for link in component.links[component.stored_naming] for part in link.parts if part.endswith(("to_q", "wq"))
    )
    route = route_of(component, NameReading(DIFFUSERS, part), _prefix(component, target), component.naming(target.namings))
    return target.key(target.stem(route.prefix, route.targets[0][0]), "down")
