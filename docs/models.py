"""Writes what transformers knows of its model classes to `loratool/archs/transformers.json`: `python -m docs.models`.

Needs transformers, and takes some minutes: every class is built once, without memory for its weights. A test holds the file
against the transformers that is installed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.core_model_loading import (
    GroupWeightRename,
    Inkling2IndexOffsetWeightRename,
    PrefixChange,
    WeightTransform,
)
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

import loratool

FILE: Final = Path(loratool.__file__).parent / "archs" / "transformers.json"
AUTOS: Final = (
    "MODEL", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_PRETRAINING", "MODEL_FOR_BACKBONE", "MODEL_FOR_TEXT_ENCODING", "MODEL_FOR_MASKED_LM", "MODEL_FOR_CTC",
    "MODEL_FOR_TEXT_TO_WAVEFORM", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_VISION_2_SEQ",
    "MODEL_FOR_OBJECT_DETECTION", "MODEL_FOR_KEYPOINT_DETECTION",
)  # fmt: skip
"""Transformers' tables of the class of each model type, in the order in which a part's class is looked up."""
DEPTHS: Final = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "depth",
)  # fmt: skip
"""What configs call the number of layers, which says nothing of names."""
ROPE_OF_LAYERS: Final = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
    }
}
CONFIGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "beit": {"out_indices": [3, 5, 7, 11]},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {"text_config": ROPE_OF_LAYERS},
    "cohere_compass_text": ROPE_OF_LAYERS,
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "decision_transformer": {"add_cross_attention": True},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 31]}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", *["sparse"] * 31]},
    "diffusion_gemma": {"text_config": {"moe_intermediate_size": 64, "num_experts": 8, "top_k_experts": 2}},
    "diffusion_gemma_text": {"moe_intermediate_size": 64, "num_experts": 8, "top_k_experts": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "esm": {"vocab_size": 33},
    "gpt2": {"add_cross_attention": True},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "4/8"},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "hunyuan_vl_text": {"head_dim": 128},
    "imagegpt": {"add_cross_attention": True},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "moshi": {"audio_vocab_size": 2048},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "t5gemma": {"is_encoder_decoder": False},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}  # fmt: skip
"""What the default config of a model type lacks, so that no model can be built from it, or not all of its modules."""
LABELLING: Final = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
"""The endings of classes that put a head for labels or spans in the place of a language model's."""
ALIASES: Final = ("tie_embedding", "tie_embeddings", "tie_codebooks_embeddings")
"""Other names of `tie_word_embeddings` in configs."""


def transform_row(transform: WeightTransform) -> dict[str, Any]:
    """A transform of names as data: patterns on disk and in memory for loading, and back for saving."""
    back = transform.reverse_transform()
    row: dict[str, Any] = {"from": transform.source_patterns, "to": transform.target_patterns}
    if back.source_patterns != transform.target_patterns or back.target_patterns != transform.source_patterns:
        row["back"] = [back.source_patterns, back.target_patterns]
    if isinstance(transform, PrefixChange):
        row["prefix"] = True
    if isinstance(transform, GroupWeightRename):
        row["group"] = True
    if isinstance(transform, Inkling2IndexOffsetWeightRename):
        row["offset"] = transform.offset
    operations = getattr(transform, "operations", ())
    if operations:
        row["steps"] = [[type(step).__name__, {k: v for k, v in vars(step).items() if v is not None}] for step in operations]
    return row


def conversions() -> dict[str, Any]:
    """The transforms by model type or class; the name of another one that has the same."""
    found: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for name, transforms in conversion_mapping._build_checkpoint_conversion_mapping().items():
        rows = [transform_row(transform) for transform in transforms]
        first = seen.setdefault(json.dumps(rows), name)
        found[name] = rows if first == name else first
    return found


def autos() -> dict[str, Mapping[str, str]]:
    """For each of `AUTOS`, the class of each model type."""
    found = {}
    for name in AUTOS:
        table = getattr(modeling_auto, f"{name}_MAPPING_NAMES", {})
        found[name] = {kind: value if isinstance(value, str) else value[0] for kind, value in table.items()}
    return found


