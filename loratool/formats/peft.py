"""PEFT's adapter_config.json: the scale of each module, and what else the factors themselves do not show.

Source: PEFT tuners/lora/config.py and utils/other.py (get_pattern_key). The file comes from strangers: nothing in it
is followed, imported or fetched, and its patterns are matched by `PatternMap`, for a while at most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loratool.errors import InvalidConfig, first_few
from loratool.formats.patterns import PatternMap

PEFT_METADATA_KEY: Final = "lora_adapter_metadata"
"""Where diffusers keeps the same facts, prefixed by component (loaders/lora_base.py)."""

BASE_CHANGING_INITS: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract the adapter's first value from the base it is trained on."""

TUNERS: Final = frozenset({"LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA", "TRAINABLE_TOKENS"})
"""The values of peft_type whose tensors are among the kinds of delta."""
PROMPTS: Final = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "XLORA"}
)
"""The values of peft_type that act on prompts or activations, and change no weight."""

USED: Final = frozenset(
    {
        "peft_type", "r", "init_r", "lora_alpha", "alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
        "ensure_weight_tying", "trainable_token_indices", "token_indices", "use_cayley_neumann", "num_cayley_neumann_terms",
        "target_parameters", "feedforward_modules", "init_lora_weights",
    }
)  # fmt: skip
"""Fields of configs that something here depends on."""
HARMLESS: Final = frozenset(
    {
        # Of a file and its training.
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
        "runtime_config", "lora_dropout", "rank_dropout", "rank_dropout_scale", "module_dropout", "boft_dropout",
        "vera_dropout", "init_weights", "init_ia3_weights", "d_initial", "target_r", "tinit", "tfinal", "deltaT", "beta1",
        "beta2", "orth_reg_weight", "total_step", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "velora_config",
        # Of what is adapted, which the names of the tensors say.
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "lora_bias",
        "fan_in_fan_out",
        # Of how, which their shapes say, or whether they are there.
        "use_effective_conv2d", "decompose_both", "decompose_factor", "oft_block_size", "block_share", "boft_block_size",
        "boft_block_num", "boft_n_butterfly_factor", "projection_prng_key", "save_projection",
        # Of a method that another field turns on.
        "eps", "qalora_group_size", "megatron_core",
    }
)  # fmt: skip
"""Fields of configs whose value changes no number of a merge."""
REFUSED_FIELDS: Final[Mapping[str, str]] = {
    "layer_replication": "the base must have its layers replicated first (layer_replication)",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only and cannot be merged into weights",
    "megatron_config": "Megatron's parallel layers store factors in pieces",
    "coft": "a constrained OFT (coft) projects its blocks before it rotates; merge it with PEFT",
    "use_qalora": "QALoRA (use_qalora) adds to averages of groups of inputs; merge it with PEFT",
    "use_bdlora": "BD-LoRA (use_bdlora) stores the blocks of block-diagonal factors; merge it with PEFT",
    "kasa_config": "KaSA (kasa_config) cuts the base's smallest singular values first; merge it with PEFT",
    "monteclora_config": "MonteCLoRA (monteclora_config) draws its factors at random; merge it with PEFT",
    "arrow_config": "Arrow (arrow_config) chooses among adapters for each token, which no weight can",
}
"""Fields of configs that are refused where they are set, and why."""
MOST_TERMS: Final = 100
"""The longest Neumann series that is computed; PEFT's usual one has 5 terms."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The facts of adapter_config.json that change a result, checked; `where` names the file in errors."""

    where: str
    kind: str = "LORA"
    rank: int = 0
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    rank_pattern: PatternMap = field(default_factory=lambda: PatternMap({}, ""))
    alpha_pattern: PatternMap = field(default_factory=lambda: PatternMap({}, ""))
    tied: bool = False
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    neumann_terms: int = 0
    parameters: tuple[str, ...] = ()
    feedforward: tuple[str, ...] = ()
    refusal: str = ""

    @classmethod
    def parse(cls, document: Mapping[str, Any], where: str) -> PeftConfig:
        """Checks a config's document; raises `InvalidConfig`. Why it cannot be merged, if so, is kept in `refusal`."""
        # str() of PEFT's enumeration is PeftType.LORA, and its value LORA.
        kind = str(document.get("peft_type", "LORA")).removeprefix("PeftType.")
        adaptive = kind == "ADALORA"
        alpha = next((name for name in ("lora_alpha", "alpha") if name in document), None)
        return cls(
            where,
            kind=kind,
            # AdaLoRA prunes from its first rank on, and scales by it; its rank_pattern is a map of masks.
            rank=_rank(document.get("init_r" if adaptive else "r", 0) or 0, f"{where}: r"),
            alpha=_number(document[alpha], f"{where}: {alpha}") if alpha else None,
            rslora=_flag(document, "use_rslora", where),
            dora=_flag(document, "use_dora", where),
            rank_pattern=_pattern({} if adaptive else document, "rank_pattern", where),
            alpha_pattern=_pattern(document, "alpha_pattern", where),
            tied=_flag(document, "ensure_weight_tying", where),
            tokens=_tokens(document.get("trainable_token_indices") or document.get("token_indices"), where),
            neumann_terms=_neumann_terms(document, where) if kind == "OFT" else 0,
            parameters=_names(document, "target_parameters", where),
            feedforward=_names(document, "feedforward_modules", where) if kind == "IA3" else (),
            refusal=_refusal(document, kind),
        )

    def alpha_of(self, path: str) -> float | None:
        """The alpha of the module at `path`, None where the config has none."""
        alpha = self.alpha_pattern.value_of(path, self.alpha)
        return None if alpha is None else _number(alpha, f"{self.where}: alpha of {path}")

    def rank_of(self, path: str) -> int:
        """The rank that the config gives the module at `path`, 0 where the config has none."""
        return _rank(self.rank_pattern.value_of(path, self.rank), f"{self.where}: rank of {path}")

    def tokens_of(self, path: str) -> tuple[int, ...]:
        """The trainable_token_indices of the embedding at `path`."""
        return next((tokens for name, tokens in self.tokens.items() if not name or path.endswith(name)), ())

    def is_feedforward(self, path: str) -> bool:
        """Whether (IA)³ multiplies the inputs of the module at `path`, as in feedforward layers, and not its outputs."""
        return any(f".{path}".endswith(f".{name}") for name in self.feedforward)

    def parameter_of(self, path: str) -> str | None:
        """The path of the parameter that factors at `path` change, if target_parameters name one that is no `weight`.

        Several on one module are wrapped in each other, the first that the module declares deepest, behind `base_layer`s
        (PEFT tuners/tuners_utils.py, _inject_parameters). transformers declares gate and up before down; the order in
        the file is a set's, and says nothing.
        """
        # The outermost wrapper has no `base_layer` in its path, and belongs to the last of the sorted names.
        depth = path.count(".base_layer")
        module = path.replace(".base_layer", "")
        named = [name for name in self.parameters if f".{module}".endswith(f".{name.rpartition('.')[0]}")]
        named.sort(key=wrapping)
        if depth >= len(named) or named[len(named) - 1 - depth].endswith(".weight"):
            return None
        return f"{module}.{named[len(named) - 1 - depth].rpartition('.')[2]}"

    def scale(self, path: str, rank: int) -> float:
        """What the product of the factors of the module at `path`, of `rank`, is multiplied by."""
        alpha = self.alpha_of(path)
        if alpha is None or not rank:
            return 1.0
        if self.kind == "ADALORA":
            return alpha / (self.rank + 1e-5)  # PEFT tuners/adalora/layer.py
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def wrapping(parameter: str) -> bool:
    """The sorting key of parameters of one module, from the deepest wrapped to the outermost: transformers has down last."""
    return "down" in parameter.rpartition(".")[2]


