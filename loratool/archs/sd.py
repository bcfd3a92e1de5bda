"""Stable Diffusion 1, 2 and XL, its refiner and its distilled kin: the U-Net of LDM against that of diffusers.

Source: diffusers scripts/convert_diffusers_to_original_stable_diffusion.py and loaders/single_file_utils.py; SSD-1B and
Vega as Segmind released them (their config.json).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

from loratool.archs.links import Link, rename
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import clip_l, open_clip
from loratool.names import DIFFUSERS, KOHYA, ORIGINAL, TE1, UNET

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
SHORTCUT = {"conv_shortcut": "skip_connection"}
_BLOCK = (
    *(f"attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class UNetShape:
    """The levels of a U-Net: `down` and `up` have the depth of the spatial transformer behind each ResNet (0: none),
    `widths` the levels' widths in units of the first; `middle` is the depth in the middle, None for a single ResNet.
    `added` says that there are embeddings of size and crop.
    """

    down: Sequence[tuple[int, int]]
    up: Sequence[tuple[int, int, int]]
    widths: Sequence[int]
    middle: int | None
    added: bool = False


FOUR = UNetShape(((1, 1), (1, 1), (1, 1), (0, 0)), ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)), (1, 2, 4, 4), 1)
XL = UNetShape(((0, 0), (2, 2), (10, 10)), ((10, 10, 10), (2, 2, 2), (0, 0, 0)), (1, 2, 4), 10, added=True)
_REFINER = UNetShape(
    ((0, 0), (4, 4), (4, 4), (0, 0)), ((0, 0, 0), (4, 4, 4), (4, 4, 4), (0, 0, 0)), (1, 2, 4, 4), 4, added=True
)
SEGMIND = UNetShape(((0, 0), (2, 2), (4, 4)), ((4, 4, 10), (2, 1, 1), (0, 0, 0)), (1, 2, 4), None, added=True)
_SMALL = UNetShape(((0, 0), (1, 1), (2, 2)), ((2, 2, 2), (1, 1, 1), (0, 0, 0)), (1, 2, 4), None, added=True)


def attention(depth: int) -> dict[str, str]:
    """A spatial transformer of `depth` blocks, called alike in both namings."""
    inner = [f"transformer_blocks.{k}.{leaf}" for k in range(depth) for leaf in _BLOCK]
    return {name: name for name in ("norm", "proj_in", "proj_out", *inner)}


def unet(shape: UNetShape) -> Iterator[Link]:
    """A U-Net of `shape`. A ResNet has a shortcut only where it changes the width."""
    yield from rename("", "", _TOP | (ADDED if shape.added else {}))
    # LDM numbers all layers of a side in one row, three to a level: two ResNets and the downsampler going down, behind
    # conv_in as number 0, and three ResNets going up.
    last = len(shape.down) - 1
    for i, depths in enumerate(shape.down):
        for j, depth in enumerate(depths):
            wider = i > 0 and j == 0 and shape.widths[i] != shape.widths[i - 1]
            yield from _layer(f"down_blocks.{i}", j, f"input_blocks.{3 * i + j + 1}", depth, shortcut=wider)
        if i < last:
            yield Link((f"down_blocks.{i}.downsamplers.0.conv",), f"input_blocks.{3 * i + 3}.0.op")
    yield from _layer("mid_block", 0, "middle_block", shape.middle or 0, shortcut=False)
    if shape.middle is not None:
        yield from rename("mid_block.resnets.1", "middle_block.2", RESNET)
    for i, places in enumerate(shape.up):
        for j, depth in enumerate(places):
            # Going up, every ResNet has the skipped features as further inputs, and so a shortcut.
            yield from _layer(f"up_blocks.{i}", j, f"output_blocks.{3 * i + j}", depth, shortcut=True)
        if i < last:
            # An upsampler is the last part of the layer in front of it, behind the spatial transformer if there is one.
            yield Link((f"up_blocks.{i}.upsamplers.0.conv",), f"output_blocks.{3 * i + 2}.{2 if places[2] else 1}.conv")


@cache
def _links(shape: UNetShape) -> tuple[Link, ...]:
    """The links of a U-Net of `shape`, made once for architectures that share the shape, as SD1 and SD2 do."""
    return tuple(unet(shape))


def _layer(ours: str, j: int, theirs: str, depth: int, *, shortcut: bool) -> Iterator[Link]:
    """Layer `j` of a block: a ResNet, and a spatial transformer where there is one."""
    yield from rename(f"{ours}.resnets.{j}", f"{theirs}.0", RESNET | (SHORTCUT if shortcut else {}))
    if depth:
        yield from rename(f"{ours}.attentions.{j}", f"{theirs}.1", attention(depth))


def _unet(shape: UNetShape, context: int, parameters: int) -> Component:
    # kohya spells SD1 and SD2 as diffusers does, SDXL as the original (sd-scripts networks/lora.py).
    same = {KOHYA: DIFFUSERS} if shape is FOUR else {}
    inputs = {"attn2.to_k": context, "attn2.to_v": context}
    return Component(UNET, {ORIGINAL: partial(_links, shape)}, inputs, parameters, folder="unet", same=same)


BIG_G = open_clip(32, 1280, 694_659_840)

SD1 = Arch(
    "sd1",
    "Stable Diffusion 1.x",
    (_unet(FOUR, 768, 859_520_964), clip_l(kohya="te")),
    ("sd_v1", "sd_1", "stable-diffusion-v1"),
)
SD2 = Arch(
    "sd2",
    "Stable Diffusion 2.x",
    (_unet(FOUR, 1024, 865_910_724), open_clip(24, 1024, 340_387_840, TE1, "clip_h", kohya="te")),
    ("sd_v2", "sd_2", "stable-diffusion-v2"),
)
SDXL = Arch(
    "sdxl",
    "Stable Diffusion XL",
    (_unet(XL, 2048, 2_567_463_684), clip_l(), BIG_G),
    ("sdxl_base", "sdxl_1.0", "sdxl", "stable-diffusion-xl-v1-base"),
)
SDXL_REFINER = Arch(
    "sdxl-refiner",
    "Stable Diffusion XL Refiner",
    (_unet(_REFINER, 1280, 0), open_clip(32, 1280, 694_659_840, TE1, folder="text_encoder_2", kohya="te2")),
    ("sdxl_refiner", "stable-diffusion-xl-v1-refiner"),
)
SSD1B = Arch("ssd-1b", "SSD-1B", (_unet(SEGMIND, 2048, 0), clip_l(), BIG_G), ("ssd", "segmind"))
VEGA = Arch("vega", "Segmind Vega", (_unet(_SMALL, 2048, 0), clip_l(), BIG_G), ("vega",))
