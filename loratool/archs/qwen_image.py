"""Qwen-Image: one naming everywhere (diffusers models/transformers/transformer_qwenimage.py)."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.archs.links import Link, same
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import language_model
from loratool.names import ORIGINAL, UNET

_TOP = (
    "time_text_embed.timestep_embedder.linear_1 time_text_embed.timestep_embedder.linear_2 "
    "txt_norm img_in txt_in norm_out.linear proj_out"
)
_BLOCK = (
    "img_mod.1 txt_mod.1 img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj txt_mlp.net.2 "
    "attn.to_q attn.to_k attn.to_v attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_out.0 attn.to_add_out "
    "attn.norm_q attn.norm_k attn.norm_added_q attn.norm_added_k"
)


def qwen_image() -> Iterator[Link]:
    """60 blocks of two streams."""
    yield from same("", _TOP)
    for i in range(60):
        yield from same(f"transformer_blocks.{i}", _BLOCK)


QWEN_IMAGE = Arch(
    "qwen-image",
    "Qwen-Image",
    (
        Component(UNET, {ORIGINAL: qwen_image}, {"attn.to_q": 3072, "img_mlp.net.0.proj": 3072, "txt_in": 3584}),
        language_model("qwen25_7b", 28, 3584),
    ),
    ("qwen_image", "qwen-image"),
)
