"""PEFT's adapter_config.json: the scale of each module, and what else the factors themselves do not show.

Source: PEFT tuners/lora/config.py and utils/other.py (get_pattern_key). The file comes from strangers: nothing in it
is followed, imported or fetched, and its patterns are matched by `PatternMap`, for a while at most.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loratool.errors import InvalidAdapter, InvalidConfig, first_few
from loratool.formats.patterns import PatternMap
from loratool.names import CONTAINER, WRAPPERS, without_wrappers

PEFT_METADATA_KEY: Final = "lora_adapter_metadata"
"""Where diffusers keeps the same facts, prefixed by component (loaders/lora_base.py)."""

BASE_CHANGING_INITS: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract the adapter's first value from the base it is trained on."""

TUNERS: Final = frozenset({"LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA", "TRAINABLE_TOKENS", "LN_TUNING"})
"""The values of peft_type whose tensors are among the kinds of delta."""
UNMERGEABLE: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
        "acts on prompts or activations",
    ),
    "XLORA": "weighs its LoRAs anew for each token",
    "POLY": "mixes its factors anew for each task",
    "LILY": "mixes its factors anew for each token",
    "SHADOW": "runs a network of its own beside the model",
}
"""The values of peft_type that PEFT itself cannot merge into weights, and why."""
_BY_PEFT: Final = (
    "merge it with PEFT (merge_and_unload, save_pretrained) and use that model, or take what it changed with "
    "`loratool extract`"
)
"""The way out for what PEFT can merge and this version cannot."""

