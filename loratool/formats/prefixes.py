"""The beginnings of keys and of base tensors: which component of a model each known prefix names. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from loratool.formats.leaves import CONTAINER
from loratool.names import Module

UNET: Final = "unet"
TE1: Final = "te1"
TE2: Final = "te2"
TE3: Final = "te3"
CONDITIONER: Final = "conditioner"
"""Anima's adapter of its language model: inside the transformer in its checkpoint, beside it in diffusers."""
VAE: Final = "vae"
EMA: Final = "ema"
WHOLE: Final = ""
"""The component of a model that has no others: a language model, a bare transformer."""

ENCODERS: Final = (TE1, TE2, TE3)
COMPONENTS: Final = (UNET, CONDITIONER, *ENCODERS)

COMFY_ENCODERS: Final = {
    "clip_l": TE1, "clip_h": TE1, "clip_g": TE2, "t5xxl": TE3, "umt5xxl": TE1, "llama": TE1, "qwen25_7b": TE1,
    "qwen3_06b": TE1, "qwen3_4b": TE1, "qwen3_8b": TE1, "gemma2_2b": TE1,
}  # fmt: skip
"""What ComfyUI calls text encoders (comfy/text_encoders)."""

ADAPTER_PREFIXES: Final[Sequence[tuple[str, str]]] = (
    # flattened: kohya and those who follow it
    ("lora_unet_llm_adapter_", CONDITIONER), ("lora_unet_net_", UNET), ("lora_unet__", UNET), ("lora_unet_", UNET),
    ("lora_transformer_", UNET), ("lora_prior_unet_", UNET),
    ("lora_te1_", TE1), ("lora_te2_", TE2), ("lora_te3_", TE3), ("lora_te_", TE1), ("lora_prior_te_", TE1),
    ("oft_unet_", UNET), ("lycoris_", WHOLE),
    # dotted: diffusers pipelines, ComfyUI, OneTrainer's OMI
    ("diffusion_model.llm_adapter.", CONDITIONER), ("text_conditioner.", CONDITIONER),
    ("unet.", UNET), ("transformer.", UNET), ("model.diffusion_model.", UNET), ("diffusion_model.", UNET), ("prior.", UNET),
    ("net.", UNET), ("text_encoder.", TE1), ("text_encoder_2.", TE2), ("text_encoder_3.", TE3),
    *((f"text_encoders.{name}.transformer.", component) for name, component in COMFY_ENCODERS.items()),
    ("clip_l.", TE1), ("clip_g.", TE2), ("t5.", TE3),
)  # fmt: skip
"""What adapters put before a module's path, longest first where one begins with another."""

BASE_PREFIXES: Final[Sequence[tuple[str, str]]] = (
    # diffusers folders, one per component
    ("unet/", UNET), ("transformer/", UNET), ("prior/", UNET), ("text_conditioner/", CONDITIONER),
    ("text_encoder/", TE1), ("text_encoder_2/", TE2), ("text_encoder_3/", TE3), ("vae/", VAE),
    # single-file checkpoints: LDM (SD1, SD2), SGM (SDXL), ComfyUI
    ("model.diffusion_model.llm_adapter.", CONDITIONER), ("net.llm_adapter.", CONDITIONER),
    ("model.diffusion_model.", UNET), ("net.", UNET),
    ("cond_stage_model.transformer.", TE1), ("cond_stage_model.model.", TE1),
    ("conditioner.embedders.0.transformer.", TE1), ("conditioner.embedders.0.model.", TE1),
    ("conditioner.embedders.1.model.", TE2),
    *((f"text_encoders.{name}.transformer.", component) for name, component in COMFY_ENCODERS.items()),
    ("first_stage_model.", VAE), ("vae.", VAE), ("model_ema.", EMA),
)  # fmt: skip
"""What checkpoints put before the names of one component's tensors."""


def adapter_component(stem: str) -> tuple[str, str]:
    """(component, module path) of an adapter's stem; behind PEFT's container the path is the wrapped model's own."""
    if stem.startswith(CONTAINER):
        return WHOLE, stem.removeprefix(CONTAINER)
    for prefix, component in ADAPTER_PREFIXES:
        if stem.startswith(prefix):
            return component, stem.removeprefix(prefix)
    return WHOLE, stem


def base_component(name: str) -> tuple[str, str, str]:
    """(component, prefix, name behind the prefix) of a base checkpoint's tensor."""
    for prefix, component in BASE_PREFIXES:
        if name.startswith(prefix):
            return component, prefix, name.removeprefix(prefix)
    return WHOLE, "", name


def readings(module: Module) -> Iterator[tuple[str, str]]:
    """The component and path that a module's name may mean: as its prefix says, then by a prefix behind PEFT's container."""
    yield module.component, module.path
    if module.component == WHOLE:
        component, path = adapter_component(module.path)
        if component != WHOLE:
            yield component, path
