"""The ends of keys: which leaf each known suffix spells, and which family of files writes it. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from loratool.names import CONTAINER, without_wrappers

_KOHYA: Final = "kohya"
PEFT: Final = "PEFT"
DIFFUSERS_OLD: Final = "old diffusers"
_LYCORIS: Final = "LyCORIS"
LORALIB: Final = "loralib"
_COMFYUI: Final = "ComfyUI"
_XLABS_TABLE: Final = "XLabs"
DIFFSYNTH: Final = "DiffSynth"
_OWN: Final = "its own"

_LEAVES: Final[Mapping[str, tuple[str, str]]] = {
    # kohya sd-scripts and all who follow it
    "lora_down.weight": ("down", _KOHYA), "lora_up.weight": ("up", _KOHYA), "lora_mid.weight": ("mid", _KOHYA),
    "alpha": ("alpha", _KOHYA), "dora_scale": ("dora_scale", _KOHYA),
    # PEFT save_and_load.py; embeddings and magnitudes are parameters, without .weight
    "lora_A.weight": ("down", PEFT), "lora_B.weight": ("up", PEFT), "lora_B.bias": ("bias_up", PEFT),
    "lora_embedding_A": ("embedding_down", PEFT), "lora_embedding_B": ("embedding_up", PEFT),
    "magnitude": ("magnitude", PEFT), "lora_magnitude_vector": ("magnitude", PEFT),
    "lora_magnitude_vector.weight": ("magnitude", PEFT),
    "lora_E": ("lora_e", PEFT), "token_adapter.trainable_tokens_delta": ("token_rows", PEFT),
    "trainable_tokens_delta": ("token_rows", PEFT),
    "vera_lambda_b": ("vera_lambda_b", PEFT), "vera_lambda_d": ("vera_lambda_d", PEFT), "ia3_l": ("ia3_l", PEFT),
    "oft_R.weight": ("oft_r", PEFT), "oft_R.scaled_oft": ("scaled_oft", PEFT),
    "boft_R": ("boft_r", PEFT), "boft_s": ("boft_s", PEFT),
    # microsoft/loralib, and PEFT's AdaLoRA
    "lora_A": ("loralib_a", LORALIB), "lora_B": ("loralib_b", LORALIB),
    # diffusers before PEFT: the U-Net, then text encoders
    "lora.down.weight": ("down", DIFFUSERS_OLD), "lora.up.weight": ("up", DIFFUSERS_OLD),
    "lora_linear_layer.down.weight": ("down", DIFFUSERS_OLD), "lora_linear_layer.up.weight": ("up", DIFFUSERS_OLD),
    # LyCORIS functional/*
    "diff": ("diff", _LYCORIS), "diff_b": ("diff_b", _LYCORIS), "w_norm": ("w_norm", _LYCORIS),
    "b_norm": ("b_norm", _LYCORIS), "a1.weight": ("a1", _LYCORIS), "a2.weight": ("a2", _LYCORIS),
    "b1.weight": ("b1", _LYCORIS), "b2.weight": ("b2", _LYCORIS),
    "bm.weight": ("bm", _LYCORIS), "oft_blocks": ("oft_blocks", _LYCORIS), "rescale": ("rescale", _LYCORIS),
    "on_input": ("on_input", _LYCORIS), "set_weight": ("set_weight", _COMFYUI),
    "reshape_weight": ("reshape_weight", _COMFYUI),
    **{leaf: (leaf, _LYCORIS) for leaf in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )},
}  # fmt: skip
"""Suffixes behind a module's path: the leaf that each one spells, and the family that writes it."""

_COMMON: Final[Mapping[str, str]] = {
    leaf: suffix for suffix, (leaf, family) in _LEAVES.items() if family in (_LYCORIS, _COMFYUI)
} | {"dora_scale": "dora_scale", "ia3_weight": "weight"}
"""LyCORIS's leaves and ComfyUI's additions, which all programs that read kohya's leaves read too."""

