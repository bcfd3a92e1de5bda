"""Lumina-Image 2.0 and Z-Image: NextDiT, whose original stacks q, k and v, the first with fewer heads for k and v.

Source: diffusers loaders/single_file_utils.py (convert_lumina2_to_diffusers, convert_z_image_transformer_…). Adapters for
Z-Image come in both namings: musubi and diffusers train q, k and v apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratool.archs.links import Link, fuse, rename, same
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import language_model
from loratool.names import DIFFUSERS, KOHYA, ORIGINAL, UNET

REFINERS = (("noise_refiner", 2), ("context_refiner", 2))

LUMINA_TOP = {
    "x_embedder": "x_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.0": "cap_embedder.0",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
LUMINA_BLOCK = {
    "attn.to_out.0": "attention.out",
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm2": "attention_norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}
LUMINA_MODULATED = {"norm1.linear": "adaLN_modulation.1", "norm1.norm": "attention_norm1"}


def lumina2() -> Iterator[Link]:
    """Lumina-Image 2.0, whose context refiner is not modulated."""
    yield from rename("", "", LUMINA_TOP)
    for name, count in (*REFINERS, ("layers", 26)):
        for i in range(count):
            block = f"{name}.{i}"
            modulation = {"norm1": "attention_norm1"} if name == "context_refiner" else LUMINA_MODULATED
            yield from rename(block, block, LUMINA_BLOCK | modulation)
            yield fuse(block, "attn.to_q attn.to_k attn.to_v", f"{block}.attention.qkv", (3, 1, 1))


Z_TOP = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}
Z_ATTENTION = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
Z_SAME = "feed_forward.w1 feed_forward.w2 feed_forward.w3 attention_norm1 attention_norm2 ffn_norm1 ffn_norm2"


def z_image() -> Iterator[Link]:
    """Z-Image."""
    yield from rename("", "", Z_TOP)
    yield from same("", "t_embedder.mlp.0 t_embedder.mlp.2 cap_embedder.0 cap_embedder.1")
    for name, count in (*REFINERS, ("layers", 30)):
        for i in range(count):
            block = f"{name}.{i}"
            yield from same(block, Z_SAME + ("" if name == "context_refiner" else " adaLN_modulation.0"))
            yield from rename(f"{block}.attention", f"{block}.attention", Z_ATTENTION)
            yield fuse(f"{block}.attention", "to_q to_k to_v", f"{block}.attention.qkv")


LUMINA2 = Arch(
    "lumina2",
    "Lumina-Image 2.0",
    (
        Component(UNET, {ORIGINAL: lumina2}, {"attn.to_q": 2304, "feed_forward.linear_1": 2304}),
        language_model("gemma2_2b", 26, 2304),
    ),
    ("lumina2", "lumina-2"),
)
Z_IMAGE = Arch(
    "z-image",
    "Z-Image",
    (
        # musubi trains diffusers' modules, and has a converter for ComfyUI (networks/convert_z_image_lora_to_comfy.py).
        Component(UNET, {ORIGINAL: z_image}, {"attention.to_q": 3840, "feed_forward.w1": 3840}, same={KOHYA: DIFFUSERS}),
        language_model("qwen3_4b", 36, 2560),
    ),
    ("zimage", "z_image", "z-image"),
)
