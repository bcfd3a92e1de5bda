"""LTX-Video and CogVideoX: blocks called alike everywhere; LTX's layers at both ends have two names.

Source: diffusers loaders/single_file_utils.py (convert_ltx_transformer_checkpoint_to_diffusers) and
models/transformers/cogvideox_transformer_3d.py. Adapters for CogVideoX use diffusers' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loratool.archs.links import Link, rename, same
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import t5_xxl
from loratool.names import ORIGINAL, TE1, UNET

LINEAR = "to_q to_k to_v to_out.0"
LTX_TOP = {
    "proj_in": "patchify_proj",
    "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
    "time_embed.emb.timestep_embedder.linear_2": "adaln_single.emb.timestep_embedder.linear_2",
    "time_embed.linear": "adaln_single.linear",
}


def ltx() -> Iterator[Link]:
    """LTX-Video: 28 blocks."""
    yield from rename("", "", LTX_TOP)
    yield from same("", "caption_projection.linear_1 caption_projection.linear_2 proj_out")
    for i in range(28):
        block = f"transformer_blocks.{i}"
        yield from same(block, "ff.net.0.proj ff.net.2")
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            yield from same(attention, LINEAR)
            yield from rename(attention, attention, {"norm_q": "q_norm", "norm_k": "k_norm"})


def cogvideox(blocks: int) -> Iterator[Link]:
    """CogVideoX of `blocks` blocks."""
    yield from same("", "patch_embed.proj patch_embed.text_proj time_embedding.linear_1 time_embedding.linear_2")
    yield from same("", "norm_final norm_out.linear norm_out.norm proj_out")
    for i in range(blocks):
        block = f"transformer_blocks.{i}"
        yield from same(block, "norm1.linear norm1.norm norm2.linear norm2.norm ff.net.0.proj ff.net.2")
        yield from same(f"{block}.attn1", f"{LINEAR} norm_q norm_k")


def _cogvideox(blocks: int, width: int) -> Component:
    return Component(UNET, {ORIGINAL: partial(cogvideox, blocks)}, {"attn1.to_q": width, "ff.net.0.proj": width})


LTX_VIDEO = Arch(
    "ltx-video",
    "LTX-Video",
    (Component(UNET, {ORIGINAL: ltx}, {"attn1.to_q": 2048, "attn2.to_k": 2048, "ff.net.0.proj": 2048}), t5_xxl(TE1, "te")),
    ("ltxv", "ltx-video", "ltx_video", "ltx"),
)
COGVIDEOX_2B = Arch("cogvideox-2b", "CogVideoX 2B", (_cogvideox(30, 1920), t5_xxl(TE1, "te")), ("cogvideox-2b",))
COGVIDEOX_5B = Arch("cogvideox-5b", "CogVideoX 5B", (_cogvideox(42, 3072), t5_xxl(TE1, "te")), ("cogvideox-5b",))