KOHYA_LEAVES: Final[Mapping[str, str]] = {
    "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "alpha": "alpha", **_COMMON
}  # fmt: skip
COMFY_LEAVES: Final[Mapping[str, str]] = {
    "down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha", **_COMMON
}  # fmt: skip
PEFT_LEAVES: Final[Mapping[str, str]] = {
    "down": "lora_A.weight", "up": "lora_B.weight", "bias_up": "lora_B.bias", "magnitude": "lora_magnitude_vector",
    "embedding_down": "lora_embedding_A", "embedding_up": "lora_embedding_B", "weight": "weight", "bias": "bias",
}  # fmt: skip
"""The leaves that a PEFT folder with a LoRA's config can hold; other kinds stay in a folder that they came in."""
DIFFUSERS_LEAVES: Final[Mapping[str, str]] = {
    leaf: PEFT_LEAVES[leaf] for leaf in ("down", "up", "bias_up", "magnitude")
}  # fmt: skip
OLD_LEAVES: Final[Mapping[str, str]] = {"down": "lora.down.weight", "up": "lora.up.weight"}
XLABS_LEAVES: Final[Mapping[str, str]] = {"down": "down.weight", "up": "up.weight"}
DIFFSYNTH_LEAVES: Final[Mapping[str, str]] = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
LORALIB_LEAVES: Final[Mapping[str, str]] = {"down": "lora_A", "up": "lora_B"}
BFL_LEAVES: Final[Mapping[str, str]] = {
    "down": "lora_A.weight", "up": "lora_B.weight", "bias_up": "lora_B.bias", "scale": "scale"
}  # fmt: skip
"""The constants `…_LEAVES` hold what each family of formats can hold, and its spelling: leaf to suffix."""

ABSOLUTE: Final[Mapping[str, str]] = {
    "modules_to_save.weight": "weight", "modules_to_save.bias": "bias",
    "ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias",
    "token_adapter.base_layer.weight": "weight", "base_layer.weight": "weight", "base_layer.bias": "bias",
    "original_module.weight": "weight", "original_module.bias": "bias",
    "weight": "weight", "bias": "bias",
}  # fmt: skip
"""PEFT's `modules_to_save`, trained norms, `bias="all"` and stored base layers: values that replace those of the base."""
UNTRAINED: Final = ("base_layer.", "original_module.")
"""What stands before the leaf of a value that was not trained, if PEFT stores a trained one of the same module too."""
TRAINED: Final = ("modules_to_save.", "ln_tuning_layers.")
"""What stands before the leaf of a trained value; PEFT also stores it, as a copy, under the module's own name."""
OF_NO_EFFECT: Final = (".lora_velora_embed",)
"""The endings of tensors that only training needs: VeLoRA's, which compresses activations (PEFT tuners/lora/variants.py)."""

SHARED_KEYS: Final[Mapping[str, str]] = {"base_model.vera_A": "vera_a", "base_model.vera_B": "vera_b"}
"""Tensors that all modules of a kind share: PEFT's VeRA projections."""


SPELLED: Final = frozenset(
    {leaf for leaf, _ in _LEAVES.values()} | {*ABSOLUTE.values(), *SHARED_KEYS.values()} | {"scale", "ia3_weight"}
)
"""Leaves that some family spells; the suffixes of `scale` and `ia3_weight` say nothing without what is around them."""

_NAMED = re.compile(
    r"(.*\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save))\.(?!weight$|bias$)[^.]+(.*)"
)
"""A raw state_dict, and DiffSynth, keep the adapter's name in the key: lora_A.default.weight."""
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_[qkv]|to_out|add_[qkv]_proj|to_add_out)_lora\.(down|up)\.weight")
"""diffusers up to 0.20 kept attention LoRA in processors (diffusers utils/state_dict_utils.py)."""
_XLABS = re.compile(r"(.*\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight")
"""XLabs' attention processors for FLUX."""
_NORM = re.compile(r"(.*\.norm\.(?:query|key)_norm)\.scale")
"""BFL's control LoRAs hold the weights of these norms, as the model itself calls them."""
_MODULATION = re.compile(r"(.*)\.diff_m")
"""A difference of a Wan block's raw parameter `modulation` (ComfyUI#8922)."""
_HALF_EXPORTED = re.compile(r"(.*)_lora\.(down|up)\.weight")
"""Keys that diffusers' --output_kohya_format left in files with a text encoder."""


