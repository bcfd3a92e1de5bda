"""The programs that load adapters, as data: what each reads, what it makes of it, and what it does not. No torch.

Each row was read from the program's own source, which it names; what a version older or newer does may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loratool.errors import look_up

_LORA: Final = frozenset({"lora", "embedding"})
_LYCORIS: Final = _LORA | {"loha", "lokr", "glora", "full", "bias", "norm", "dora", "oft", "ia3"}

SD3: Final = "sd3-medium sd3.5-medium sd3.5-large"

GLOBAL_SCALE: Final = "one alpha for all, divided by one rank"
"""The scale in vLLM: lora_alpha / r of the config, whatever the rank of a module is."""
SHARED_SCALE: Final = "one alpha for all, divided by each rank"
"""The scale in llama.cpp: lora_alpha of the config over the rank of each module's factors."""
OWN_SCALE: Final = "each module's own"
"""The scale of a module by its own alpha and rank, as all others have it."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """A program that loads adapters: the formats (names of `FORMATS`) that the program `reads`, and the one that a fix
    `writes`; the `kinds` of deltas in it; whether it is for `language` models (None: for any); how it finds a module's
    `scale`; the `ranks` and `archs` it takes, any if empty; and the `source` of all that. `usual_rank` is the largest rank
    without a setting, `unread` has the architectures that are not read in a format."""

    name: str
    title: str
    reads: tuple[str, ...]
    writes: str
    kinds: frozenset[str]
    language: bool | None
    scale: str
    source: str
    ranks: tuple[int, ...] = ()
    usual_rank: int = 0
    archs: tuple[str, ...] = ()
    unread: Mapping[str, str] | None = None
    ignores_metadata: bool = False


CONSUMERS: Final[Mapping[str, Consumer]] = {
    row.name: row
    for row in (
        Consumer(
            "vllm", "vLLM", ("peft",), "peft", _LORA | {"experts"}, True, GLOBAL_SCALE,
            "vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/config/lora.py",
            # vLLM takes these values of max_lora_rank and no others, 16 unless told (vllm/config/lora.py).
            ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512), usual_rank=16,
        ),
        Consumer(
            "peft", "PEFT", ("peft",), "peft", _LORA | {"dora", "experts", "lora bias", "replace", "tokens"}, None,
            OWN_SCALE,
            "peft/utils/save_and_load.py, peft/tuners/lora/config.py",
        ),
        Consumer(
            "diffusers", "diffusers",
            ("diffusers", "diffusers-old", "kohya", "kohya-diffusers", "comfyui", "ai-toolkit", "bfl", "xlabs", "musubi"),
            "diffusers", _LORA | {"dora", "lora bias"}, False, OWN_SCALE,
            "diffusers/loaders/lora_conversion_utils.py, diffusers/utils/peft_utils.py (0.42)",
            unread={"kohya": SD3, "kohya-diffusers": SD3},
        ),
        Consumer(
            "comfyui", "ComfyUI",
            ("comfyui", "kohya", "kohya-diffusers", "onetrainer", "omi", "ai-toolkit", "diffusers", "diffusers-old", "xlabs",
             "bfl", "diffsynth", "lycoris", "musubi"),
            "comfyui", _LYCORIS | {"enlarge", "replace"}, False, OWN_SCALE,
            "comfy/lora.py, comfy/lora_convert.py, comfy/weight_adapter/", ignores_metadata=True,
        ),
        Consumer(
            "a1111", "A1111's web UI", ("kohya", "kohya-diffusers"), "kohya", _LYCORIS, False, OWN_SCALE,
            "extensions-builtin/Lora/networks.py and network_*.py of stable-diffusion-webui",
            archs=("sd1", "sd2", "sdxl", "sdxl-refiner", "ssd-1b", "vega", "sd3-medium"),
        ),
        Consumer(
            "llama.cpp", "llama.cpp", ("peft",), "peft", _LORA, True, SHARED_SCALE,
            "convert_lora_to_gguf.py, src/llama-adapter.h of llama.cpp",
        ),
    )
}  # fmt: skip
"""The programs that `check --for` takes, by name."""


def consumer_kind(kind: str, parameter: str, dimensions: int, *, shares_scale: bool = False) -> str:
    """The name that the rows have for a kind of delta, by the parameter that is changed and its number of dimensions, and
    whether the delta has the scale of another (PEFT's `lora_B.bias`)."""
    if kind == "full" and shares_scale:
        return "lora bias"
    # Programs tell differences of biases, norms and matrices apart, but not one sort of orthogonal delta from another.
    if kind == "full":
        return "bias" if parameter == "bias" else "norm" if dimensions == 1 else "full"
    return "oft" if kind in ("input oft", "input boft") else kind


def consumer_named(name: str) -> Consumer:
    """The program called `name`; raises `UnknownName`."""
    return look_up(CONSUMERS, name, "program")
