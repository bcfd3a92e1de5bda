"""Wan 2.1 and 2.2: pure renames, for text and for image to video, with VACE's side blocks.

Source: diffusers loaders/single_file_utils.py (convert_wan_transformer_to_diffusers). The two experts of 2.2 A14B are two
files of the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loratool.archs.links import Link, rename
from loratool.archs.table import Arch, Component
from loratool.names import ORIGINAL, UNET

_TOP = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
}
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}
REST = {"scale_shift_table": "modulation", "norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}


def wan(blocks: int, vace: int) -> Iterator[Link]:
    """`blocks` blocks, and `vace` side blocks, of which the first has a projection in."""
    yield from rename("", "", _TOP)
    for name, count in (("blocks", blocks), ("vace_blocks", vace)):
        for i in range(count):
            block = f"{name}.{i}"
            yield from rename(f"{block}.attn1", f"{block}.self_attn", _ATTENTION)
            yield from rename(f"{block}.attn2", f"{block}.cross_attn", _ATTENTION | _IMAGE)
            yield from rename(block, block, REST)
    for i in range(vace):
        ends = {"proj_out": "after_proj"} | ({} if i else {"proj_in": "before_proj"})
        yield from rename(f"vace_blocks.{i}", f"vace_blocks.{i}", ends)


def _wan(blocks: int, width: int, vace: int = 0) -> Component:
    inputs = dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj"), width)
    return Component(UNET, {ORIGINAL: partial(wan, blocks, vace)}, inputs)


WAN_1_3B = Arch(
    "wan-1.3b", "Wan 2.1 1.3B", (_wan(30, 1536, 15),), ("wan2.1_t2v_1.3b", "wan21_1_3b", "wan_1.3b", "wan21", "wan2.1")
)
WAN_5B = Arch("wan-5b", "Wan 2.2 5B", (_wan(30, 3072),), ("wan2.2_ti2v_5b", "wan22_5b", "wan_5b", "wan22", "wan2.2"))
WAN_14B = Arch(
    "wan-14b",
    "Wan 2.1 / 2.2 14B",
    (_wan(40, 5120, 8),),
    ("wan2.1_t2v_14b", "wan2.1_i2v_14b", "wan22_14b", "wan21_14b", "wan_14b", "wan21", "wan22", "wan2.1", "wan2.2"),
)
