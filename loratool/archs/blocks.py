"""The blocks of models, and the vectors of block weights that Stable Diffusion's users know. No torch.

Sources: hako-mikan's sd-webui-lora-block-weight (BLOCKID12, 17, 20 and 26), and sd-scripts networks/svd_merge_lora.py
(get_lbw_block_index), which agree on what each number is for. In blocks that a vector does not name, the first drops what an
adapter changes, the second keeps the changes; so does loratool.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from loratool.archs.table import Arch
from loratool.errors import LoratoolError
from loratool.names import ENCODERS, ORIGINAL, Module

BASE: Final = "BASE"
"""The block of all text encoders."""


def _block_named(inputs: Sequence[int], outputs: Sequence[int]) -> tuple[str, ...]:
    return (BASE, *(f"IN{i:02}" for i in inputs), "M00", *(f"OUT{i:02}" for i in outputs))


VECTORS: Final[Mapping[int, tuple[str, ...]]] = {
    12: _block_named((4, 5, 7, 8), range(6)),
    17: _block_named((1, 2, 4, 5, 7, 8), range(3, 12)),
    20: _block_named(range(9), range(9)),
    26: _block_named(range(12), range(12)),
}
"""The blocks of a vector, by its length: 12 and 17 weights are for the blocks with attention, of SDXL and of SD1."""
VECTOR_LENGTHS: Final[Mapping[str, tuple[int, ...]]] = {
    "sd1": (17, 26), "sd2": (17, 26), "sdxl": (12, 20), "ssd-1b": (12, 20), "vega": (12, 20),
}  # fmt: skip
"""The lengths of the vectors that each architecture has."""

_EMBEDDINGS: Final = ("time_embed.", "label_emb.")
"""Modules that sd-scripts counts to SDXL's first block."""
_NUMBERED = re.compile(r".*?(?<=\.)\d+(?=\.)")
"""The beginning of a module path, up to its first number."""


def block_of(arch: Arch, module: Module) -> str:
    """The block that `module` is in: IN00 to OUT11 in a U-Net and BASE for its text encoders; in other models what stands
    before the first number of its path and the number, or the component where there is none."""
    places = arch.readings_of(module)
    if not places:
        return module.component or module.path.partition(".")[0]
    component, reading = places[0]
    if arch.name not in VECTOR_LENGTHS:
        found = _NUMBERED.match(reading.parts[0])
        return found[0] if found and component.name not in ENCODERS else component.name or reading.parts[0].partition(".")[0]
    if component.name in ENCODERS:
        return BASE
    # Vectors count blocks as LDM's own code does; any part of a module lies in the module's block.
    whole = component.owners[ORIGINAL][reading.parts[0]].whole
    side, _, rest = whole.partition(".")
    if side in ("input_blocks", "output_blocks"):
        return f"{'IN' if side == 'input_blocks' else 'OUT'}{int(rest.partition('.')[0]):02}"
    if side == "middle_block":
        return "M00"
    # sd-scripts counts embeddings to a block for SDXL alone, whose vectors are known by the length 20.
    return "IN00" if whole.startswith(_EMBEDDINGS) and 20 in VECTOR_LENGTHS[arch.name] else side


def block_strengths(vector: Sequence[float], arch: Arch) -> dict[str, float]:
    """The weight of each block that a vector names; raises `LoratoolError` where the architecture has no such vector."""
    lengths = VECTOR_LENGTHS.get(arch.name, ())
    if len(vector) not in lengths:
        takes = f"takes {' or '.join(map(str, lengths))}" if lengths else "has no such vectors: weigh blocks by their names"
        raise LoratoolError(f"a vector of {len(vector)} block weights: {arch.title} {takes}")
    return dict(zip(VECTORS[len(vector)], vector, strict=True))
