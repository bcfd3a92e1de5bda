"""Stable Diffusion 3 and 3.5: joint blocks of two streams, with a second attention in the first half of 3.5 medium.

Source: diffusers loaders/single_file_utils.py (convert_sd3_transformer_checkpoint_to_diffusers). The text stream of the
last block ends in an adaLN of two parts, whose order differs like that of the last layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loratool.archs.links import Link, apart, fuse, rename, swap
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import clip_l, open_clip, t5_xxl
from loratool.names import OMI, ORIGINAL, TE3, UNET

_TOP = {
    "context_embedder": "context_embedder",
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
}
_IMAGE = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
}
_TEXT = {
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SECOND = {"attn2.to_out.0": "x_block.attn2.proj", "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k"}


def sd3(blocks: int, dual: int = 0) -> Iterator[Link]:
    """`blocks` joint blocks, the first `dual` of them with a second attention."""
    yield from rename("", "", _TOP)
    yield swap("norm_out.linear", "final_layer.adaLN_modulation.1")
    for i in range(blocks):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        yield from rename(ours, theirs, _IMAGE | (SECOND if i < dual else {}))
        yield fuse(ours, "attn.to_q attn.to_k attn.to_v", f"{theirs}.x_block.attn.qkv")
        yield fuse(ours, "attn.add_q_proj attn.add_k_proj attn.add_v_proj", f"{theirs}.context_block.attn.qkv")
        if i < dual:
            yield fuse(ours, "attn2.to_q attn2.to_k attn2.to_v", f"{theirs}.x_block.attn2.qkv")
        # The last block drops the text stream: its text side has no projection and no feedforward layers.
        if i < blocks - 1:
            yield from rename(ours, theirs, _TEXT)
        else:
            yield swap(f"{ours}.norm1_context.linear", f"{theirs}.context_block.adaLN_modulation.1")


def _sd3(blocks: int, width: int, dual: int = 0) -> Component:
    inputs = dict.fromkeys(("attn.to_q", "attn.add_q_proj", "attn.to_out.0", "norm1.linear"), width)
    original = partial(sd3, blocks, dual)
    return Component(UNET, {ORIGINAL: original, OMI: lambda: apart(original())}, inputs)


_ENCODERS = (clip_l(projected=True), open_clip(32, 1280, 694_659_840), t5_xxl(TE3))

SD3_MEDIUM = Arch(
    "sd3-medium",
    "Stable Diffusion 3 / 3.5 Medium",
    (_sd3(24, 1536, 13), *_ENCODERS),
    ("sd3m", "sd3_m", "sd3.5m", "sd35m", "stable-diffusion-3-m", "stable-diffusion-3.5-m", "stable-diffusion-3-5-m", "sd3"),
)
SD35_LARGE = Arch(
    "sd3.5-large",
    "Stable Diffusion 3.5 Large",
    (_sd3(38, 2432), *_ENCODERS),
    ("sd3l", "sd3.5l", "sd35l", "sd3-5l", "stable-diffusion-3.5-l", "stable-diffusion-3-5-l", "sd3.5_large", "sd3"),
)
