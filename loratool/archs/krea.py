"""Krea 2: pure renames (diffusers loaders/single_file_utils.py, convert_krea2_transformer_checkpoint_to_diffusers)."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.archs.links import Link, rename
from loratool.archs.table import Arch, Component
from loratool.names import ORIGINAL, UNET

_TOP = {
    "img_in": "first",
    "final_layer.linear": "last.linear",
    "final_layer.norm": "last.norm",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.norm": "txtmlp.0",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
}
_BLOCK = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_out.0": "attn.wo",
    "attn.to_gate": "attn.gate",
    "attn.norm_q": "attn.qknorm.qnorm",
    "attn.norm_k": "attn.qknorm.knorm",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
    "norm1": "prenorm",
    "norm2": "postnorm",
}
GROUPS = (
    ("transformer_blocks", "blocks", 28),
    ("text_fusion.layerwise_blocks", "txtfusion.layerwise_blocks", 2),
    ("text_fusion.refiner_blocks", "txtfusion.refiner_blocks", 2),
)


def krea2() -> Iterator[Link]:
    """28 blocks behind the fusion of text layers."""
    yield from rename("", "", _TOP)
    for ours, theirs, count in GROUPS:
        for i in range(count):
            yield from rename(f"{ours}.{i}", f"{theirs}.{i}", _BLOCK)


KREA2 = Arch(
    "krea2", "Krea 2", (Component(UNET, {ORIGINAL: krea2}, {"img_in": 64, "time_mod_proj": 6144}),), ("krea2", "krea-2")
)
