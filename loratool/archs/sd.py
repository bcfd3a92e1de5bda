"""Stable Diffusion 1, 2 and XL: the U-Net of LDM against that of diffusers, and the two text encoders.

Source: diffusers scripts/convert_diffusers_to_original_stable_diffusion.py and loaders/single_file_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loratool.archs.table import Arch, Component
from loratool.archs.text import clip, openclip
from loratool.formats.prefixes import TE1, TE2, UNET
from loratool.names import Link, rename

TOP = {
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
BLOCK = (
    *(f"attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3",
)  # fmt: skip


def attention(depth: int) -> dict[str, str]:
    """A spatial transformer of `depth` blocks, called alike in both namings."""
    inner = [f"transformer_blocks.{k}.{leaf}" for k in range(depth) for leaf in BLOCK]
    return {name: name for name in ("norm", "proj_in", "proj_out", *inner)}


def unet(depths: tuple[int, ...], widths: tuple[int, ...], added: dict[str, str] | None = None) -> Iterator[Link]:
    """A U-Net whose resolution levels have transformers of `depths` blocks (0: none) and `widths` in units of the first.

    The middle is as deep as the deepest level. A ResNet has a shortcut only where it changes the width.
    """
    yield from rename("", "", TOP | (added or {}))
    last = len(depths) - 1
    for i, depth in enumerate(depths):
        for j in range(2):
            wider = i > 0 and j == 0 and widths[i] != widths[i - 1]
            yield from _layer(f"down_blocks.{i}", j, f"input_blocks.{3 * i + j + 1}", depth, shortcut=wider)
        if i < last:
            yield Link((f"down_blocks.{i}.downsamplers.0.conv",), f"input_blocks.{3 * i + 3}.0.op")
    yield from _layer("mid_block", 0, "middle_block", max(depths), shortcut=False)
    yield from rename("mid_block.resnets.1", "middle_block.2", RESNET)
    for i, depth in enumerate(reversed(depths)):
        for j in range(3):
            yield from _layer(f"up_blocks.{i}", j, f"output_blocks.{3 * i + j}", depth, shortcut=True)
        if i < last:
            place = 2 if depth else 1
            yield Link((f"up_blocks.{i}.upsamplers.0.conv",), f"output_blocks.{3 * i + 2}.{place}.conv")


def _layer(ours: str, j: int, theirs: str, depth: int, *, shortcut: bool) -> Iterator[Link]:
    """Layer `j` of a block: a ResNet, and a spatial transformer where there is one."""
    yield from rename(f"{ours}.resnets.{j}", f"{theirs}.0", RESNET | (SHORTCUT if shortcut else {}))
    if depth:
        yield from rename(f"{ours}.attentions.{j}", f"{theirs}.1", attention(depth))


CLIP_L = Component(TE1, partial(clip, 12), {"layers.0.self_attn.q_proj": 768, "layers.0.mlp.fc1": 768}, 123_060_480)

SD1 = Arch(
    "sd1",
    "Stable Diffusion 1.x",
    (
        Component(UNET, partial(unet, (1, 1, 1, 0), (1, 2, 4, 4)), {"attn2.to_k": 768, "attn2.to_v": 768}, 859_520_964),
        CLIP_L,
    ),
)
SD2 = Arch(
    "sd2",
    "Stable Diffusion 2.x",
    (
        Component(UNET, partial(unet, (1, 1, 1, 0), (1, 2, 4, 4)), {"attn2.to_k": 1024, "attn2.to_v": 1024}, 865_910_724),
        Component(TE1, partial(openclip, 24), {"self_attn.q_proj": 1024, "mlp.fc1": 1024}, 340_387_840),
    ),
)
SDXL = Arch(
    "sdxl",
    "Stable Diffusion XL",
    (
        Component(
            UNET, partial(unet, (0, 2, 10), (1, 2, 4), ADDED), {"attn2.to_k": 2048, "attn2.to_v": 2048}, 2_567_463_684
        ),
        CLIP_L,
        Component(TE2, partial(openclip, 32), {"self_attn.q_proj": 1280, "mlp.fc1": 1280}, 694_659_840),
    ),
)
