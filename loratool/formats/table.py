"""The formats that loratool writes, as data: one row is one combination of prefix, naming, dots, leaves and alpha. No torch.

Reading takes the four apart (`names`, `leaves`, `keys.listing`) and so also reads files that mix them; a row is what `--to`
writes, and the name of a file whose keys all agree with it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loratool.errors import Unsupported, look_up
from loratool.formats import leaves
from loratool.names import COMFYUI, CONTAINER, ENCODERS, OMI, ORIGINAL, TRANSFORMERS_5, UNET, WHOLE, XLABS, flat
from loratool.names import KOHYA as KOHYA_NAMES

TENSOR: Final = "tensor"
"""Alpha stands beside the factors."""
CONFIG: Final = "config"
"""Alpha stands in adapter_config.json."""
METADATA: Final = "metadata"
"""Alpha stands in the file's metadata, as diffusers has it (lora_adapter_metadata)."""
FOLDED: Final = "folded"
"""Alpha has no place of its own, and is folded into the factors."""

LLM: Final = "llm"
"""The architecture of a language model."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format: the name that `--to` takes, what people call it, and how it spells each part of a key.

    `denoiser`, `encoder` and `whole` are prefixes of the three sorts of component, None where there is no place for one;
    `{kohya}`, `{place}`, `{trainer}` and `{encoder}` in them are what the component is called. `namings` are tried in
    turn; diffusers' is the last resort. `leaves` spells the leaves it can hold. `only` are the architectures it is
    for, all if empty. A `single` one holds one component. `rewrites` are regular expressions and what they become, for keys
    that are not simply a stem and a leaf.
    """

    name: str
    title: str
    denoiser: str | None
    encoder: str | None
    leaves: Mapping[str, str]
    alpha: str
    whole: str | None = None
    namings: tuple[str, ...] = ()
    flat: bool = False
    folder: bool = False
    single: bool = False
    only: tuple[str, ...] = ()
    rewrites: tuple[tuple[str, str], ...] = ()

    def prefix(self, name: str, *, place: str, kohya: str = "", encoder: str = "", inside: str = "") -> str:
        """The prefix of the modules of a component; raises `Unsupported` where the format has no place for the component."""
        template = self.whole if name == WHOLE else self.encoder if name in ENCODERS else self.denoiser
        if template is None:
            raise Unsupported(f"{self.title} has no place for a {'text encoder' if name in ENCODERS else 'model like this'}")
        if "{encoder}" in template and not encoder:
            raise Unsupported(
                f"{self.title} names text encoders, and which one this is is unknown; `arch=` says for what model"
            )
        # kohya writes lora_unet_ for every denoiser, transformers included.
        called = kohya or (UNET if name not in ENCODERS else name)
        # OneTrainer goes by diffusers' folders (lora_transformer_), except for a lone `te` and for Stable Cascade's prior.
        trainer = kohya if kohya in ("prior_unet", "prior_te", "te") else name if name in ENCODERS else place
        # Only the original has the component inside its denoiser; diffusers keeps it beside the transformer.
        nested = f"{inside}{'_' if self.flat else '.'}" if inside and ORIGINAL in self.namings else ""
        return template.format(kohya=called, place=place, trainer=trainer, encoder=_short(encoder, self)) + nested

    def stem(self, prefix: str, path: str) -> str:
        """A module's stem: its prefix and its path, dotted or flattened."""
        return prefix + (flat(path) if self.flat else path)

    def key(self, stem: str, leaf: str) -> str:
        """The key of a module's leaf."""
        key = f"{stem}.{self.leaves[leaf]}"
        for pattern, replacement in self.rewrites:
            key = re.sub(pattern, replacement, key)
        return key

    def spells(self, stem: str, keys: Collection[str]) -> bool:
        """Whether all of a module's `keys` are those that the format would write."""
        return set(keys) <= {self.key(stem, leaf) for leaf in self.leaves}

    def holds(self, arch: str) -> bool:
        """Whether the format is for the architecture called `arch`."""
        if arch == LLM:
            return self.whole is not None and (not self.only or LLM in self.only)
        return self.denoiser is not None and (not self.only or arch in self.only)


def _short(encoder: str, spelling: Format) -> str:
    """A text encoder's name in a format: that of ComfyUI, but OneTrainer's export has t5, and clip_l for any first CLIP."""
    return {"t5xxl": "t5", "clip_h": "clip_l"}.get(encoder, encoder) if OMI in spelling.namings else encoder


SD: Final = ("sd1", "sd2", "sdxl", "sdxl-refiner", "ssd-1b", "vega")
WAN: Final = ("wan-1.3b", "wan-5b", "wan-14b")

