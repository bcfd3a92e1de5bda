"""Merging into every class of transformers: `python -m benchmarks.classes OUT.jsonl [CLASS or TYPE ...]`.

Each class that the library's automatic classes know is built small, with random weights, and gets PEFT's LoRA on all of its
linear layers, tied heads included, and on its stacks of experts (`target_parameters`). The merged folder is loaded by
transformers, and every parameter is compared with the base's plus what PEFT says that its layer adds (get_delta_weight): no
merge of PEFT's is asked, which changes tied weights together. OUT.jsonl gets a line for each class; classes that it has
already are left out, so that a run can go on. At the end stands the table of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import json
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

import loratool
from docs.models import CONFIGS, default_config

TABLES = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "CTC", "MASKED_LM",
    "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "TEXT_TO_WAVEFORM",
)  # fmt: skip
"""The automatic classes whose models are tried, and the bare models."""
LARGEST = 100_000_000
"""Parameters of the largest model that is tried."""

WIDTHS = {
    32: "hidden_size d_model n_embd dim n_embed embed_dim hidden_dim embedding_size projection_dim out_hidden_size "
        "lru_width word_embed_proj_dim vision_output_dim output_hidden_size",
    48: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim mlp_dim ffn_hidden_size "
        "intermediate_size_mlp",
    24: "moe_intermediate_size shared_expert_intermediate_size expert_dim",
    16: "q_lora_rank kv_lora_rank num_mel_bins sliding_window num_position_embeddings",
    8: "head_dim d_kv attention_head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim patch_size state_size "
       "mamba_d_state mamba_n_heads mamba_d_head mamba_chunk_size linear_key_head_dim linear_value_head_dim rotary_dim "
       "num_conv_pos_embeddings hidden_size_per_layer_input",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
       "num_experts "
       "num_local_experts n_routed_experts moe_num_experts time_step_rank mamba_dt_rank linear_num_value_heads laurel_rank",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_decoder_layers "
       "num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk moe_top_k top_k_experts "
       "linear_num_key_heads num_feat_extract_layers num_conv_pos_embedding_groups",
    1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups max_window_layers",
    0: "num_kv_shared_layers num_nextn_predict_layers pad_token_id",
    96: "vocab_size vocab_size_per_layer_input audio_vocab_size",
    64: "max_position_embeddings n_positions", 128: "max_source_positions max_target_positions", 40: "image_size",
}  # fmt: skip
"""What configs call their sizes, by the size that a small model has."""
SMALL: Mapping[str, int] = {name: size for size, names in WIDTHS.items() for name in names.split()}
LAYERS = frozenset(WIDTHS[2].split()[:9])
TOKENS = {
    "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "decoder_start_token_id": 1, "forced_eos_token_id": 2,
    "audio_token_id": 5, "image_token_id": 6, "image_token_index": 6, "video_token_id": 7, "video_token_index": 7,
    "vision_start_token_id": 8, "vision_end_token_id": 9,
}  # fmt: skip
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "jamba": {
        "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": None},
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "window_size": 4, "image_size": 32, "patch_size": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    **{
        name: {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
        for name in (
            "wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "wav2vec2-conformer", "data2vec-audio",
            "sew", "sew-d",
        )
    },
}  # fmt: skip
"""Sizes that hang together, by model type."""


def classes() -> Iterator[tuple[str, str]]:
    """Every class that is tried, once, and its model type."""
    seen = set()
    tables = [f"MODEL_FOR_{name}_MAPPING_NAMES" for name in TABLES] + ["MODEL_MAPPING_NAMES"]
    for table in tables:
        for kind, names in getattr(modeling_auto, table, {}).items():
            for name in (names,) if isinstance(names, str) else names:
                if name not in seen:
                    seen.add(name)
                    yield name, kind


def shrink(config: PreTrainedConfig, names: Mapping[str, int]) -> dict[str, Any]:
    """The entries of a config with the sizes of a small model, where `names` has one for them; of its parts too."""
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        # By the object's own dictionary: what differs by layer cannot be asked of the whole.
        part = vars(config).get(name)
        if isinstance(part, PreTrainedConfig):
            found[name] = shrink(part, names)
        elif name in TOKENS and value is not None:
            found[name] = TOKENS[name]
        elif name in names and isinstance(value, int) and not isinstance(value, bool):
            found[name] = names[name]
        elif name in ("deepstack_visual_indexes", "fullatt_block_indexes") and names is SMALL:
            found[name] = [0, 1] if name.startswith("deep") else [1]
    if names is SMALL:
        found |= SPECIAL.get(config.model_type, {})
    found.pop("model_type", None)
    return found


def build(model: type[PreTrainedModel]) -> PreTrainedModel:
    """A small model of a class: of small widths where its config goes with them, else of its own with few layers."""
    few = {name: SMALL[name] for name in (*LAYERS, "vocab_size", "pad_token_id")}
    heads = {name: size for name, size in SMALL.items() if "head_dim" not in name}
    errors = []
    for names in (SMALL, heads, few, {}):
        try:
            usual = default_config(model)
            missing = CONFIGS.get(usual.model_type, {})
            config = type(usual)(**{**missing, **shrink(usual, names)})
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in model(copy.deepcopy(config)).parameters())
            if count > LARGEST:
                raise RuntimeError(f"has {count} parameters")
            torch.manual_seed(0)
            built = model(config).eval().float()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        for parameter in built.parameters():
            if parameter.numel() and (not parameter.isfinite().all() or not parameter.any()):
                torch.nn.init.normal_(parameter, std=0.1)
        return built
    raise RuntimeError(errors[0])


def train(model: PreTrainedModel, folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Puts an adapter with random factors into `folder`; returns what it adds, by parameter, and what PEFT refused."""
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)]
    stacks = {
        ".".join(name.split(".")[-2:]) for name, part in model.named_parameters() if part.ndim == 3 and "expert" in name
    }
    # PEFT refuses the layers whose weights Mamba's kernels read themselves.
    if "mamba" in model.config.model_type:
        linear = [name for name in linear if not name.endswith("out_proj")]
    note = ""
    try:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=linear, target_parameters=sorted(stacks) or None)
        wrapped = get_peft_model(copy.deepcopy(model), config)
    except Exception as error:
        if not stacks:
            raise
        note = f"{type(error).__name__}: {str(error)[:120]}"
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=8, target_modules=linear))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    added = {}
    for path, layer in wrapped.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            name = f"{path.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
            added[name] = layer.get_delta_weight("default").detach()
    return added, note


