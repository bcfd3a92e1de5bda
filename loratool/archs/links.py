"""Links: how the modules of one naming become those of another, as the rows of architecture tables. No tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Link:
    """Says that `parts`, stacked along the output dimension in the ratio `sizes`, are `whole`.

    `parts` are module paths of diffusers or transformers, `whole` one of the original checkpoint.
    With `swapped` the two halves of the output stand in the opposite order (adaLN's scale and shift);
    with `transposed` the original stores the weight as (in, out); with `rotary` the original interleaves the two halves of
    each attention head, as Meta's Llama does.
    """

    parts: tuple[str, ...]
    whole: str
    sizes: tuple[int, ...] = (1,)
    swapped: bool = False
    transposed: bool = False
    rotary: bool = False


def rename(parts: str, whole: str, table: Mapping[str, str]) -> Iterator[Link]:
    """One link for each row of `table`, below the block `parts` here and `whole` there."""
    for ours, theirs in table.items():
        yield Link((_join(parts, ours),), _join(whole, theirs))


def fuse(block: str, parts: str, whole: str, sizes: tuple[int, ...] | None = None) -> Link:
    """The link that stacks the space-separated `parts` of `block` into `whole`; equal sizes unless given."""
    names = tuple(_join(block, part) for part in parts.split())
    return Link(names, whole, sizes or (1,) * len(names))


def same(block: str, names: str) -> Iterator[Link]:
    """One link for each of the space-separated `names` of `block`, which both namings call alike."""
    for name in names.split():
        yield Link((_join(block, name),), _join(block, name))


def swap(parts: str, whole: str) -> Link:
    """The link of an adaLN whose scale and shift stand in the opposite order in the two namings."""
    return Link((parts,), whole, swapped=True)


def apart(links: Iterable[Link], instead: Mapping[str, str] | None = None) -> Iterator[Link]:
    """The links of OneTrainer's OMI naming, which numbers the parts of a stack behind its name (modules/util/convert/lora).

    `instead` maps names of wholes to what OMI calls them.
    """
    for link in links:
        whole = (instead or {}).get(link.whole, link.whole)
        if len(link.parts) == 1:
            yield replace(link, whole=whole)
        else:
            # Each part is a module of its own here, so that nothing is stacked, and no size or swap is left.
            yield from (Link((part,), f"{whole}.{number}") for number, part in enumerate(link.parts))


def parts_mentioned(links: Iterable[Link]) -> tuple[set[str], set[str]]:
    """All module paths of the parts, and all of the wholes."""
    rows = list(links)
    return {part for link in rows for part in link.parts}, {link.whole for link in rows}


def _join(block: str, name: str) -> str:
    return f"{block}.{name}" if block and name else block or name
