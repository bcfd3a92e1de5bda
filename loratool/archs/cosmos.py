"""Anima, on Cosmos-Predict2's transformer: pure renames, and an adapter for its language model.

Source: diffusers loaders/single_file_utils.py (convert_cosmos_transformer_checkpoint_to_diffusers) and
loaders/lora_conversion_utils.py (_convert_non_diffusers_anima_lora_to_diffusers). What Anima's own checkpoint keeps in
`llm_adapter` is a component of its own in diffusers, text_conditioner.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratool.archs.links import Link, rename, same
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import language_model
from loratool.names import CONDITIONER, ORIGINAL, UNET

_TOP = {
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
    "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
    "time_embed.norm": "t_embedding_norm",
    "norm_out.linear_1": "final_layer.adaln_modulation.1",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
    "proj_out": "final_layer.linear",
}
_ATTENTION = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out.0": "output_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
_BLOCK = {
    **{f"norm{n}.linear_{m}": f"adaln_modulation_{part}.{m}"
       for n, part in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp")) for m in (1, 2)},
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
}  # fmt: skip


def cosmos() -> Iterator[Link]:
    """28 blocks."""
    yield from rename("", "", _TOP)
    for i in range(28):
        ours, theirs = f"transformer_blocks.{i}", f"blocks.{i}"
        yield from rename(f"{ours}.attn1", f"{theirs}.self_attn", _ATTENTION)
        yield from rename(f"{ours}.attn2", f"{theirs}.cross_attn", _ATTENTION)
        yield from rename(ours, theirs, _BLOCK)


def conditioner() -> Iterator[Link]:
    """The adapter between Qwen3 and the transformer, called alike everywhere."""
    yield from same("", "embed norm out_proj")
    for i in range(6):
        block = f"blocks.{i}"
        yield from same(block, "mlp.0 mlp.2 norm_self_attn norm_cross_attn norm_mlp")
        for attention in ("self_attn", "cross_attn"):
            yield from same(f"{block}.{attention}", "q_proj k_proj v_proj o_proj q_norm k_norm")


ANIMA = Arch(
    "anima",
    "Anima (Cosmos-Predict2)",
    (
        Component(UNET, {ORIGINAL: cosmos}, {"attn1.to_q": 2048, "attn2.to_q": 2048, "attn2.to_k": 1024}),
        Component(CONDITIONER, {ORIGINAL: conditioner}, folder="text_conditioner", inside="llm_adapter"),
        language_model("qwen3_06b", 28, 1024),
    ),
    ("anima", "cosmos"),
)
