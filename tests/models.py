"""Tiny models of real architectures, with random weights, and adapters for them in the formats that people have.

Each builder is seeded, so that what it returns is the same every time. They need the `test` extra.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loratool.archs.sd import SD1, SDXL
from loratool.archs.table import Arch
from loratool.names import flat

Tensors = dict[str, Tensor]

SDXL_UNET: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 24),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (2, 2, 2),
    "cross_attention_dim": 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
    "use_linear_projection": True,
}
SD1_UNET: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 24, 24),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}


def unet(config: Mapping[str, Any] = SDXL_UNET, seed: int = 0) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**config).eval()


def clip(layers: int = 2, width: int = 16, *, projection: bool = False, seed: int = 1) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def clip_tensors(model: torch.nn.Module) -> Tensors:
    """A CLIP's tensors under the names that files have: transformers 5.6 dropped `text_model.` from the plain model's."""
    return {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }


def llm(kind: str = "llama", **changes: Any) -> torch.nn.Module:
    import transformers as hf

    torch.manual_seed(2)
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 48,
        "max_position_embeddings": 64,
    }
    builders: Mapping[str, Callable[[], torch.nn.Module]] = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**common | changes)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**common | changes)),
        "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**common | {"num_local_experts": 4} | changes)),
        "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**common | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8} | changes)
        ),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                **{
                    "n_embd": 32,
                    "n_layer": 2,
                    "n_head": 4,
                    "vocab_size": 48,
                    "n_positions": 64,
                    "bos_token_id": 0,
                    "eos_token_id": 1,
                }
                | changes
            )
        ),
    }
    return builders[kind]().eval()


def peft_adapter(
    model: torch.nn.Module, folder: Path, seed: int = 3, kind: type | None = None, **config: Any
) -> torch.nn.Module:
    """Wraps `model` in PEFT's LoRA or another `kind` of tuner, gives its tensors random values, saves and returns it."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, (kind or LoraConfig)(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                shift = 0.1 * torch.randn_like(parameter)
                parameter.copy_(shift if ".lora_" in name else parameter + shift)
    wrapped.save_pretrained(folder)
    return wrapped


def lora(shape: tuple[int, ...], rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensors:
    """The down and up factors of a change to a weight of `shape`, in kohya's layout."""
    kernel = shape[2:]
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *(1 for _ in kernel), generator=generator)
    return {"lora_down.weight": (0.2 * down).to(dtype), "lora_up.weight": (0.2 * up).to(dtype)}


def kohya(shapes: Mapping[str, tuple[int, ...]], rank: int, alpha: float | None, seed: int = 4) -> Tensors:
    """A kohya adapter: `shapes` are those of the weights, by flattened stem ("lora_unet_…")."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for stem, shape in sorted(shapes.items()):
        factors = lora(shape, rank, generator)
        tensors |= {f"{stem}.{leaf}": tensor for leaf, tensor in factors.items()}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def linear_shapes(tensors: Mapping[str, Tensor], prefix: str, *, conv: bool = False) -> dict[str, tuple[int, ...]]:
    """The weights that kohya trains, in attention and feed-forward blocks (and with `conv` in the convolutions too)."""
    wanted = ("attn", "ff.", "proj_in", "proj_out", "mlp") + (
        ("conv", "op.", "in_layers.2", "out_layers.3", "skip") if conv else ()
    )
    return {
        prefix + flat(name.removesuffix(".weight")): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim > 1 and any(part in name for part in wanted)
    }


def original_names(arch: Arch, component: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """A component's tensors renamed, and where the original has them in one piece stacked, by the architecture's table."""
    table = arch.component(component)
    assert table is not None
    renamed: Tensors = {}
    for link in table.links[table.stored_naming]:
        for parameter in ("weight", "bias"):
            parts = [tensors.get(f"{part}.{parameter}") for part in link.parts]
            found = [part for part in parts if part is not None]
            if len(found) == len(link.parts):
                whole = torch.cat(found).T.contiguous() if link.transposed else torch.cat(found)
                whole = torch.cat(whole.chunk(2)[::-1]) if link.swapped else whole
                renamed[_original_key(link.whole, parameter)] = whole
    return renamed


SCALES = re.compile(r"(query_norm|key_norm|qnorm|knorm|prenorm|postnorm|last\.norm|txtmlp\.0|layer\.norms\.\d)$")
"""Norms whose weight the original calls scale."""


def _original_key(whole: str, parameter: str) -> str:
    if whole.endswith("attn.in_proj"):
        return f"{whole}_{parameter}"
    if SCALES.search(whole) and parameter == "weight":
        return f"{whole}.scale"
    raw = whole in ("text_projection", "positional_embedding")
    return whole if raw else f"{whole}.{parameter}"


def sdxl_checkpoint(dtype: torch.dtype = torch.float32) -> tuple[Tensors, dict[str, Tensors]]:
    """A tiny SDXL as one SGM-named file, and the same weights by component under diffusers' names."""
    components = {
        "unet": dict(unet().state_dict()),
        "te1": clip_tensors(clip(layers=2, width=16)),
        "te2": clip_tensors(clip(layers=2, width=24, projection=True, seed=5)),
    }
    components = {name: {key: value.to(dtype) for key, value in part.items()} for name, part in components.items()}
    prefixes = {"unet": "model.diffusion_model.", "te2": "conditioner.embedders.1.model."}
    single = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in components["te1"].items()}
    for component, prefix in prefixes.items():
        renamed = original_names(SDXL, component, components[component])
        single |= {prefix + name: tensor for name, tensor in renamed.items()}
    single["first_stage_model.quant_conv.weight"] = torch.ones(8, 8, 1, 1, dtype=dtype)
    return single, components


def sd1_checkpoint() -> tuple[Tensors, dict[str, Tensors]]:
    """A tiny SD1.5 as one LDM-named file, and the same weights by component under diffusers' names."""
    components = {"unet": dict(unet(SD1_UNET).state_dict()), "te1": clip_tensors(clip())}
    single = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in components["te1"].items()}
    single |= {
        f"model.diffusion_model.{name}": tensor for name, tensor in original_names(SD1, "unet", components["unet"]).items()
    }
    return single, components


def save(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata or None)
    return path
