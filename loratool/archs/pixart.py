"""PixArt-α and -Σ, whose original stacks q, k and v of self-attention, and k and v of cross-attention.

Source: diffusers scripts/convert_pixart_sigma_to_diffusers.py and OneTrainer modules/util/convert/lora.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratool.archs.links import Link, apart, fuse, rename
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import t5_xxl
from loratool.names import OMI, ORIGINAL, TE1, UNET

_EMBEDDERS = {"timestep": "t_embedder", "resolution": "csize_embedder", "aspect_ratio": "ar_embedder"}
_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
}
_BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def pixart() -> Iterator[Link]:
    """28 blocks."""
    yield from rename("", "", _TOP)
    for ours, theirs in _EMBEDDERS.items():
        yield from rename(f"adaln_single.emb.{ours}_embedder", theirs, {"linear_1": "mlp.0", "linear_2": "mlp.2"})
    for i in range(28):
        ours, theirs = f"transformer_blocks.{i}", f"blocks.{i}"
        yield from rename(ours, theirs, _BLOCK)
        yield fuse(ours, "attn1.to_q attn1.to_k attn1.to_v", f"{theirs}.attn.qkv")
        yield fuse(ours, "attn2.to_k attn2.to_v", f"{theirs}.cross_attn.kv_linear")


PIXART = Arch(
    "pixart",
    "PixArt-α / Σ",
    (
        Component(
            UNET, {ORIGINAL: pixart, OMI: lambda: apart(pixart())}, {"attn1.to_q": 1152, "attn2.to_k": 1152, "fc1": 1152}
        ),
        t5_xxl(TE1, "te"),
    ),
    ("pixart",),
)
