"""What modules are called: the namings, the components of a model, the prefixes that name them, and `Module`. No tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

DIFFUSERS: Final = "diffusers"
"""The naming of diffusers and transformers: the finest one, whose modules are the parts of every link."""
ORIGINAL: Final = "original"
"""That of the model's own code, which its checkpoint, kohya and ComfyUI use."""
COMFYUI: Final = "ComfyUI"
"""ComfyUI's own, where it differs from the original."""
OMI: Final = "OMI"
"""OneTrainer's export: the original's names, with the parts of a stack numbered."""
KOHYA: Final = "kohya"
"""kohya's own, where it is not the original's: SD1 and SD2 have diffusers' names there."""
TRANSFORMERS_5: Final = "transformers 5"
"""transformers 5.6 dropped `text_model.` from the names of a CLIPTextModel in memory, and so from adapters; a
CLIPTextModelWithProjection still has it."""
UNWRAPPED: Final = "unwrapped"
"""A text encoder's names without the attribute that the whole model is in, as some adapters have them."""
XLABS: Final = "XLabs"
"""The attention processors of XLabs' trainer for FLUX."""
CHECKPOINT: Final = "checkpoint"
"""One that stands in checkpoints only, and in no adapter: OpenCLIP's."""

CONTAINER: Final = "base_model.model."
"""What PEFT puts before every key of a wrapped model."""

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


def flat(path: str) -> str:
    """kohya's spelling of a module path: dots become underscores."""
    return path.replace(".", "_")


@dataclass(frozen=True, slots=True, order=True)
class Module:
    """A module of the base as an adapter names it: its component (`unet`, `te1`, "" for a model without any), its
    path there, dotted or flattened, and the whole `stem` that its keys share in the file."""

    component: str
    path: str
    stem: str

    def __str__(self) -> str:
        return self.stem


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


def candidate_names(module: Module) -> Iterator[tuple[str, str]]:
    """The component and path that a module's name may mean: as its prefix says, then by a prefix behind PEFT's container."""
    yield module.component, module.path
    if module.component == WHOLE:
        component, path = adapter_component(module.path)
        if component != WHOLE:
            yield component, path
