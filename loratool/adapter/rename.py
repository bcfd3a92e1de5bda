"""Brings changes into another naming: renames them, cuts those whose module is several there, stacks those that are one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

from loratool.adapter.adapter import Change
from loratool.archs.links import Link
from loratool.deltas.base import Delta, stack
from loratool.deltas.schema import ANY
from loratool.errors import InvalidAdapter, Unsupported, error_context
from loratool.keys.routes import Route
from loratool.names import Module


@dataclass(frozen=True, slots=True)
class RenamedDelta:
    """A delta under its new name: the component's `prefix` and the `path` behind it; `sources` are the changes that the
    delta came from, one unless it is a stack."""

    prefix: str
    path: str
    parameter: str
    delta: Delta
    sources: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """The delta of one part of a stacked module, which waits for those of the other parts."""

    prefix: str
    link: Link
    part: str
    delta: Delta
    change: Change

    @property
    def place(self) -> tuple[str, str, str, str]:
        """The stacked module, parameter and kind: pieces of the same place are stacked."""
        return self.prefix, self.link.whole, self.change.parameter, self.delta.kind


def rename_changes(changes: Sequence[Change], routes: Mapping[Module, Route]) -> list[RenamedDelta]:
    """Every change under its new name, exactly; raises `LoratoolError` for what has no exact form there."""
    moved: list[RenamedDelta] = []
    pieces: list[_Piece] = []
    for change in changes:
        route = routes[change.module]
        with _explain_errors(change):
            # 1. Where the modules are the same, the name alone changes.
            if route.renames:
                delta = swap_halves(change.delta) if route.swaps_halves else change.delta
                moved.append(RenamedDelta(route.prefix, route.targets[0][0], change.parameter, delta, (change,)))
                continue
            # 2. Else by way of diffusers' naming, the finest: cut into its parts, each of which is a module of the
            # target, or a piece of one, which has to wait for its siblings.
            targets = dict(zip(route.read.parts, route.targets, strict=True))
            for part, delta in _delta_parts(change, route):
                whole, link = targets[part]
                if link and len(link.parts) > 1:
                    pieces.append(_Piece(route.prefix, link, part, delta, change))
                else:
                    moved.append(RenamedDelta(route.prefix, whole, change.parameter, cross_link(delta, link), (change,)))
    # 3. Stack the pieces. The sort is for `groupby`, which joins neighbours only; as it is stable, pieces keep their order.
    pieces.sort(key=lambda piece: piece.place)
    return moved + [_stack(list(group)) for _, group in groupby(pieces, key=lambda piece: piece.place)]


def _delta_parts(change: Change, route: Route) -> list[tuple[str, Delta]]:
    """The deltas of a module's parts in diffusers' naming, without parts that nothing changes where another is changed."""
    link = route.read.link
    if link is None or len(link.parts) == 1:
        return [(route.read.parts[0], cross_link(change.delta, link))]
    whole = split_delta(change.delta, link.sizes)
    # A kind whose blocks are cut through falls apart into whole matrices: exact, but as large as the weight.
    if any(type(part) is not type(change.delta) for part in whole):
        raise Unsupported(
            f"a {change.delta.kind} whose blocks do not end where the parts do can be cut only as a dense difference"
        )
    trimmed = [part.without_zero_ranks() for part in whole]
    # A delta that adds nothing stays, as zeros, so that no module of the file is lost.
    if not any(trimmed):
        return list(zip(link.parts, whole, strict=True))
    return [(name, part) for name, part in zip(link.parts, trimmed, strict=True) if part]


def split_delta(delta: Delta, sizes: Sequence[int]) -> list[Delta]:
    """`delta` cut into pieces whose rows are in the ratio `sizes`; raises `InvalidAdapter` where they do not divide so."""
    rows = delta.shape[0]
    # A delta that acts on inputs is the same for all rows: only the number of pieces counts.
    if rows == ANY:
        return delta.split(sizes)
    unit, left = divmod(rows, sum(sizes))
    if left:
        raise InvalidAdapter(f"has {rows} rows, which are not {sum(sizes)} equal parts")
    return delta.split([size * unit for size in sizes])


@contextmanager
def _explain_errors(what: object) -> Iterator[None]:
    """Adds to an error what it is about, and to `Unsupported` what can be done where a delta has no exact form."""
    try:
        with error_context(what):
            yield
    except Unsupported as error:
        raise Unsupported(
            f"{error}; `rule=Rule()`, with `base=` where its kind needs it, makes a LoRA of it, which can be cut and stacked"
        ) from error


def swap_halves(delta: Delta) -> Delta:
    """`delta` with the two halves of its output in the opposite order."""
    return stack(split_delta(delta, (1, 1))[::-1])


def cross_link(delta: Delta, link: Link | None) -> Delta:
    """`delta` across `link`, in either direction: with its halves exchanged where the link says so."""
    # An exchange is its own inverse.
    return swap_halves(delta) if link and link.swapped else delta


def _stack(pieces: Sequence[_Piece]) -> RenamedDelta:
    """The delta of a stacked module from the pieces of its parts; raises `Unsupported` for two pieces of one part."""
    first, link = pieces[0], pieces[0].link
    deltas: dict[str, Delta | None] = {piece.part: piece.delta for piece in pieces}
    with _explain_errors(f"{link.whole}, made of {', '.join(str(piece.change.module) for piece in pieces)}"):
        if len(deltas) < len(pieces):
            raise Unsupported("two deltas of one kind on the same part")
        whole = stack_parts(link, deltas)
        assert whole is not None
        return RenamedDelta(first.prefix, link.whole, first.change.parameter, whole, tuple(piece.change for piece in pieces))


def stack_parts(link: Link, deltas: Mapping[str, Delta | None]) -> Delta | None:
    """The delta of a stacked module from those of its parts, with a delta of nothing for parts that are not changed; None
    where no part is."""
    name, given = next(((name, delta) for name, delta in deltas.items() if delta), ("", None))
    if given is None:
        return None
    # Links know sizes only as a ratio; any part that is there tells the rows of one unit.
    unit = given.shape[0] // link.sizes[link.parts.index(name)]
    return stack([deltas.get(part) or given.nothing(size * unit) for part, size in zip(link.parts, link.sizes, strict=True)])
