"""What an adapter is by its names: the models whose tables explain it, the formats that every key agrees with. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.archs import Arch
from loratool.errors import Unsupported
from loratool.formats.table import FORMATS, Format, format_named
from loratool.keys.detect import break_ties, is_language_model, matching_archs
from loratool.keys.listing import AdapterKeys
from loratool.keys.routes import is_spelled_as, language_model, without_table
from loratool.names import CONTAINER, Module


def archs_of_adapters(adapters: Sequence[AdapterKeys]) -> list[Arch]:
    """The architectures whose tables explain the names of all adapters, and the shapes too where any does; or a language
    model, whose names are its own. Empty where no table explains the names."""
    inputs: dict[Module, int | None] = {}
    # One adapter's factors may show a width that another's do not.
    for adapter in adapters:
        for module, width in adapter.modules.items():
            inputs[module] = inputs.get(module) or width
    if is_language_model(list(inputs)):
        return [language_model(inputs)]
    # Where adapters contradict each other, the first one is believed.
    metadata = {key: value for adapter in reversed(adapters) for key, value in adapter.metadata.items()}
    named, fitting = matching_archs(list(inputs.items()))
    if fitting:
        return break_ties(fitting, list(inputs.items()), metadata)[0]
    # Names alone are enough to rename by; the title owns up to the shapes.
    chosen = break_ties(named, list(inputs.items()), metadata)[0]
    return [replace(arch, title=f"{arch.title} by its names, not by its shapes") for arch in chosen]


def matching_formats(adapter: AdapterKeys) -> list[Format]:
    """The formats that would give every key the name it has, in the order of the table; not for names behind PEFT's
    container, which do not tell a folder from a file."""
    modules = list(adapter.modules)
    archs = archs_of_adapters([adapter]) or [without_table(modules)]
    return [
        row
        for row in FORMATS
        # Leaves first, which are cheap to compare and rule out most rows.
        if all(row.spells(module.stem, keys) for module, keys in adapter.keys.items())
        and any(is_spelled_as(modules, arch, row) for arch in archs)
    ]


def format_of(adapter: AdapterKeys) -> Format:
    """The format that an adapter is in; raises `Unsupported` where the keys agree with no format."""
    if any(module.stem.startswith(CONTAINER) for module in adapter.modules):
        return format_named("peft" if adapter.has_config else "peft-file")
    matching = matching_formats(adapter)
    if not matching:
        raise Unsupported(f"{adapter.path}: is spelled as no one format is; choose with `to=` how the output is to be")
    return matching[0]
