"""CLIP text encoders: the names of transformers, which LDM and SGM checkpoints keep for CLIP-L, and OpenCLIP's.

Source: open_clip's transformer.py and diffusers loaders/single_file_utils.py (convert_open_clip_checkpoint).
"""

from __future__ import annotations

from collections.abc import Iterator

from loratool.names import Link, fuse, rename

EMBEDDINGS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "positional_embedding",
    "final_layer_norm": "ln_final",
}
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"


def clip(layers: int) -> Iterator[Link]:
    """CLIP of `layers` layers, called alike everywhere."""
    for link in openclip(layers):
        for part in link.parts:
            yield Link((part,), part)


def openclip(layers: int) -> Iterator[Link]:
    """OpenCLIP of `layers` layers, whose q, k and v are one raw parameter, and whose projection is stored transposed."""
    yield from rename("text_model", "", EMBEDDINGS)
    yield Link(("text_projection",), "text_projection", transposed=True)
    for i in range(layers):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        yield from rename(ours, theirs, LAYER)
        yield fuse(ours, ATTENTION, f"{theirs}.attn.in_proj")