FIRST_AXIS: Final = "first"
"""The inputs of stacked experts' factors lie along a stack's first axis behind the experts."""
FLAGGED_LAST: Final = "flagged last"
"""They lie there, but for classes with transformers' flag `is_transposed`: there along the last axis."""
FLAGGED_FIRST: Final = "flagged first"
"""They lie along the last axis, but for those classes: there along the first."""
STACK_RULES: Final[tuple[tuple[tuple[int, ...], str], ...]] = (
    ((0, 19, 1), FLAGGED_FIRST),
    ((0, 19, 0), FLAGGED_LAST),
    ((0, 0, 0), FIRST_AXIS),
)
"""The first version of PEFT with each rule, the latest first (tuners/lora/layer.py, class ParamWrapper)."""

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
    "use_bdlora": f"BD-LoRA's factors are blocks along a diagonal (use_bdlora); {_BY_PEFT}",
    "kasa_config": f"KaSA took the smallest singular values out of the base it was trained on (kasa_config); {_BY_PEFT}",
    "monteclora_config": f"MonteCLoRA averages samples of its factors (monteclora_config); {_BY_PEFT}",
    "coft": f"a constrained OFT (coft) projects its blocks before it rotates; {_BY_PEFT}",
    "use_qalora": f"QALoRA (use_qalora) adds to averages of groups of inputs; {_BY_PEFT}",
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
    targets: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    version: str = ""
    feedforward: tuple[str, ...] = ()
    refusal: str = ""

    @classmethod
    def parse(cls, document: Mapping[str, Any], where: str) -> PeftConfig:
        """Checks a config's document; raises `InvalidConfig`. Why it cannot be merged, if so, is kept in `refusal`."""
        # str() of PEFT's enumeration is PeftType.LORA, and its value LORA.
        kind = str(document.get("peft_type", "LORA")).removeprefix("PeftType.")
        # What cannot be computed need not be understood either: other tuners give the same entries other meanings.
        if kind not in TUNERS:
            return cls(where, kind=kind, refusal=_refusal(document, kind))
        adaptive = kind == "ADALORA"
        alpha = next((name for name in ("lora_alpha", "alpha") if name in document), None)
        # PEFT's tuner of tokens alone calls their numbers token_indices, and means the same rows in all its modules.
        tokens = document.get("token_indices" if kind == "TRAINABLE_TOKENS" else "trainable_token_indices")
        targets = document.get("target_modules")
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
            tokens=_tokens(tokens, where),
            neumann_terms=_neumann_terms(document, where) if kind == "OFT" else 0,
            targets=_names(document, "target_modules", where) if isinstance(targets, list) else (),
            version=_text(document, "peft_version", where),
            parameters=_names(document, "target_parameters", where),
            feedforward=_names(document, "feedforward_modules", where) if kind == "IA3" else (),
            refusal=_refusal(document, kind),
        )

    @property
    def is_lora(self) -> bool:
        """Whether the adapter is of PEFT's LoRA, and not of another tuner."""
        return self.kind == "LORA"

    def alpha_of(self, path: str) -> float | None:
        """The alpha of the module at `path`, None where the config has none."""
        alpha = self.alpha_pattern.value_of(path, self.alpha)
        return None if alpha is None else _number(alpha, f"{self.where}: alpha of {path}")

    def rank_of(self, path: str) -> int:
        """The rank that the config gives the module at `path`, 0 where the config has none."""
        return _rank(self.rank_pattern.value_of(path, self.rank), f"{self.where}: rank of {path}")

    @property
    def stack_rule(self) -> str:
        """How the version of PEFT that wrote the adapter lays stacked experts' factors to their axes: a constant of this
        module; "" where the config does not name its version."""
        numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", self.version)
        if not numbers:
            return ""
        version = tuple(int(number or 0) for number in numbers.groups())
        return next(rule for first, rule in STACK_RULES if version >= first)

    def tokens_of(self, path: str) -> tuple[int, ...]:
        """The trainable_token_indices of the embedding at `path`."""
        return next((tokens for name, tokens in self.tokens.items() if not name or path.endswith(name)), ())

    def is_feedforward(self, path: str) -> bool:
        """Whether (IA)³ multiplies the inputs of the module at `path`, as in feedforward layers, and not its outputs."""
        return any(ends_with(path, name) for name in self.feedforward)

    def parameter_of(self, path: str, wrappers: int, rows: int) -> TargetParameter | None:
        """The parameter that factors at `path` change, where target_parameters name it; None where they are a module's.

        `wrappers` is the number of paths with factors that differ in their `base_layer`s alone: several parameters of one
        module are wrapped in each other, the first that the module declares deepest (PEFT tuners/tuners_utils.py,
        _inject_parameters). `rows` are those of the first factor: as many as its rank, times the experts of a stack.
        Raises `InvalidAdapter` where the config does not say which parameter it is.
        """
        module = path.replace(".base_layer", "")
        dotted = (name.rpartition(".") for name in self.parameters if "." in name)
        names = {name for holder, _, name in dotted if ends_with(module, holder)}
        # A bare name is of whatever module has such a parameter; not of one that is itself a target.
        bare = len(names) < wrappers and not any(ends_with(module, target) for target in self.targets)
        if bare:
            names |= {name for name in self.parameters if "." not in name}
        # Of more names than wrappers, and of a module that may be a plain target, the rank has to tell.
        if len(names) > wrappers or (bare and wrappers == 1):
            names = {name for name in names if self._stacks(f"{module}.{name}", rows)}
        if not names:
            return None
        if len(names) != wrappers:
            raise InvalidAdapter(
                f"{self.where}: target_parameters name {', '.join(sorted(names))}, and {module} has factors for {wrappers} "
                "of them; name the trained ones alone there"
            )
        # The outermost wrapper has no `base_layer` in its path, and belongs to the last.
        parameter = f"{module}.{sorted(names, key=wrapping)[wrappers - 1 - path.count('.base_layer')]}"
        return TargetParameter(parameter, self._experts(parameter, rows))

    def _stacks(self, parameter: str, rows: int) -> bool:
        """Whether factors of so many rows are those of several experts, if they are those of `parameter`."""
        rank = self.rank_of(parameter)
        return bool(rank) and rows % rank == 0 and rows > rank

    def _experts(self, parameter: str, rows: int) -> int:
        rank = self.rank_of(parameter)
        if not rank or rows % rank:
            raise InvalidAdapter(f"{self.where}: gives {parameter} the rank {rank}, and its factors have {rows} rows")
        return rows // rank

    def scale(self, path: str, rank: int) -> float:
        """What the product of the factors of the module at `path`, of `rank`, is multiplied by."""
        alpha = self.alpha_of(path)
        if alpha is None or not rank:
            return 1.0
        if self.kind == "ADALORA":
            return alpha / (self.rank + 1e-5)  # PEFT tuners/adalora/layer.py
        return times_added(path) * alpha / (math.sqrt(rank) if self.rslora else rank)


