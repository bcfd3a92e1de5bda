"""A change cut to its places in the base: nothing is broadcast, and a change that does not fit is an error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import Tensor

from loratool.adapter.adapter import Adapter, Change
from loratool.deltas.base import Delta
from loratool.deltas.schema import ANY
from loratool.errors import LoratoolError, ShapeMismatch
from loratool.files.header import TensorInfo
from loratool.keys.rows import WeightRows


@dataclass(frozen=True, slots=True)
class Term:
    """One delta, or a part of one, on output rows `start` to `stop` by `step` of a tensor, or of the matrix of one `expert`
    in a stack.

    With `transposed` the tensor is stored as (in, out), and its columns are the output rows.
    """

    change: str
    delta: Delta
    strength: float
    start: int
    stop: int
    transposed: bool
    step: int = 1
    expert: int | None = None

    def part_of(self, weight: Tensor) -> Tensor:
        """The part of a stored weight that the term acts on, as a view with the output's rows first."""
        matrix = weight if self.expert is None else weight[self.expert]
        return (matrix.T if self.transposed else matrix)[self.start : self.stop : self.step]


def terms_of(
    base: tuple[int, ...], change: Change, places: tuple[WeightRows, ...], strength: float
) -> Iterable[tuple[str, Term]]:
    """A change cut to its places in tensors of shape `base`; raises `ShapeMismatch` unless it fits them exactly."""
    # A module's rows may be spread over several tensors, or over row ranges of one, in this order.
    rows = sum(place.rows for place in places)
    delta, shape = change.delta, change.delta.shape
    base = places[0].matrix_of(base)
    wanted = (rows, *base[1:]) if not places[0].transposed else (rows, *base[:1])
    # Kinds that may give the weight another shape (a grown vocabulary, a padded input layer) need no exact fit.
    if len(places) == 1 and delta.may_reshape(base):
        return [(places[0].tensor, Term(str(change), delta, strength, 0, shape[0], transposed=False))]
    if not _fits(delta, wanted):
        raise ShapeMismatch(
            f"{change}: is a change of {_shape_text(shape)}, its target {places[0].tensor} takes {list(wanted)}: "
            "the adapter is for another model"
        )
    parts = [delta] if len(places) == 1 else delta.split([place.rows for place in places])
    return [(place.tensor, _term(change, part, strength, place)) for place, part in zip(places, parts, strict=True)]


def _term(change: Change, delta: Delta, strength: float, place: WeightRows) -> Term:
    return Term(str(change), delta, strength, place.start, place.stop, place.transposed, place.step, place.expert)


def _shape_text(shape: tuple[int, ...]) -> str:
    """A shape in words, for messages."""
    return "[" + ", ".join("any" if size == ANY else str(size) for size in shape) + "]"


def _fits(delta: Delta, wanted: tuple[int, ...]) -> bool:
    """Whether a delta can change a weight of exactly the shape `wanted`; nothing is ever broadcast."""
    # `ANY` leaves a side to the weight. An input may be counted with its kernel or without, depending on the kind.
    if ANY in delta.shape:
        inputs = (wanted[1], prod(wanted[1:])) if len(wanted) > 1 else (1,)
        return delta.shape[0] in (ANY, wanted[0]) and (delta.shape[1] == ANY or delta.shape[1] in inputs)
    if delta.kernel_flattened:
        return (delta.shape[:1], prod(delta.shape[1:])) == (wanted[:1], prod(wanted[1:]))
    return _same_but_ones(delta.shape, wanted)


def _same_but_ones(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes differ at most in trailing dimensions of 1, as a linear layer and a 1×1 convolution do."""
    return _without_ones(one) == _without_ones(other)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without trailing dimensions of 1 behind the first two."""
    kept = list(shape)
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def grows(term: Term, info: TensorInfo) -> bool:
    """Whether a term leaves its weight with another shape than the stored one."""
    return term.delta.reshapes and ANY not in term.delta.shape and term.delta.shape != info.shape


def require_no_overlap(adapter: Adapter, name: str, terms: list[Term]) -> None:
    """Raises `LoratoolError` where one adapter adds to a row twice; a replaced weight may receive a LoRA on top."""
    # Two names of one weight (dotted and kohya's, parts and whole) may lead here; parts of one change may interleave.
    added = sorted((term for term in terms if not term.delta.replaces), key=_order)
    for one, other in pairwise(added):
        # A term without an expert is of all experts of a stack.
        together = one.expert == other.expert and one.start % one.step == other.start % other.step
        overlaps = other.start < one.stop if together else (one.expert is None) != (other.expert is None)
        if overlaps and one.change != other.change:
            raise LoratoolError(
                f"{adapter.path}: {one.change} and {other.change} both go to {name}; use `Selection(exclude=)` for one"
            )


def _order(term: Term) -> tuple[int, int, int]:
    """The sorting key that brings terms together that may overlap: of one expert, of the same of interleaved rows."""
    return -1 if term.expert is None else term.expert, term.start % term.step, term.start
