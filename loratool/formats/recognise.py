"""Which tool made an adapter, and which known layouts are refused. From keys and metadata alone; no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Final

from loratool.formats.peft import PEFT_METADATA_KEY

_REFUSED: Final[Mapping[str, str]] = {
    r"(?:^|\.)transformer_blocks\.\d+\.(?:qkv_proj|qkv_proj_context|out_proj_context|mlp_fc[12]|mlp_context_fc[12])[._]": (
        "is in nunchaku's format, whose factors are packed for its 4-bit kernels and rounded on the way; "
        "convert the file it was made from"
    ),
    r"lora_controlnet$": (
        "is a control-LoRA of Stability AI, which makes a ControlNet of the U-Net's encoder; it is no adapter of the model"
    ),
    r"\.(?:experts\.w[123]|unembed_tokens)\.lora_[AB]\.weight$": (
        "is in Tinker's layout, which has experts' factors in three dimensions and calls the head unembed_tokens; "
        "tinker_cookbook.weights.build_lora_adapter makes a folder of PEFT's of it"
    ),
    r"\.lora_[ab]$": (
        "is in MLX's format, whose factors are transposed and whose scale is in a config of its own; fuse it with "
        "mlx_lm.fuse, or save it as PEFT"
    ),
    r"\.lora_[ab]\.weight$": (
        "has torchtune's own names; let torchtune's checkpointer save the adapter in PEFT's format "
        "(adapter_model.safetensors), or use torchtune.models.convert_weights.tune_to_peft_adapter_weights"
    ),
    r"\.adapter\.linear_(?:in|out)\.weight$": (
        "is an adapter of Megatron-Bridge or NeMo, on modules that stack and interleave those of the Hugging Face model; "
        "export it with Megatron-Bridge's export_adapter.py"
    ),
    r"(?:^|\.)decoder\.layers\.\d+\.(?:self_attention\.linear_(?:qkv|proj)|mlp\.(?:[\w.]+\.)?linear_fc[12])\.lora_": (
        "is an adapter of Megatron-core's modules, which stack and interleave those of the Hugging Face model; export it "
        "with what trained it (ms-swift: swift export, with to_hf true)"
    ),
}
"""Patterns of keys, and why files that have such keys are refused."""

KNOWN: Final[Mapping[str, str]] = {
    "nunchaku": "4-bit factors, packed", "control-LoRA": "Stability AI's ControlNets",
    "Tinker": "experts in three dimensions", "MLX": "transposed, with a config of its own",
    "torchtune": "its own names of modules", "Megatron": "stacked and interleaved modules",
    "GGUF": "llama.cpp's own file type",
}  # fmt: skip
"""The layouts that are recognised and refused, in a word or two."""

TRAINERS: Final[tuple[tuple[str, str, str], ...]] = (
    # What loratool made stands first: its output may carry the metadata of the adapters that went in.
    ("loratool", '"command": "extract"', "nobody: extracted by loratool"),
    ("loratool", '"command": "combine"', "several: combined by loratool"),
    ("ot_branch", "", "OneTrainer"),
    ("software", "ai-toolkit", "ai-toolkit"),
    # Trainers on top of sd-scripts write its keys too, and are told by the module that they name.
    ("ss_network_module", "lycoris", "kohya sd-scripts with LyCORIS"),
    ("ss_network_module", "networks.lora_wan", "musubi-tuner"),
    ("ss_network_module", "networks.lora_qwen_image", "musubi-tuner"),
    ("ss_network_module", "networks.lora_zimage", "musubi-tuner"),
    ("ss_network_module", "networks.lora_hv", "musubi-tuner"),
    ("ss_network_module", "networks.lora_framepack", "musubi-tuner"),
    ("ss_network_module", "", "kohya sd-scripts"),
    ("modelspec.implementation", "onetrainer", "OneTrainer"),
    ("modelspec.implementation", "simpletuner", "SimpleTuner"),
    (PEFT_METADATA_KEY, "", "diffusers"),
)
"""A metadata key, a text in its value, and the tool that writes both; the first row that fits decides."""


def refusal(keys: Iterable[str]) -> str | None:
    """The reason why a file with these keys is refused; None for files that are not."""
    names = list(keys)
    return next((why for pattern, why in _REFUSED.items() if any(re.search(pattern, name) for name in names)), None)


def trainer(metadata: Mapping[str, str]) -> str | None:
    """The tool that trained an adapter; None where the metadata does not say."""
    for key, mark, name in TRAINERS:
        # An empty mark is in every value, so that the key itself must be there.
        if mark in metadata.get(key, "\0").lower() and key in metadata:
            return name
    return None


def folds_whole_weights(metadata: Mapping[str, str]) -> bool:
    """Whether the file is ai-toolkit's, which keeps full differences as a lone `lora_A` (toolkit/lora_special.py)."""
    try:
        software = json.loads(metadata.get("software", "null"))
    except (ValueError, RecursionError):
        return False
    return isinstance(software, dict) and software.get("name") == "ai-toolkit"