def model_classes() -> Iterator[type[PreTrainedModel]]:
    """Every class of transformers that has weights of its own."""
    for name in sorted(dir(transformers)):
        with contextlib.suppress(Exception):
            found = getattr(transformers, name)
            if (
                isinstance(found, type)
                and issubclass(found, PreTrainedModel)
                and found.config_class
                and not name.endswith("PreTrainedModel")
            ):
                yield found


def default_config(model: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config of a class by default; of a pair of models, which has none, one of two usual ones."""
    kind = model.config_class
    pairs = {"vision-encoder-decoder": "vit gpt2", "encoder-decoder": "bert bert", "speech-encoder-decoder": "wav2vec2 bert"}
    if kind.model_type in pairs:
        parts = [CONFIG_MAPPING[name]() for name in pairs[kind.model_type].split()]
        return kind.from_encoder_decoder_configs(*parts)
    if kind.model_type == "vision-text-dual-encoder":
        return kind.from_vision_text_configs(CONFIG_MAPPING["clip_vision_model"](), CONFIG_MAPPING["bert"]())
    return kind(**(CONFIGS.get(kind.model_type, {}) if kind.model_type != "t5gemma" or "Encoder" in model.__name__ else {}))


def _flatten(config: PreTrainedConfig) -> None:
    """Leaves two layers to a config and its parts."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _flatten(value)
        elif name in DEPTHS and isinstance(value, int) and value > 2:
            with contextlib.suppress(Exception):
                setattr(config, name, 2)


def _expire(*_: object) -> None:
    raise TimeoutError("took too long")


def build(model: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of a class without memory for its weights: with few layers, else as it is by default."""
    signal.signal(signal.SIGALRM, _expire)
    error: Exception | None = None
    for shrink in (True, False):
        try:
            signal.alarm(60)
            config = default_config(model)
            if shrink:
                _flatten(config)
            with torch.device("meta"):
                return model(config)
        except Exception as caught:
            error = caught
        finally:
            signal.alarm(0)
    assert error
    raise error


def parts_of(model: PreTrainedModel, tables: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """The models right inside another, by path: the class, and where the config chooses it the config's entry and table."""
    found: dict[str, list[str]] = {}
    for path, part in model.named_modules():
        if not path or not isinstance(part, PreTrainedModel) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        row, config = [type(part).__name__], part.config
        entry = next((k for k, v in vars(model.config).items() if isinstance(v, PreTrainedConfig) and v is config), None)
        entry = entry or next(
            (k for k, v in vars(model.config).items() if isinstance(v, PreTrainedConfig) and type(v) is type(config)), None
        )
        table = next((name for name, table in tables.items() if table.get(config.model_type) == row[0]), None)
        if entry:
            row += [entry, *([table] if table else [])]
        found[path] = row
    return found


def stacks_of(model: PreTrainedModel) -> list[str]:
    """The parameters of three dimensions that are no kernels, by the names of their holder and their own: stacks of experts.

    Those that a holder declares to lie as (experts, in, out) are marked by a `^` in front; PEFT takes the others as
    (experts, out, in).
    """
    found = set()
    for path, holder in model.named_modules():
        for name, parameter in holder.named_parameters(recurse=False):
            if parameter.ndim == 3 and len(parameter) > 1 and not isinstance(holder, torch.nn.modules.conv._ConvNd):
                found.add(f"{'^' if getattr(holder, 'is_transposed', False) else ''}{path.rpartition('.')[2]}.{name}")
    return sorted(found)


def conv1d_of(model: PreTrainedModel) -> list[str]:
    """The last names of a model's own modules of transformers' Conv1D, whose weights lie as (in, out); not its
    parts' own."""
    parts = [f"{path}." for path, part in model.named_modules() if path and isinstance(part, PreTrainedModel)]
    return sorted(
        {
            path.rpartition(".")[2]
            for path, module in model.named_modules()
            if isinstance(module, Conv1D) and not any(map(path.startswith, parts))
        }
    )


def ties_of(model: type[PreTrainedModel]) -> list[str]:
    """What decides whether a class ties its weights, beside `tie_word_embeddings` in its config.

    "default" where the weights are tied unless the config says no; "always" where the config cannot say no; a config's entry
    where the same entry in that part, or an entry of that name, ties them too.
    """

    def is_tied(**given: Any) -> bool | None:
        with contextlib.suppress(Exception):
            return bool(model.config_class(**given).tie_word_embeddings)
        return None

    given = dict(CONFIGS.get(model.config_class.model_type, {}))
    found = ["default"] if is_tied(**given) else []
    always = is_tied(**given | {"tie_word_embeddings": False})
    if always:
        found = ["always"]
    for alias in ALIASES:
        if is_tied(**given | {alias: True}) and is_tied(**given | {alias: False}) is False:
            found.append(alias)
    for entry in () if always else model.config_class.sub_configs:
        inner = {**given.get(entry, {}), "tie_word_embeddings": True}
        if is_tied(**given | {"tie_word_embeddings": False, entry: inner}):
            found.append(entry)
    return found


def head_of(model: PreTrainedModel) -> list[str]:
    """The parameters of a class for labels or spans that the language model of the same base lacks: its head, a pooler."""
    if not type(model).__name__.endswith(LABELLING):
        return []
    prefix = f"{model.base_model_prefix}."
    return sorted(
        name
        for name in model.state_dict()
        if not re.search(r"\.\d+\.", name) and (not name.startswith(prefix) or ".pooler." in name)
    )


def class_row(
    model: type[PreTrainedModel], built: PreTrainedModel | None, tables: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """What is known of a class; parts, stacks and Conv1D only where a model of it could be `built`."""
    row: dict[str, Any] = {"type": model.config_class.model_type}
    if model.base_model_prefix:
        row["prefix"] = model.base_model_prefix
    # A few classes tie by what their config says, as the model itself tells.
    tied = (built or model)._tied_weights_keys
    if isinstance(tied, dict) and tied:
        row["tied"] = tied
        if ties := ties_of(model):
            row["ties"] = ties
    if built:
        found = {"parts": parts_of(built, tables), "stacks": stacks_of(built), "conv1d": conv1d_of(built)}
        row |= {name: value for name, value in found.items() if value}
    return row


def class_rows(
    tables: Mapping[str, Mapping[str, str]],
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]], dict[str, str]]:
    """What is known of every class, those that only stand inside others too; the heads; why some could not be built."""
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    heads: dict[str, list[str]] = {}
    for model in model_classes():
        built = None
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                built = build(model)
        except Exception as error:
            failed[model.__name__] = f"{type(error).__name__}: {str(error)[:100]}"
        rows[model.__name__] = class_row(model, built, tables)
        if built and (head := head_of(built)):
            heads[model.__name__] = head
        for part in built.modules() if built else ():
            if isinstance(part, PreTrainedModel) and not hasattr(transformers, type(part).__name__):
                rows.setdefault(type(part).__name__, class_row(type(part), part, tables))
    return rows, heads, failed


def render_rows(name: str, rows: Mapping[str, Any]) -> str:
    """One member of the file's object, a line for each entry."""
    lines = ",\n".join(
        f"  {json.dumps(key)}: {json.dumps(value, separators=(', ', ': '))}" for key, value in sorted(rows.items())
    )
    return f"{json.dumps(name)}: {{\n{lines}\n}}"


def main() -> None:
    """Builds every class and writes the file."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    tables = autos()
    rows, heads, failed = class_rows(tables)
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    used = {row[2] for each in rows.values() for row in each.get("parts", {}).values() if len(row) > 2}
    kept = {name: table for name, table in tables.items() if name in used}
    members = [
        f'"transformers": {json.dumps(transformers.__version__)}',
        render_rows("conversions", conversions()),
        render_rows("autos", kept),
        render_rows("classes", rows),
        render_rows("heads", heads),
    ]
    FILE.write_text("{\n" + ",\n".join(members) + "\n}\n")
    print(f"{len(rows)} classes, {len(failed)} of them not built", file=sys.stderr)


if __name__ == "__main__":
    main()
