"""The names of modules: the namings, the components of a model, the prefixes of components, and `Module`. No tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

DIFFUSERS: Final = "diffusers"
"""The naming of diffusers and transformers: the finest naming, whose modules are the parts of every link."""
ORIGINAL: Final = "original"
"""The naming of the model's own code, which its checkpoint, kohya and ComfyUI use."""
COMFYUI: Final = "ComfyUI"
"""ComfyUI's own naming, where that differs from the original."""
OMI: Final = "OMI"
"""The naming of OneTrainer's export: the original's names, with the parts of a stack numbered."""
KOHYA: Final = "kohya"
"""kohya's own naming, where that is not the original's: SD1 and SD2 have diffusers' names there."""
TRANSFORMERS_5: Final = "transformers 5"
"""The naming since transformers 5.6, which dropped `text_model.` from the names of a CLIPTextModel in memory, and so from
adapters; a CLIPTextModelWithProjection still has that part."""
UNWRAPPED: Final = "unwrapped"
"""A text encoder's names without the attribute that holds the whole model, as some adapters have them."""
XLABS: Final = "XLabs"
"""The naming of XLabs' trainer for FLUX, after its attention processors."""
CHECKPOINT: Final = "checkpoint"
"""A naming that stands in checkpoints only, and in no adapter: OpenCLIP's."""

CONTAINER: Final = "base_model.model."
"""The prefix that PEFT puts before every key of a wrapped model."""

WRAPPERS: Final = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
"""What wrappers call the module in them, anywhere in a path: torch.compile, FSDP, activation checkpointing, Lightning."""
WRAPPERS_IN_FRONT: Final = ("module", "pretrained_model")
"""What wrappers of a whole model call it: DistributedDataParallel and DeepSpeed, TRL's value heads. Deeper in a path a model
may have such names itself (LeViT's residual layers have `module`)."""

UNET: Final = "unet"
TE1: Final = "te1"
TE2: Final = "te2"
TE3: Final = "te3"
CONDITIONER: Final = "conditioner"
"""Anima's adapter of its language model: inside the transformer in its checkpoint, beside it in diffusers."""
VAE: Final = "vae"
EMA: Final = "ema"
WHOLE: Final = ""
"""The only component of a model without parts: a language model, a bare transformer."""

ENCODERS: Final = (TE1, TE2, TE3)
COMPONENTS: Final = (UNET, CONDITIONER, *ENCODERS)

COMFY_ENCODERS: Final = {
    "clip_l": TE1, "clip_h": TE1, "clip_g": TE2, "t5xxl": TE3, "umt5xxl": TE1, "llama": TE1, "qwen25_7b": TE1,
    "qwen3_06b": TE1, "qwen3_4b": TE1, "qwen3_8b": TE1, "gemma2_2b": TE1,
}  # fmt: skip
"""ComfyUI's names of text encoders (comfy/text_encoders), and the component that each is in its pipeline."""

# The first prefix that fits wins, in both tables: a prefix that begins with another must stand before it
# (lora_unet_llm_adapter_ before lora_unet_), or its modules would be looked for under a wrong path.
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
"""Prefixes of a module's path in adapters, and the component of each; longest first where one begins with another."""

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
"""Prefixes of tensors' names in checkpoints, and the component of each."""


_WRAPPER: Final = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPERS)})\.")
_FLAT_WRAPPER: Final = re.compile(rf"(?<=_)(?:{'|'.join(WRAPPERS)})_")
_IN_FRONT: Final = re.compile(rf"(?:(?:{'|'.join(WRAPPERS_IN_FRONT)})\.)*(?:(?:model\.)?(?=base_model\.model\.))?")
_BEHIND: Final = re.compile(rf"(?:base_model\.model\.(?:(?:{'|'.join(WRAPPERS_IN_FRONT)})\.)*)+")


def without_wrappers(name: str) -> str:
    """A name without what wrappers put into it, and with PEFT's container once where models were wrapped twice."""
    # Before the first dot stands a whole path in kohya's spelling, in which the dots are underscores.
    first, dot, rest = name.partition(".")
    bare = _WRAPPER.sub("", _FLAT_WRAPPER.sub("", first) + dot + rest)
    bare = bare[_IN_FRONT.match(bare).end() :]  # type: ignore[union-attr]
    found = _BEHIND.match(bare)
    return CONTAINER + bare[found.end() :] if found else bare


def flat(path: str) -> str:
    """kohya's spelling of a module path: dots become underscores."""
    return path.replace(".", "_")


@dataclass(frozen=True, slots=True, order=True)
class Module:
    """A module of the base as an adapter names it: its component (`unet`, `te1`, `WHOLE` for a model without parts), its
    path in the component, dotted or flattened, and the whole `stem` that its keys share in the file."""

    component: str
    path: str
    stem: str

    def __str__(self) -> str:
        return self.stem


def adapter_component(stem: str) -> tuple[str, str]:
    """(component, module path) of an adapter's stem; behind PEFT's container the path is the wrapped model's own."""
    # Before the prefixes: what stands behind the container may be a model's own attribute (see `candidate_names`).
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
    # What PEFT wrapped may hold the component as an attribute: base_model.model.unet.…
    if module.component == WHOLE:
        component, path = adapter_component(module.path)
        if component != WHOLE:
            yield component, path
