"""Builds the delta that a module's leaves make up, by the rows of `schema`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Final, cast

from loratool.deltas.base import Leaves, StoredDelta
from loratool.deltas.schema import AROUND, DORA, KINDS, STACKED, DeltaSpec, Given, explain

CLASSES: Final[Mapping[str, str]] = {
    **{kind.name: kind.computed_by for kind in KINDS},
    **{name: computed_by for name, (computed_by, _) in AROUND.items()},
}
"""The name of each kind, and the module and the class that compute it."""
WRITERS: Final[Mapping[str, str]] = {
    **{kind.name: kind.writer for kind in KINDS},
    **{name: writer for name, (_, writer) in AROUND.items()},
}
"""The name of each kind, and who writes it, in words."""


@cache
def class_of(kind: str) -> type[StoredDelta]:
    """The class that computes the kind called `kind`."""
    # Imported by name: the classes of kinds around another (DoRA, Enlarge) import this module in their turn.
    module, name = CLASSES[kind].split(".")
    return cast("type[StoredDelta]", getattr(import_module(f"loratool.deltas.{module}"), name))


def build(leaves: Leaves, given: Given) -> StoredDelta:
    """The one delta that all of `leaves` make up; raises `InvalidAdapter` where some belong to no kind."""
    (part,) = explain({leaf: tuple(tensor.shape) for leaf, tensor in leaves.items()})
    return build_part(part, leaves, given)


def build_part(part: DeltaSpec, leaves: Leaves, given: Given) -> StoredDelta:
    """The delta that `part` describes, from its leaves without an alpha; raises `InvalidAdapter` or `Unsupported`."""
    # From the outside in: ComfyUI's reshape_weight may stand around a DoRA, and a DoRA around any other kind; each takes its
    # own leaf and builds the delta inside from the rest.
    if given.stacked:
        return class_of(STACKED).from_leaves(leaves, given)
    if "reshape_weight" in leaves:
        return class_of("enlarge").from_leaves(leaves, given)
    if any(leaf in leaves for leaf in DORA.split()):
        return class_of("dora").from_leaves(leaves, given)
    return class_of(part.kind.name).from_leaves(leaves, given)
