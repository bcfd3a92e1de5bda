"""PEFT's adapter_config.json as it is written: new for a LoRA, or changed for an adapter that keeps its config.

Source: PEFT tuners/lora/config.py; `peft` reads such a config.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, Final

from loratool.formats.peft import PEFT_METADATA_KEY, STACK_RULES, ends_with, times_added

CARRIED: Final = (
    "base_model_name_or_path", "revision", "task_type", "bias", "lora_bias", "modules_to_save", "fan_in_fan_out",
    "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
"""Entries of a config that stay true for the same LoRA at other ranks and in other formats."""
OF_SAVED: Final = ("modules_to_save", "bias", "lora_bias")
"""Entries of a config on values that are stored whole, and on biases."""


@dataclass(frozen=True, slots=True)
class LoraFacts:
    """What a PEFT folder of LoRA holds, by the paths of modules and of stacked parameters: their ranks (None: there are
    none) and scales (None: alpha is the rank), which of them are `stacked` parameters, and what is `saved` whole. `dora`,
    `lora_bias` and `biases` say whether there are magnitudes, biases of factors and trained biases of layers; None where the
    config need not say so."""

    ranks: Mapping[str, int] | None
    scales: Mapping[str, float | None]
    stacked: Collection[str] = ()
    saved: Collection[str] = ()
    dora: bool | None = None
    lora_bias: bool | None = None
    biases: bool = False


def lora_document(source: Mapping[str, Any], facts: LoraFacts) -> dict[str, Any]:
    """The adapter_config.json of a LoRA; `source` is the config of the adapter that the LoRA comes from, if any."""
    names = {path: config_name(source, path) for path in facts.ranks or ()}
    ranks = {names[path]: rank for path, rank in (facts.ranks or {}).items()}
    scales = {names[path]: facts.scales[path] for path in names}
    parameters = {*facts.stacked, *(name for path, name in names.items() if name != path)}
    of_modules = {} if facts.ranks is None else lora_config(ranks, scales, parameters)
    if parameters:
        of_modules["target_parameters"] = sorted(parameters)
        # It says along which axis factors lie: those made here as the first version with the latest rule has them.
        of_modules["peft_version"] = source.get("peft_version") or _version_text(STACK_RULES[0][0])
    # Later entries win: what the tensors show goes before what the source said.
    return {
        "bias": "none",
        **{key: source[key] for key in CARRIED if key in source},
        "peft_type": "LORA",
        **of_modules,
        **({"modules_to_save": sorted(facts.saved)} if facts.saved else {}),
        **({} if facts.dora is None else {"use_dora": facts.dora}),
        **({} if facts.lora_bias is None else {"lora_bias": facts.lora_bias}),
        **({"bias": "all"} if facts.biases else {}),
        "inference_mode": True,
    }


def metadata_entry(configs: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """The metadata in which diffusers keeps the facts of PEFT configs, by component ("" for a file without components)."""
    document = {f"{prefix}{key}": value for prefix, config in configs.items() for key, value in config.items()}
    return {PEFT_METADATA_KEY: json.dumps(document, sort_keys=True)}


def base_facts(config: Mapping[str, Any], path: str) -> dict[str, str]:
    """The entries of an adapter's config on the base at `path`, whose own config.json is `config`."""
    said = {"base_model_name_or_path": config.get("_name_or_path") or path}
    if str((config.get("architectures") or [""])[0]).endswith("ForCausalLM"):
        said["task_type"] = "CAUSAL_LM"
    return said


def without_saved(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` without what it says of values that are stored whole, and of biases."""
    return {key: value for key, value in document.items() if key not in OF_SAVED}


def with_targets(
    document: Mapping[str, Any], targets: Collection[str], saved: Collection[str], stacked: Collection[str]
) -> dict[str, Any]:
    """`document` for the modules `targets` alone; `saved` and `stacked` are named only where it named such before."""
    names = {path: config_name(document, path) for path in targets}
    parameters = {*stacked, *(name for path, name in names.items() if name != path)}
    said: dict[str, Any] = {"target_modules": sorted(path for path, name in names.items() if name == path)}
    if document.get("modules_to_save"):
        said["modules_to_save"] = sorted(set(saved) - set(targets)) or None
    if document.get("target_parameters"):
        said["target_parameters"] = sorted(parameters) or None
    return {**document, **said}


def with_scale(document: Mapping[str, Any], path: str, rank: int, scale: float) -> dict[str, Any]:
    """`document` with a pattern that gives the module at `path`, whose factors have `rank`, the scale `scale`."""
    before: dict[str, float] = document.get("alpha_pattern") or {}
    alpha = scale * (sqrt(rank) if document.get("use_rslora") else rank) / times_added(path)
    pattern = pattern_of(config_name(document, path))
    # PEFT takes the first pattern that matches, so that this one goes before all others.
    others = {key: value for key, value in before.items() if key != pattern}
    return {**document, "alpha_pattern": {pattern: whole_number(alpha), **others}}


def config_name(document: Mapping[str, Any], path: str) -> str:
    """What `document` calls the target at `path`: a module, or its weight where target_parameters name that, as they do
    routers, which are no layers in transformers 5."""
    weight = f"{path}.weight"
    return weight if any(ends_with(weight, name) for name in document.get("target_parameters") or ()) else path


def _version_text(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def lora_config(
    ranks: Mapping[str, int], scales: Mapping[str, float | None], stacked: Collection[str] = ()
) -> dict[str, object]:
    """The entries r, lora_alpha and their patterns for modules of these ranks and scales; without a scale, alpha is the
    rank. Those in `stacked` are parameters, which patterns name as they name modules, and target_modules do not."""
    alphas = {
        path: whole_number(rank * (1.0 if (scale := scales[path]) is None else scale) / times_added(path))
        for path, rank in ranks.items()
    }
    # The commonest rank and alpha are those of the file, so that as few modules as possible need a pattern.
    usual_rank, usual_alpha = _commonest(ranks.values(), 1), _commonest(alphas.values(), 1)
    return {
        "r": usual_rank,
        "lora_alpha": usual_alpha,
        "target_modules": sorted(_name_pattern(path) for path in ranks if path not in stacked),
        "rank_pattern": {pattern_of(path): rank for path, rank in sorted(ranks.items()) if rank != usual_rank},
        "alpha_pattern": {pattern_of(path): alpha for path, alpha in sorted(alphas.items()) if alpha != usual_alpha},
    }


def _name_pattern(path: str) -> str:
    """A target module's name, without CLIP's `text_model.`, which transformers 5.6 dropped: an ending matches both ways."""
    return path.removeprefix("text_model.")


def pattern_of(path: str) -> str:
    """The pattern of one module: of the whole path, or of the ending where the beginning depends on the version."""
    return f"^{path}" if _name_pattern(path) == path else _name_pattern(path)


def whole_number(alpha: float) -> float:
    """`alpha` as an integer where it is one up to rounding."""
    # A scale is alpha / rank in float64, and comes back from it a few steps of 2.2e-16 away.
    return round(alpha) if abs(alpha - round(alpha)) <= 1e-12 * abs(alpha) else alpha


def _commonest(values: Iterable[float], otherwise: float) -> float:
    counted = list(values)
    return max(counted, key=counted.count, default=otherwise)