def times_added(path: str) -> int:
    """How many times PEFT adds a module's product to the weight: twice for nn.MultiheadAttention's output layer.

    Its MultiheadAttention.merge, which every forward pass goes through, adds it and then calls the output layer's own merge
    (PEFT 0.21 tuners/lora/layer.py), so that the adapter was trained so.
    """
    return 2 if path.endswith(".base_layer.out_proj") else 1


@dataclass(frozen=True, slots=True)
class TargetParameter:
    """A parameter that PEFT's target_parameters name: its `path`, and of how many `experts` its factors are (1: of a
    matrix)."""

    path: str
    experts: int


def wrapping(parameter: str) -> tuple[bool, bool, str]:
    """The sorting key of parameters of one module, from the deepest wrapped to the outermost: as transformers' classes
    declare them, which is down (DBRX's w2) last, and DBRX's v1 behind its w1."""
    name = parameter.rpartition(".")[2]
    return "down" in name or name == "w2", name == "v1", name


def ends_with(path: str, ending: str) -> bool:
    """Whether the names at the end of `path` are those of `ending`: PEFT's rule for targets."""
    return f".{path}".endswith(f".{ending}")


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
    if why := UNMERGEABLE.get(kind):
        return f"peft_type {kind} {why}, and cannot be merged into weights"
    if kind not in TUNERS:
        return f"peft_type {kind} is not a kind that this version computes; {_BY_PEFT}"
    for name, reason in REFUSED_FIELDS.items():
        # One block along the diagonal is a plain LoRA.
        whole = isinstance(document.get(name), dict) and document[name].get("nblocks") == 1
        if document.get(name) and not whole:
            return reason
    # Of a later PEFT, perhaps: a method is turned on by a flag, a list or a config of its own, and numbers only tune it.
    new = [
        name
        for name, value in document.items()
        if name not in USED | HARMLESS | REFUSED_FIELDS.keys()
        and (value is True or (isinstance(value, dict | list) and value))
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
    return ""


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


def _text(document: Mapping[str, Any], name: str, where: str) -> str:
    value = document.get(name) or ""
    if not isinstance(value, str):
        raise InvalidConfig(f"{where}: {name} is {value!r}, expected a text")
    return value


def _pattern(document: Mapping[str, Any], name: str, where: str) -> PatternMap:
    value = document.get(name) or {}
    if not isinstance(value, dict):
        raise InvalidConfig(f"{where}: {name} is {value!r}, expected a map from patterns to numbers")
    found: dict[str, Any] = {}
    for key, number in value.items():
        # The first pattern that matches decides.
        found.setdefault(_without_wrappers(key), number)
    return PatternMap(found, where)


def _without_wrappers(pattern: str) -> str:
    """A pattern or a name of modules, without what wrappers put into their names."""
    # In a regular expression a dot may be escaped, and an anchor stand in front.
    anchor = "^" if pattern.startswith("^") else ""
    dotted = re.sub(rf"({'|'.join(WRAPPERS)})\\\.", r"\1.", pattern.removeprefix("^"))
    return anchor + without_wrappers(dotted).removeprefix(CONTAINER)


def _tokens(value: object, where: str) -> dict[str, tuple[int, ...]]:
    """trainable_token_indices, by the end of the embedding's name; "" for a list, which is of any."""
    by_name: dict[str, Any] = value if isinstance(value, dict) else {"": value or []}
    for indices in by_name.values():
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            raise InvalidConfig(f"{where}: trainable_token_indices is not a list of token numbers")
    return {_without_wrappers(name): tuple(indices) for name, indices in by_name.items()}


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
    return tuple(map(_without_wrappers, value or ()))
