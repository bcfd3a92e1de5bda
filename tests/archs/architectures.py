"""The real models that architecture tables are checked against: diffusers' own, at full size, without weights."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

HIDREAM: Mapping[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "max_resolution": (128, 128),
    "llama_layers": [0] * 48,
}
SEGMIND: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sd1": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "sd2": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    ),
    "sdxl": ("UNet2DConditionModel", {**SEGMIND, "transformer_layers_per_block": (1, 2, 10)}),
    "sdxl-refiner": (
        "UNet2DConditionModel",
        {
            **SEGMIND,
            "block_out_channels": (384, 768, 1536, 1536),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": 4,
            "attention_head_dim": (6, 12, 24, 24),
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
        },
    ),
    "ssd-1b": (
        "UNet2DConditionModel",
        {
            **SEGMIND,
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": (1, (2, 2), (4, 4)),
            "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        },
    ),
    "vega": (
        "UNet2DConditionModel",
        {**SEGMIND, "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": (1, 1, 2)},
    ),
    "sd3-medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "sd3.5-large": (
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
    ),
    "flux1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux2-dev": ("Flux2Transformer2DModel", {}),
    "flux2-klein-9b": (
        "Flux2Transformer2DModel",
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    ),
    "flux2-klein-4b": (
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
    "chroma": ("ChromaTransformer2DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", {}),
    "z-image": ("ZImageTransformer2DModel", {}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "hidream": ("HiDreamImageTransformer2DModel", HIDREAM),
    "auraflow": ("AuraFlowTransformer2DModel", {}),
    "pixart": ("PixArtTransformer2DModel", {"use_additional_conditions": True, "caption_channels": 4096}),
    "anima": (
        "CosmosTransformer3DModel",
        {"num_attention_heads": 16, "in_channels": 16, "extra_pos_embed_type": None, "concat_padding_mask": True},
    ),
    "krea2": ("Krea2Transformer2DModel", {}),
    "cascade": ("StableCascadeUNet", {}),
    "hunyuan-image": ("HunyuanImageTransformer2DModel", {}),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {"guidance_embeds": True}),
    "wan-1.3b": ("WanTransformer3DModel", {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}),
    "wan-5b": ("WanTransformer3DModel", {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336}),
    "wan-14b": ("WanVACETransformer3DModel", {"image_dim": 1280, "added_kv_proj_dim": 5120}),
    "ltx-video": ("LTXVideoTransformer3DModel", {}),
    "cogvideox-2b": ("CogVideoXTransformer3DModel", {}),
    "cogvideox-5b": ("CogVideoXTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42}),
}
"""Name of our table: diffusers' class, and what differs from its defaults in the model as released (its config.json)."""

BEYOND: Mapping[str, tuple[str, ...]] = {
    # Image to video, and VACE, of which the models above are one variant each.
    **dict.fromkeys(
        ("wan-1.3b", "wan-5b"),
        ("add_k_proj", "add_v_proj", "norm_added_k", "image_embedder", "vace_", "scale_shift_table"),
    ),
    "wan-14b": ("scale_shift_table",),
    # Stage C's mappers, and its scalers as a sequence.
    "cascade": ("clip_img_mapper", "clip_txt_mapper", ".blocks."),
}
"""Parts of names that a table knows beyond its model here."""

CONVERTERS: Mapping[str, str] = {
    "sd3-medium": "convert_sd3_transformer_checkpoint_to_diffusers",
    "sd3.5-large": "convert_sd3_transformer_checkpoint_to_diffusers",
    "flux1": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux2-dev": "convert_flux2_transformer_checkpoint_to_diffusers",
    "flux2-klein-9b": "convert_flux2_transformer_checkpoint_to_diffusers",
    "flux2-klein-4b": "convert_flux2_transformer_checkpoint_to_diffusers",
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "auraflow": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "anima": "convert_cosmos_transformer_checkpoint_to_diffusers",
    "krea2": "convert_krea2_transformer_checkpoint_to_diffusers",
    "cascade": "convert_stable_cascade_unet_single_file_to_diffusers",
    "hunyuan-video": "convert_hunyuan_video_transformer_to_diffusers",
    "wan-1.3b": "convert_wan_transformer_to_diffusers",
    "wan-5b": "convert_wan_transformer_to_diffusers",
    "wan-14b": "convert_wan_transformer_to_diffusers",
    "ltx-video": "convert_ltx_transformer_checkpoint_to_diffusers",
}
"""diffusers' own conversions from original checkpoints (loaders/single_file_utils.py)."""


RAW: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("sd3-medium", "sd3.5-large"), ("pos_embed",)),
    "auraflow": ("positional_encoding", "register_tokens"),
}
"""Raw parameters that diffusers' conversions insist on, and tables do not speak of."""


@cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the real model, by diffusers' names."""
    import diffusers

    kind, config = MODELS[name]
    # diffusers' own use of what it deprecates is no concern of ours.
    with torch.device("meta"), warnings.catch_warnings(action="ignore", category=FutureWarning):
        model = getattr(diffusers, kind)(**config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def converted(name: str, checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """`checkpoint`, an original's, under diffusers' names, by diffusers."""
    from diffusers.loaders import single_file_utils

    convert: Callable[..., dict[str, Tensor]] = getattr(single_file_utils, CONVERTERS[name])
    checkpoint |= {raw: torch.zeros(1) for raw in RAW.get(name, ())}
    return convert(checkpoint, **({"config": {}} if "config" in inspect.signature(convert).parameters else {}))