_MODULATION: Final = ((r"[._]modulation\.diff$", ".diff_m"),)
"""The difference of a Wan block's raw parameter `modulation`, as distilled models are published (ComfyUI#8922)."""
PROCESSORS: Final = (
    (r"\.(to_[qkv]|to_out)(?:\.0)?\.lora\.(down|up)\.", r".processor.\1_lora.\2."),
    (r"^(text_encoder.*)\.lora\.(down|up)\.", r"\1.lora_linear_layer.\2."),
)
"""Keys of diffusers before PEFT: LoRA of attention was in processors, that of text encoders in layers of its own (diffusers
utils/state_dict_utils.py)."""

_KOHYA: Final = Format(
    "kohya",
    "kohya",
    "lora_{kohya}_",
    "lora_{kohya}_",
    leaves.KOHYA_LEAVES,
    TENSOR,
    namings=(KOHYA_NAMES, ORIGINAL),
    rewrites=_MODULATION,
    flat=True,
)
DIFFUSERS_FORMAT: Final = Format("diffusers", "diffusers", "{place}.", "{place}.", leaves.DIFFUSERS_LEAVES, METADATA)
COMFY: Final = Format(
    "comfyui", "ComfyUI", "diffusion_model.", "text_encoders.{encoder}.transformer.", leaves.COMFY_LEAVES,
    TENSOR, namings=(COMFYUI, ORIGINAL), rewrites=_MODULATION,
)  # fmt: skip
AI_TOOLKIT: Final = replace(COMFY, name="ai-toolkit", title="ai-toolkit", encoder=None, alpha=FOLDED, namings=(ORIGINAL,))
PEFT_FOLDER: Final = Format(
    "peft", "PEFT", CONTAINER, CONTAINER, leaves.PEFT_LEAVES, CONFIG, CONTAINER, namings=(TRANSFORMERS_5,),
    folder=True, single=True,
)  # fmt: skip

FORMATS: Final[Sequence[Format]] = (
    _KOHYA,
    replace(_KOHYA, name="kohya-diffusers", title="kohya with diffusers' names", namings=()),
    replace(_KOHYA, name="onetrainer", title="OneTrainer", denoiser="lora_{trainer}_", encoder="lora_{trainer}_",
            namings=()),
    Format(
        "omi", "OneTrainer OMI", "{place}.", "{encoder}.", leaves.KOHYA_LEAVES, TENSOR,
        namings=(OMI, ORIGINAL), only=(*SD[:3], "sd3-medium", "sd3.5-large", "flux1", "chroma", "pixart", "cascade"),
    ),
    replace(_KOHYA, name="lycoris", title="SimpleTuner / LyCORIS", denoiser="lycoris_", encoder=None, namings=()),
    COMFY,
    AI_TOOLKIT,
    # The same keys as ai-toolkit's, which is the one that a file with them is named by.
    replace(AI_TOOLKIT, name="musubi", title="Musubi (--target other)"),
    DIFFUSERS_FORMAT,
    replace(
        DIFFUSERS_FORMAT, name="diffusers-old", title="diffusers before 0.21", leaves=leaves.OLD_LEAVES, alpha=FOLDED,
        only=SD, rewrites=PROCESSORS,
    ),
    replace(
        COMFY, name="bfl", title="FLUX control (BFL)", denoiser="", encoder=None, leaves=leaves.BFL_LEAVES, alpha=FOLDED,
        namings=(ORIGINAL,), only=("flux1",),
    ),
    replace(
        COMFY, name="xlabs", title="XLabs", denoiser="", encoder=None, leaves=leaves.XLABS_LEAVES,
        alpha=FOLDED, namings=(XLABS,), only=("flux1",),
    ),
    replace(
        COMFY, name="diffsynth", title="DiffSynth", denoiser="", encoder=None, leaves=leaves.DIFFSYNTH_LEAVES,
        alpha=FOLDED, namings=(ORIGINAL,), only=(*WAN, "qwen-image"),
    ),
    PEFT_FOLDER,
    replace(PEFT_FOLDER, name="peft-file", title="PEFT, a single file", alpha=FOLDED, folder=False),
    Format("loralib", "loralib", None, None, leaves.LORALIB_LEAVES, FOLDED, whole="", single=True, only=(LLM,)),
)  # fmt: skip
"""The formats that `--to` takes. Of two that write the same keys, a file is named by the first."""


def format_named(name: str) -> Format:
    """The row called `name`; raises `UnknownName`."""
    return look_up({row.name: row for row in FORMATS}, name, "format")