def differences(model: PreTrainedModel, added: Mapping[str, torch.Tensor], out: Path) -> dict[str, Any]:
    """The parameters of the folder `out`, loaded by transformers, that are not those of `model` with what was added."""
    merged, notes = type(model).from_pretrained(out, output_loading_info=True)
    wrong: dict[str, Any] = {kind: sorted(notes[kind])[:3] for kind in ("missing_keys", "unexpected_keys") if notes[kind]}
    theirs = dict(merged.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        want = parameter + added[name] if name in added else parameter
        if theirs[name].shape != want.shape:
            wrong[name] = f"{list(theirs[name].shape)} for {list(want.shape)}"
        elif want.numel() and (error := float((theirs[name] - want).abs().max())) > 2e-6 * max(1.0, float(want.abs().max())):
            wrong[name] = error
    return wrong


def try_class(name: str, work: Path) -> dict[str, Any]:
    """What becomes of one class: a result in a word, and why."""
    model_class = getattr(transformers, name, None)
    if model_class is None:
        return {"result": "not built", "why": "is no class of this transformers"}
    try:
        model = build(model_class)
        model.save_pretrained(work / "base")
        model = model_class.from_pretrained(work / "base").eval()
    except Exception as error:
        return {"result": "not built", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    try:
        added, note = train(model, work / "adapter")
    except Exception as error:
        return {"result": "PEFT refused", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    found: dict[str, Any] = {"changed": len(added), **({"note": note} if note else {})}
    try:
        loratool.merge(work / "base", [work / "adapter"], work / "out")
    except loratool.LoratoolError as error:
        return {"result": "refused", **found, "why": str(error).replace(str(work), "")[:600]}
    try:
        wrong = differences(model, added, work / "out")
    except Exception as error:
        return {"result": "does not load", **found, "why": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"result": "wrong" if wrong else "same", **found, **({"wrong": dict(list(wrong.items())[:5])} if wrong else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("only", nargs="*", help="names of classes or model types")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    for name, kind in classes():
        if any(row["class"] == name for row in done) or (arguments.only and not {name, kind} & set(arguments.only)):
            continue
        with tempfile.TemporaryDirectory(prefix="loratool-classes-") as folder, contextlib.redirect_stderr(io.StringIO()):
            row = {"class": name, "type": kind, **try_class(name, Path(folder))}
        done.append(row)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row["result"], name, str(row.get("why") or row.get("wrong") or "")[:200], flush=True)
        gc.collect()
    print(table(done))


def table(rows: list[dict[str, Any]]) -> str:
    """The table of results, as Markdown."""
    counts = Counter(row["result"] for row in rows)
    lines = [f"| {result} | {count} |" for result, count in counts.most_common()]
    return "\n".join(["| result | classes |", "|---|---|", *lines, f"| tried | {len(rows)} |"])


if __name__ == "__main__":
    main()