_ADAPTER_NAME = re.compile(
    r".*\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\.(?!weight$|bias$)([^.]+)(?:\.weight|\.bias)?"
)


def adapter_name(key: str) -> str | None:
    """The name of the adapter that a raw state_dict of PEFT keeps in a key; None without one."""
    found = _ADAPTER_NAME.fullmatch(key)
    return found[1] if found else None


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A key taken apart: the module's `stem` (with all prefixes), its leaf, and the family that spells it so.

    Of several values of one module that PEFT stores, the one with the most `trust` is the trained one, or a copy of it; None
    for what there can only be one of.
    """

    stem: str
    leaf: str
    family: str
    trust: int | None = None


def parse_key(key: str, own: Collection[str] = ()) -> ParsedKey | None:
    """Takes a key apart, without the names of wrappers; None where no suffix is known. `weight` and `bias` count as leaves
    only among PEFT's names.

    `own` are leaves that no family spells: their suffix is their name.
    """
    key = without_wrappers(key)
    # From the special to the general: behind PEFT's container nearly every key ends in `weight`, and a processor's
    # `to_q_lora.down.weight` ends as half-exported keys do.
    if found := _by_pattern(key):
        return found
    named = _NAMED.fullmatch(key)
    bare = named[1] + named[2] if named else key
    return _by_suffix(bare, own, named=named is not None) or _absolute(bare) or _parse_half_exported(bare)


def _by_pattern(key: str) -> ParsedKey | None:
    """Takes apart the key of a family that puts more into it than a module and a leaf; None for other keys."""
    if found := _PROCESSOR.fullmatch(key):
        # to_out is a list of a layer and its dropout; the LoRA is on the layer.
        module = found[2].replace("to_out", "to_out.0")
        return ParsedKey(f"{found[1]}.{module}", found[3], DIFFUSERS_OLD)
    if found := _XLABS.fullmatch(key):
        return ParsedKey(found[1], found[2], _XLABS_TABLE)
    if found := _MODULATION.fullmatch(key):
        return ParsedKey(f"{found[1]}{'.' if '.' in found[1] else '_'}modulation", "diff", _LYCORIS)
    found = _NORM.fullmatch(key)
    return ParsedKey(found[1], "scale", PEFT) if found else None


def _by_suffix(key: str, own: Collection[str], *, named: bool) -> ParsedKey | None:
    parts = key.split(".")
    # Suffixes have up to three names, as diffusers' `lora.down.weight` does.
    for count in (3, 2, 1):
        stem, suffix = ".".join(parts[:-count]), ".".join(parts[-count:])
        if stem and suffix in _LEAVES:
            leaf, family = _LEAVES[suffix]
            return ParsedKey(stem, leaf, DIFFSYNTH if named and family == PEFT else family)
    return ParsedKey(".".join(parts[:-1]), parts[-1], _OWN) if len(parts) > 1 and parts[-1] in own else None


def _absolute(key: str) -> ParsedKey | None:
    """Takes apart a key of PEFT for a value that replaces the base's; None for other keys, a checkpoint's too."""
    if not key.startswith(CONTAINER) and not any(f".{mark}" in key for mark in (*TRAINED, *UNTRAINED)):
        return None
    for suffix, leaf in ABSOLUTE.items():
        if key.endswith(f".{suffix}"):
            # Of several values of one module the trained one counts, then the one under the module's own name.
            trust = 2 if suffix.startswith(TRAINED) else 1 if suffix == leaf else 0
            return ParsedKey(key.removesuffix(f".{suffix}"), leaf, PEFT, trust - ("original_module" in suffix))
    return None


def _parse_half_exported(key: str) -> ParsedKey | None:
    found = _HALF_EXPORTED.fullmatch(key)
    return ParsedKey(found[1], found[2], DIFFUSERS_OLD) if found else None
