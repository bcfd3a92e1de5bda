"""PEFT as the oracle: what `merge_and_unload` saves, and what base and adapter compute together.

Known to be wrong in PEFT 0.21, and therefore checked against base + adapter instead: merging a change of a tied
embedding changes the head too, and `ensure_weight_tying` adds the change twice.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from loratool import Checkpoint, LoratoolError, merge
from tests.models import llm, peft_adapter, save

pytestmark = [pytest.mark.filterwarnings("ignore")]

TUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "DoRA, embedding": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 6, "target_modules": ["q_proj", "down_proj"]}),
    "LoKr": ("LoKrConfig", {"r": 4, "alpha": 2, "target_modules": ["q_proj", "v_proj"]}),
    "LoKr, both factored": (
        "LoKrConfig",
        {"r": 2, "alpha": 2, "decompose_both": True, "target_modules": ["q_proj", "v_proj"]},
    ),
    "LoKr, whole": ("LoKrConfig", {"r": 64, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "target_modules": ["q_proj", "down_proj"]}),
    "OFT, 3 terms": (
        "OFTConfig",
        {"oft_block_size": 8, "num_cayley_neumann_terms": 3, "target_modules": ["q_proj"]},
    ),
    "OFT, 2 terms": (
        "OFTConfig",
        {"oft_block_size": 8, "num_cayley_neumann_terms": 2, "target_modules": ["q_proj"]},
    ),
    "OFT, exact": ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False, "target_modules": ["q_proj"]}),
    "OFT, one block for all": ("OFTConfig", {"oft_block_size": 8, "block_share": True, "target_modules": ["q_proj"]}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 1, "target_modules": ["q_proj", "v_proj"]}),
    "BOFT, 3 stages": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 3, "target_modules": ["q_proj"]}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "VeRA": ("VeraConfig", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "AdaLoRA": (
        "AdaLoraConfig",
        {"init_r": 6, "target_r": 4, "lora_alpha": 8, "total_step": 10, "target_modules": ["q_proj"]},
    ),
}
"""Every other method of PEFT whose weights can be merged, on a Qwen2, which has biases for (IA)³ to multiply."""


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner_merges_as_peft_merges_it(tmp_path: Path, tuner: str) -> None:
    import peft

    name, config = TUNERS[tuner]
    model = llm("qwen2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    peft_adapter(copy.deepcopy(model), tmp_path / "adapter", kind=getattr(peft, name), **config)
    PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "oracle")

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    ours, theirs, base = (Checkpoint(tmp_path / folder) for folder in ("out", "oracle", "base"))
    assert set(ours) == set(theirs)
    assert any(not torch.equal(theirs[name], base[name]) for name in base)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_fused_experts_merge_into_weights_that_are_stored_one_by_one(
    tmp_path: Path, kind: str, parameters: list[str]
) -> None:
    named = [f"mlp.experts.{name}" for name in parameters]
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": named}
    model = llm(kind)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    peft_adapter(copy.deepcopy(model), tmp_path / "adapter", **config)
    PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "oracle")

    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "oracle")
    assert set(ours) == set(theirs)
    assert any("experts" in name for name in report.changed)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_fused_experts_merge_into_weights_that_are_stored_stacked(tmp_path: Path) -> None:
    named = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = llm("qwen3_moe")
    save(tmp_path / "base.safetensors", model.state_dict())
    peft_adapter(copy.deepcopy(model), tmp_path / "adapter", r=2, lora_alpha=6, target_modules=[], target_parameters=named)
    expected = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()

    merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors")

    ours = Checkpoint(tmp_path / "out.safetensors")
    assert ours["model.layers.0.mlp.experts.down_proj"].ndim == 3
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=2e-6)


class Layers(torch.nn.Module):
    """A convolution of each sort, a linear layer and an embedding, for what no language model has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(8, 12, 3)
        self.point = torch.nn.Conv2d(8, 12, 1)
        self.fc = torch.nn.Linear(16, 12)
        self.emb = torch.nn.Embedding(20, 8)


CONVOLUTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 3, "lora_alpha": 6, "target_modules": ["conv", "point", "fc", "emb"]}),
    "DoRA": ("LoraConfig", {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["conv", "point", "fc", "emb"]}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 6, "target_modules": ["conv", "point", "fc"]}),
    "LoHa, effective": ("LoHaConfig", {"r": 3, "alpha": 6, "use_effective_conv2d": True, "target_modules": ["conv"]}),
    "LoKr": ("LoKrConfig", {"r": 3, "alpha": 6, "target_modules": ["conv", "point", "fc"]}),
    "LoKr, effective": ("LoKrConfig", {"r": 1, "alpha": 2, "use_effective_conv2d": True, "target_modules": ["conv"]}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "target_modules": ["conv", "point", "fc"]}),
    "IA3": ("IA3Config", {"target_modules": ["conv", "fc"], "feedforward_modules": ["fc"]}),
}


@pytest.mark.parametrize("tuner", CONVOLUTIONS)
def test_convolutions_merge_as_peft_merges_them(tmp_path: Path, tuner: str) -> None:
    import peft

    name, config = CONVOLUTIONS[tuner]
    model = Layers()
    save(tmp_path / "base.safetensors", model.state_dict())
    peft_adapter(copy.deepcopy(model), tmp_path / "adapter", kind=getattr(peft, name), **config)
    expected = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()

    merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors")

    ours = Checkpoint(tmp_path / "out.safetensors")
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_replace_their_rows(tmp_path: Path, tied: bool) -> None:
    config = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 11]}

    assert _logits_differ(tmp_path, "qwen2", {"tie_word_embeddings": tied}, config) < 1e-5