def from_metadata(metadata: Mapping[str, str], where: str) -> dict[str, PeftConfig]:
    """The configs that diffusers put into a file's metadata, by component prefix ("unet", "text_encoder" …)."""
    if PEFT_METADATA_KEY not in metadata:
        return {}
    where = f"{where}: metadata {PEFT_METADATA_KEY}"
    try:
        document = json.loads(metadata[PEFT_METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{where}: is not JSON") from error
    if not isinstance(document, dict):
        raise InvalidConfig(f"{where}: is not a JSON object")
    components: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        component, _, name = key.rpartition(".")
        components.setdefault(component, {})[name] = value
    return {component: PeftConfig.parse(part, where) for component, part in components.items()}


def _refusal(document: Mapping[str, Any], kind: str) -> str:
    """Why an adapter with this config cannot be merged into weights, "" where it can."""
    for name, reason in REFUSED_FIELDS.items():
        if document.get(name):
            return reason
    # Of a later PEFT, perhaps: a method is turned on by a flag, a list or a config of its own, and numbers only tune it.
    new = [
        name
        for name, value in document.items()
        if name not in USED | HARMLESS and (value is True or (isinstance(value, dict | list) and value))
    ]
    if new:
        return (
            f"{first_few(new)} in the config are unknown to this version, and may change what is added; merge it with PEFT"
        )
    init = document.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        return (
            f"init_lora_weights is {init!r}, which changed the base it was trained on; save it with PEFT's "
            "path_initial_model_for_weight_conversion, or set init_lora_weights to true if the base is the changed one"
        )
    if kind in PROMPTS:
        return f"{kind} acts on prompts or activations, and cannot be merged into weights"
    return "" if kind in TUNERS else f"peft_type {kind} is not a kind that this version computes"


def _rank(value: object, what: str) -> int:
    # type, not isinstance: True is an int to Python.
    if type(value) is not int or value < 0:
        raise InvalidConfig(f"{what} is {value!r}, expected a whole number")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidConfig(f"{what} is {value!r}, expected a finite number")
    return float(value)


def _flag(document: Mapping[str, Any], name: str, where: str) -> bool:
    value = document.get(name, False)
    if value not in (True, False, None):
        raise InvalidConfig(f"{where}: {name} is {value!r}, expected true or false")
    return bool(value)


def _pattern(document: Mapping[str, Any], name: str, where: str) -> PatternMap:
    value = document.get(name) or {}
    if not isinstance(value, dict):
        raise InvalidConfig(f"{where}: {name} is {value!r}, expected a map from patterns to numbers")
    return PatternMap(value, where)


def _tokens(value: object, where: str) -> dict[str, tuple[int, ...]]:
    """trainable_token_indices, by the end of the embedding's name; "" for a list, which is of any."""
    by_name: dict[str, Any] = value if isinstance(value, dict) else {"": value or []}
    for indices in by_name.values():
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            raise InvalidConfig(f"{where}: trainable_token_indices is not a list of token numbers")
    return {name: tuple(indices) for name, indices in by_name.items()}


def _neumann_terms(document: Mapping[str, Any], where: str) -> int:
    if not _flag(document, "use_cayley_neumann", where):
        return 0
    terms = _rank(document.get("num_cayley_neumann_terms", 5), f"{where}: num_cayley_neumann_terms")
    if terms > MOST_TERMS:
        raise InvalidConfig(f"{where}: num_cayley_neumann_terms is {terms}, expected at most {MOST_TERMS}")
    # No term and one are the same to PEFT; 0 is the exact transform here.
    return max(terms, 1)


def _names(document: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = document.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise InvalidConfig(f"{where}: {name} is not a list of names")
    return tuple(value or ())
