"""The vocabulary of architecture tables: how one model's modules are called in two naming schemes. No tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

DIFFUSERS: Final = "diffusers"
"""The naming of diffusers and transformers: the finest one, whose modules are the parts of every link."""
ORIGINAL: Final = "original"
"""That of the model's own code, which its checkpoint, kohya and ComfyUI use."""
COMFYUI: Final = "ComfyUI"
"""ComfyUI's own, where it differs from the original."""
OMI: Final = "OMI"
"""OneTrainer's export: the original's names, with the parts of a stack numbered."""
KOHYA: Final = "kohya"
"""kohya's own, where it is not the original's: SD1 and SD2 have diffusers' names there."""
TRANSFORMERS_5: Final = "transformers 5"
"""transformers 5.6 dropped `text_model.` from the names of a CLIPTextModel in memory, and so from adapters; a
CLIPTextModelWithProjection still has it."""
UNWRAPPED: Final = "unwrapped"
"""A text encoder's names without the attribute that the whole model is in, as some adapters have them."""
XLABS: Final = "XLabs"
"""The attention processors of XLabs' trainer for FLUX."""
CHECKPOINT: Final = "checkpoint"
"""One that stands in checkpoints only, and in no adapter: OpenCLIP's."""


@dataclass(frozen=True, slots=True)
class Link:
    """`parts`, stacked along the output dimension in the ratio `sizes`, are `whole`.

    `parts` are module paths of diffusers or transformers, `whole` one of the original checkpoint.
    With `swapped` the two halves of the output stand in the opposite order (adaLN's scale and shift);
    with `transposed` the original stores the weight as (in, out); with `rotary` it interleaves the two halves of each
    attention head, as Meta's Llama does.
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
    """The naming that numbers the parts of a stack behind its name: OMI's, of OneTrainer (modules/util/convert/lora).

    `instead` are names of wholes that it calls differently.
    """
    for link in links:
        whole = (instead or {}).get(link.whole, link.whole)
        if len(link.parts) == 1:
            yield replace(link, whole=whole)
        else:
            yield from (Link((part,), f"{whole}.{number}") for number, part in enumerate(link.parts))


def flat(path: str) -> str:
    """kohya's spelling of a module path: dots become underscores."""
    return path.replace(".", "_")


def mentioned(links: Iterable[Link]) -> tuple[set[str], set[str]]:
    """All module paths of the one naming, and all of the other."""
    rows = list(links)
    return {part for link in rows for part in link.parts}, {link.whole for link in rows}


def _join(block: str, name: str) -> str:
    return f"{block}.{name}" if block and name else block or name


@dataclass(frozen=True, slots=True, order=True)
class Module:
    """A module of the base as an adapter names it: its component (`unet`, `te1`, "" for a model without any), its
    path there, dotted or flattened, and the whole `stem` that its keys share in the file."""

    component: str
    path: str
    stem: str

    def __str__(self) -> str:
        return self.stem