UNTIED = {"tie_word_embeddings": False}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, all linear": ("llama", {}, {"target_modules": "all-linear"}),
    "llama, rsLoRA and patterns": (
        "llama",
        {},
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2, "^model.layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"model.layers.0..*": 3, "k_proj": 7},
        },
    ),
    "llama, embedding and head": ("llama", {}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama, modules_to_save": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "qwen2, bias all": ("qwen2", UNTIED, {"target_modules": ["q_proj"], "bias": "all"}),
    "qwen2, bias lora_only": ("qwen2", UNTIED, {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    "qwen2, lora bias": ("qwen2", UNTIED, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "gpt2, Conv1D": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, Conv1D assume": ("gpt2", {}, {"target_modules": ["c_attn"]}),
    "mixtral, attention and router": ("mixtral", {}, {"target_modules": ["q_proj", "o_proj", "gate"]}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_merging_equals_merge_and_unload(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    kind, changes, config = CASES[case]
    model = llm(kind, **changes).to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    peft_adapter(copy.deepcopy(model), tmp_path / "adapter", r=4, lora_alpha=16, **config)
    # Loaded again, because PEFT sorts the patterns when it saves them, and the first that matches wins.
    PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "oracle")

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "oracle")
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        # PEFT rounds ΔW and then the sum; we round once: one unit in the last place of bf16 apart at most, and of ΔW.
        rtol, atol = (1e-6, 1e-6) if dtype == torch.float32 else (2**-7, 2**-7)
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", ["llama, all linear", "qwen2, bias all", "gpt2, Conv1D", "mixtral, attention and router"])
def test_the_merged_folder_computes_what_base_and_adapter_do(tmp_path: Path, case: str) -> None:
    kind, changes, config = CASES[case]
    assert _logits_differ(tmp_path, kind, changes, config) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_tied_embeddings_are_untied_where_only_one_of_them_changes(tmp_path: Path, config: dict[str, Any]) -> None:
    assert _logits_differ(tmp_path, "qwen2", {"tie_word_embeddings": True}, config) < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_adapter_leaves_the_embedding_tied(tmp_path: Path) -> None:
    config = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}

    assert _logits_differ(tmp_path, "qwen2", {"tie_word_embeddings": True}, config) < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def _logits_differ(folder: Path, kind: str, changes: dict[str, Any], config: dict[str, Any]) -> float:
    """The largest difference of logits between base + adapter in PEFT and the merged folder in transformers."""
    from transformers import AutoModelForCausalLM

    model = llm(kind, **changes)
    model.save_pretrained(folder / "base", max_shard_size="40KB")
    peft_adapter(copy.deepcopy(model), folder / "adapter", r=4, lora_alpha=16, **config)
    tokens = torch.arange(12)[None]
    with torch.no_grad(), warnings.catch_warnings():
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        expected = PeftModel.from_pretrained(base, folder / "adapter").eval()(tokens).logits

        merge(folder / "base", [folder / "adapter"], folder / "out")

        logits = AutoModelForCausalLM.from_pretrained(folder / "out").eval()(tokens).logits
    return float((logits - expected).abs().max())


def test_a_vocabulary_that_grew_is_replaced_and_the_config_says_so(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(52, mean_resizing=False)
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    wrapped = peft_adapter(model, tmp_path / "adapter", r=4, lora_alpha=16, **config)

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    tokens = torch.arange(40, 52)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens).logits
        torch.testing.assert_close(merged, wrapped.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_pickled_adapter_is_read_only_when_allowed(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", r=4, lora_alpha=16, target_modules=["q_proj"])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "expected")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")

    with pytest.raises(LoratoolError, match="`allow_pickle=True`"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", allow_pickle=True)

    ours, expected = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "expected")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_an_adapter_name_in_the_keys_changes_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", r=4, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "expected")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    named = {
        key.replace("lora_A.weight", "lora_A.style.weight")
        .replace("lora_B.weight", "lora_B.style.weight")
        .replace("lm_head.weight", "lm_head.modules_to_save.style.weight"): tensor
        for key, tensor in load_file(weights).items()
    }
    save_file(named, weights)

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    ours, expected = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "expected")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def meta_names(tensors: dict[str, torch.Tensor], heads: int, groups: int) -> dict[str, torch.Tensor]:
    """A Llama's tensors as Meta stores them: alpaca-lora's export_state_dict_checkpoint.py, with grouped heads."""
    table = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    renamed = {}
    for name, tensor in tensors.items():
        new = name.removeprefix("model.") if "embed_tokens" not in name else name
        for ours, theirs in table.items():
            new = new.replace(ours, theirs)
        count = {"attention.wq.weight": heads, "attention.wk.weight": groups}.get(".".join(new.split(".")[-3:]))
        rows = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2) if count else tensor
        renamed[new] = rows.reshape(tensor.shape)
    return renamed


@pytest.mark.parametrize("known_by", ["rope.freqs", "params.json"])
def test_an_adapter_in_hugging_face_names_merges_into_metas(tmp_path: Path, known_by: str) -> None:
    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    peft_adapter(copy.deepcopy(model), tmp_path / "adapter", r=4, lora_alpha=16, target_modules="all-linear")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "expected")
    tensors = meta_names(dict(Checkpoint(tmp_path / "base")), heads=4, groups=2)
    if known_by == "rope.freqs":
        tensors["rope.freqs"] = torch.ones(4)
    else:
        (tmp_path / "params.json").write_text(json.dumps({"dim": 32, "n_heads": 4, "n_kv_heads": 2}))
    save(tmp_path / "meta.safetensors", tensors)

    merge(tmp_path / "meta.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors")

    ours = Checkpoint(tmp_path / "out.safetensors")
    for name, tensor in meta_names(dict(Checkpoint(tmp_path / "expected")), heads=4, groups=2).items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)


def test_without_the_size_of_a_head_metas_names_are_not_guessed(tmp_path: Path) -> None:
    model = llm("llama")
    peft_adapter(model, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    save(tmp_path / "meta.safetensors", meta_names(dict(llm("llama").state_dict()), heads=4, groups=2))

    with pytest.raises(LoratoolError, match="no target"):
        merge(tmp_path / "meta.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base"),
        ({"init_lora_weights": "olora"}, "changed the base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "activated"),
        ({"peft_type": "PREFIX_TUNING"}, "prompts"),
        ({"peft_type": "FOURIERFT"}, "FOURIERFT"),
        ({"r": 7}, "rank 4"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"use_dora": True}, "magnitude"),
        ({"rank_pattern": {"((a{1000}){1000}){1000}": 3}}, "too intricate"),
        ({"rank_pattern": {"[": 3}}, "regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
    ],
)
def test_a_config_that_cannot_be_right_is_an_error_that_names_it(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", r=4, lora_alpha=16, target_modules=["q_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))

    with pytest.raises(LoratoolError, match=said) as error:
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    assert str(tmp_path / "adapter") in str(error.value)
    assert not (tmp_path / "out").exists()
