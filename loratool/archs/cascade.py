"""Stable Cascade's prior (stage C): residual, timestep and attention blocks in turn.

The checkpoint stacks q, k and v in one raw parameter; ComfyUI and OneTrainer's own files have them apart.
Source: diffusers loaders/single_file_utils.py (convert_stable_cascade_unet_single_file_to_diffusers), ComfyUI
comfy/lora.py, OneTrainer modules/util/convert/lora.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratool.archs.links import Link, apart, fuse, rename, same
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import open_clip
from loratool.names import CHECKPOINT, OMI, ORIGINAL, TE1, UNET

LEVELS = (("down_blocks.0", 8), ("down_blocks.1", 24), ("up_blocks.0", 24), ("up_blocks.1", 8))


def blocks() -> Iterator[Link]:
    """What all namings call alike: all but the attention itself."""
    yield from same("", "clip_txt_pooled_mapper clip_txt_mapper clip_img_mapper embedding.1 clf.1")
    # Where a level has several downscalers and upscalers, they are blocks of a sequence.
    yield from same("", "down_downscalers.1.1 down_downscalers.1.1.blocks.0 up_upscalers.0.1 up_upscalers.0.1.blocks.1")
    for level, count in LEVELS:
        for i in range(count):
            yield from same(f"{level}.{3 * i}", "depthwise channelwise.0 channelwise.4")
            yield from same(f"{level}.{3 * i + 1}", "mapper mapper_sca mapper_crp")
            yield from same(f"{level}.{3 * i + 2}", "kv_mapper.1")


def attentions() -> Iterator[tuple[str, str]]:
    """Each attention in diffusers' naming, and in the others'."""
    for level, count in LEVELS:
        for i in range(count):
            block = f"{level}.{3 * i + 2}.attention"
            yield block, f"{block}.attn"


def stored_names() -> Iterator[Link]:
    """The checkpoint."""
    yield from blocks()
    for ours, theirs in attentions():
        yield Link((f"{ours}.to_out.0",), f"{theirs}.out_proj")
        yield fuse(ours, "to_q to_k to_v", f"{theirs}.in_proj")


def comfy() -> Iterator[Link]:
    """ComfyUI, and what was trained for it."""
    yield from blocks()
    for ours, theirs in attentions():
        yield from rename(ours, theirs, {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "out_proj"})


CASCADE = Arch(
    "cascade",
    "Stable Cascade",
    (
        Component(
            UNET,
            {ORIGINAL: comfy, CHECKPOINT: stored_names, OMI: lambda: apart(stored_names())},
            {"to_q": 2048, "kv_mapper.1": 2048},
            folder="prior",
            kohya="prior_unet",
        ),
        open_clip(32, 1280, 694_659_840, TE1, kohya="prior_te"),
    ),
    ("stable-cascade", "stable_cascade", "cascade"),
)
