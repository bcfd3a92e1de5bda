"""Rows of a checkpoint's tensors, along the output: where a module's weight lies, whole or in parts. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from loratool.archs.memory import MemoryTensors
from loratool.files.layout import Layout


@dataclass(frozen=True, slots=True)
class WeightRows:
    """Rows `start` to `stop` by `step`, along the output, of a base tensor, or of the matrix of one `expert` in a stack;
    `transposed` where it is stored as (in, out)."""

    tensor: str
    start: int
    stop: int
    transposed: bool = False
    step: int = 1
    expert: int | None = None

    @property
    def rows(self) -> int:
        return len(range(self.start, self.stop, self.step))

    def matrix_of(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what the rows are of, as it is stored in a tensor of the shape `stored`."""
        return stored if self.expert is None else stored[1:]

    def part(self, start: int, stop: int) -> WeightRows:
        """Rows `start` to `stop` of these rows."""
        first = self.start + start * self.step
        return replace(self, start=first, stop=min(self.stop, self.start + stop * self.step))


Places = tuple[WeightRows, ...]
"""Rows that make up one weight, one below the other."""


def count_rows(places: Places) -> int:
    """The rows of all `places` together."""
    return sum(place.rows for place in places)


def slice_rows(places: Places, start: int, stop: int) -> Places:
    """Rows `start` to `stop` of `places`, counted over all of them."""
    found, first = [], 0
    for place in places:
        low, high = max(start - first, 0), min(stop - first, place.rows)
        if low < high:
            found.append(place.part(low, high))
        first += place.rows
    return tuple(found)


def split_heads(place: WeightRows, width: int) -> Iterator[WeightRows]:
    """The rows of a weight with interleaved halves of each head of `width` rows, half by half: of each head the even rows,
    then the odd ones."""
    for start in range(place.start, place.stop, width):
        for half in (0, 1):
            yield replace(place, start=start + half, stop=start + width, step=2)


def places_in_memory(made: MemoryTensors, own: Mapping[str, WeightRows], layout: Layout) -> Iterator[tuple[str, Places]]:
    """The names in memory of what is `made` of a checkpoint's tensors, with the rows that each takes; of stacked experts,
    each expert's. Nothing for steps that rows cannot follow: such tensors keep their names on disk."""
    names = [step for step, _ in made.steps]
    if "MergeModulelist" in names or "ErnieFuseAndSplitTextVisionExperts" in names:
        yield from _experts_apart(made, own)
        return
    parts: list[Places] = [tuple(own[name] for name in source) for source in made.sources]
    for name, settings in made.steps:
        changed = _step(name, settings, parts, made.names, layout)
        if changed is None:
            return
        parts = changed
    yield from zip(made.names, parts, strict=False)


def _experts_apart(made: MemoryTensors, own: Mapping[str, WeightRows]) -> Iterator[tuple[str, Places]]:
    """Each expert's part of a stack under the stack's name with the expert's number before the parameter's: its rows of all
    sources, one below the other."""
    counts = {len(source) for source in made.sources}
    if len(counts) != 1:
        return
    # Ernie's stacks hold the first half of the experts for text, the second for images.
    each = counts.pop() // len(made.names)
    for number, experts in enumerate(zip(*made.sources, strict=True)):
        stack, expert = divmod(number, each) if each else (0, 0)
        if stack < len(made.names):
            holder, _, parameter = made.names[stack].rpartition(".")
            yield f"{holder}.{expert}.{parameter}", tuple(own[name] for name in experts)


def _step(
    name: str, settings: Mapping[str, Any], parts: Sequence[Places], names: Sequence[str], layout: Layout
) -> list[Places] | None:
    """The places after one of transformers' operations; None where rows cannot say what it does."""
    if name == "Transpose" and (settings["dim0"], settings["dim1"]) == (0, 1):
        return [
            tuple(WeightRows(place.tensor, 0, layout.info(place.tensor).shape[-1], transposed=True) for place in places)
            for places in parts
        ]
    if name == "PermuteForRope":
        return _permute_for_rope(settings, parts, names, layout.config)
    along_rows = _ALONG_ROWS.get(name) if settings.get("dim") == 0 else None
    return along_rows(parts, len(names)) if along_rows else None


def _join(parts: Sequence[Places], count: int) -> list[Places]:
    return [tuple(place for places in parts for place in places)]


def _deinterleave(parts: Sequence[Places], count: int) -> list[Places]:
    return [tuple(replace(place, start=place.start + half, step=2) for half in (0, 1) for place in part) for part in parts]


def _chunk(parts: Sequence[Places], count: int) -> list[Places]:
    rows = -(-count_rows(parts[0]) // count)
    return [slice_rows(parts[0], number * rows, (number + 1) * rows) for number in range(count)]


_ALONG_ROWS: Final = {"Concatenate": _join, "Interleave": _deinterleave, "Chunk": _chunk}
"""What transformers' operations do to the rows of the tensors before them, where `count` tensors come out."""


def _permute_for_rope(
    settings: Mapping[str, Any], parts: Sequence[Places], names: Sequence[str], config: Mapping[str, Any]
) -> list[Places] | None:
    """The rows of queries and keys that the file interleaves for rotary embeddings, in memory's order; None where the config
    does not say how many heads there are."""
    inner = config.get(settings.get("subconfig_key", ""), config)
    heads = inner.get("num_attention_heads", 1) if isinstance(inner, dict) else 0
    kinds = settings.get("permute_layer_names")
    found: list[Places] = []
    for name, places in zip(names, parts, strict=True):
        if kinds is not None and not any(kind in name for kind in kinds):
            found.append(places)
            continue
        rows = count_rows(places)
        if type(heads) is not int or heads < 1 or rows % (2 * heads):
            return None
        found.append(tuple(row for place in places for row in split_heads(place, rows // heads)))
    return found
