"""HiDream-I1: one naming everywhere, with experts (diffusers models/transformers/transformer_hidream_image.py)."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.archs.links import Link, same
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import clip_l, open_clip, t5_xxl
from loratool.names import ORIGINAL, TE3, UNET

_TOP = (
    "t_embedder.timestep_embedder.linear_1 t_embedder.timestep_embedder.linear_2 "
    "p_embedder.pooled_embedder.linear_1 p_embedder.pooled_embedder.linear_2 "
    "x_embedder.proj final_layer.linear final_layer.adaLN_modulation.1"
)
_ATTENTION = "to_q to_k to_v to_out q_rms_norm k_rms_norm"
_TEXT = "to_q_t to_k_t to_v_t to_out_t q_rms_norm_t k_rms_norm_t"
GATED = "w1 w2 w3"


def hidream() -> Iterator[Link]:
    """16 double blocks, 32 single ones, 4 experts in each beside the shared one."""
    yield from same("", _TOP)
    yield from same("", " ".join(f"caption_projection.{i}.linear" for i in range(49)))
    for name, count in (("double_stream_blocks", 16), ("single_stream_blocks", 32)):
        for i in range(count):
            block = f"{name}.{i}.block"
            yield from same(block, "adaLN_modulation.1 ff_i.gate")
            yield from same(f"{block}.attn1", _ATTENTION)
            for expert in ("shared_experts", *(f"experts.{n}" for n in range(4))):
                yield from same(f"{block}.ff_i.{expert}", GATED)
    for i in range(16):
        yield from same(f"double_stream_blocks.{i}.block.attn1", _TEXT)
        yield from same(f"double_stream_blocks.{i}.block.ff_t", GATED)


HIDREAM = Arch(
    "hidream",
    "HiDream-I1",
    (
        Component(UNET, {ORIGINAL: hidream}, {"attn1.to_q": 2560, "attn1.to_q_t": 2560}),
        clip_l(projected=True),
        open_clip(32, 1280, 694_659_840),
        t5_xxl(TE3),
    ),
    ("hidream",),
)
