"""LoRA on a mixture of experts against real PEFT and transformers: stacked or one by one, whichever way a stack lies."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from loratool import Checkpoint, LoratoolError, convert, merge
from loratool.archs.classes import class_facts
from loratool.errors import AmbiguousFile, ShapeMismatch
from tests.models import llm, peft_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt_oss(inner: int = 32) -> torch.nn.Module:
    """A tiny gpt-oss, whose stacks are (experts, in, out) in memory and on disk."""
    import transformers as hf

    torch.manual_seed(2)
    config = hf.GptOssConfig(
        hidden_size=32,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        **SPECIAL,
    )
    model = hf.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all() or not parameter.any():
                parameter.normal_(std=0.02)
    return model


def require_as_peft(model: torch.nn.Module, folder: Path, **config: Any) -> None:
    """Trains nothing, merges an adapter of `config` and compares every tensor with those of PEFT's own merge."""
    model.save_pretrained(folder / "base")
    peft_adapter(copy.deepcopy(model), folder / "adapter", r=2, lora_alpha=6, **config)
    PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(folder / "right")
    merge(folder / "base", [folder / "adapter"], folder / "out")
    require_same(folder / "out", folder / "right")


def require_same(out: Path, right: Path) -> None:
    ours, theirs = Checkpoint(out), Checkpoint(right)
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen3_moe", "all-linear"),
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
    ],
)
def test_target_modules_that_peft_turns_into_parameters(tmp_path: Path, kind: str, targets: Any) -> None:
    """PEFT writes bare names, and patterns of the parameters' own names."""
    require_as_peft(llm(kind), tmp_path, target_modules=targets)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "gate_up_proj" in said["target_parameters"]
    # Written anew, it is the same adapter: with the router's weight among the parameters, and a pattern for each rank.
    convert(tmp_path / "adapter", tmp_path / "again", "peft")
    merge(tmp_path / "base", [tmp_path / "again"], tmp_path / "out2")
    require_same(tmp_path / "out2", tmp_path / "right")


@pytest.mark.parametrize("parameters", [STACKS, STACKS[1:], ["1.mlp.experts.down_proj"], ["down_proj"]])
@pytest.mark.parametrize("inner", [24, 32])
def test_stacks_that_lie_with_inputs_first(tmp_path: Path, parameters: list[str], inner: int) -> None:
    """gpt-oss; with 32, down is square, as in the released models."""
    require_as_peft(gpt_oss(inner), tmp_path, target_modules=["q_proj"], target_parameters=parameters)


@pytest.mark.parametrize("parameters", [STACKS, STACKS[1:]])
def test_square_experts_that_are_stored_one_by_one(tmp_path: Path, parameters: list[str]) -> None:
    model = llm("qwen3_moe", moe_intermediate_size=32)
    require_as_peft(model, tmp_path, target_modules=["q_proj"], target_parameters=parameters)


def test_parameters_have_the_alpha_and_the_rank_of_their_own_names(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"down_proj": 3, "experts": 5}, "alpha_pattern": {"experts.gate_up_proj": 9, "experts": 7}}
    require_as_peft(llm("qwen3_moe"), tmp_path, target_modules=["q_proj"], target_parameters=STACKS, **patterns)


def square_stack(folder: Path, version: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes a base with one square stack and an adapter for it; returns B_e A_e of every expert, and the base's stack."""
    torch.manual_seed(0)
    down, up, base = torch.randn(3, 2, 8), torch.randn(8, 2, 3), torch.randn(3, 8, 8)
    folder.mkdir(exist_ok=True)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({name: base, "model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}, folder / "base.safetensors")
    stem = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{stem}.lora_A.weight": down.reshape(6, 8), f"{stem}.lora_B.weight": up.reshape(8, 6)}
    (folder / "adapter").mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.down_proj"]}
    said = config | ({"peft_version": version} if version else {})
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    return torch.einsum("ore,eri->eoi", up, down), base


def with_class(folder: Path, model_type: str, name: str) -> Path:
    """The base as a folder with the config of a class."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "model.safetensors").write_bytes((folder / "base.safetensors").read_bytes())
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [name]}))
    return folder / "base"


@pytest.mark.parametrize(
    ("version", "model_type", "name", "turned"),
    [
        ("0.18.1", "qwen3_moe", "Qwen3MoeForCausalLM", True),
        ("0.18.1", "gpt_oss", "GptOssForCausalLM", True),
        ("0.19.0", "qwen3_moe", "Qwen3MoeForCausalLM", True),
        ("0.19.0", "gpt_oss", "GptOssForCausalLM", False),
        ("0.19.1", "qwen3_moe", "Qwen3MoeForCausalLM", False),
        ("0.21.2", "gpt_oss", "GptOssForCausalLM", True),
        ("0.22.0.dev0", "llama4_text", "Llama4ForCausalLM", False),
    ],
)
def test_the_version_and_the_class_decide_where_both_ways_fit(
    tmp_path: Path, version: str, model_type: str, name: str, turned: bool
) -> None:
    """By the code of each version of PEFT (tuners/lora/layer.py, ParamWrapper)."""
    added, base = square_stack(tmp_path, version)

    merge(with_class(tmp_path, model_type, name), [tmp_path / "adapter"], tmp_path / "out")

    got = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.experts.down_proj"]
    torch.testing.assert_close(got, base + (added.mT if turned else added), rtol=1e-5, atol=1e-5)


def test_a_square_stack_of_an_unknown_version_is_asked_about(tmp_path: Path) -> None:
    square_stack(tmp_path, None)

    with pytest.raises(AmbiguousFile, match="peft_version"):
        merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors")

    square_stack(tmp_path, "0.21.2")
    with pytest.raises(AmbiguousFile, match=r"config\.json"):
        merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_another_number_of_experts_is_another_model(tmp_path: Path) -> None:
    llm("qwen3_moe", num_experts=8).save_pretrained(tmp_path / "apart")
    save_file(llm("qwen3_moe", num_experts=8).state_dict(), tmp_path / "stacked.safetensors")
    peft_adapter(llm("qwen3_moe"), tmp_path / "adapter", r=2, target_modules=["q_proj"], target_parameters=STACKS)

    for base in (tmp_path / "apart", tmp_path / "stacked.safetensors"):
        with pytest.raises(ShapeMismatch, match=r"4 experts.* 8"):
            merge(base, [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize("leaves", [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("turned", [False, True])
def test_changes_of_single_experts_go_into_their_slices(tmp_path: Path, leaves: tuple[str, ...], turned: bool) -> None:
    """PEFT before transformers 5 has a LoRA for each expert, which many bases stack by now."""
    torch.manual_seed(0)
    shapes = ((24, 32), (24, 32), (32, 24))
    stem, tensors, added = "model.layers.0.mlp.experts", {}, {}
    for leaf, (out, width) in zip(leaves, shapes, strict=True):
        for expert in range(3):
            down, up = torch.randn(2, width), torch.randn(out, 2)
            tensors[f"base_model.model.{stem}.{expert}.{leaf}.lora_A.weight"] = down
            tensors[f"base_model.model.{stem}.{expert}.{leaf}.lora_B.weight"] = up
            added.setdefault(leaf, []).append(2 * up @ down)
    gate, up, down = (torch.stack(added[leaf]) for leaf in leaves)
    change = {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}
    base = {f"{stem}.{name}": torch.randn_like(delta.mT if turned else delta) for name, delta in change.items()}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    (tmp_path / "base").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in base.items()}, tmp_path / "base" / "model.safetensors")
    kind = "llama4_text" if turned else "qwen3_5_moe"
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": kind}))

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, delta in change.items():
        expected = base[f"{stem}.{name}"] + (delta.mT if turned else delta)
        torch.testing.assert_close(got[f"{stem}.{name}"], expected, rtol=1e-5, atol=1e-5)


def test_classes_of_stacks_are_those_of_transformers() -> None:
    """Llama 4 holds its stacks with inputs first, and says nothing of it to PEFT."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts

    experts = Llama4TextExperts(Llama4TextConfig(hidden_size=8, intermediate_size=4, num_local_experts=2))
    assert experts.gate_up_proj.shape == (2, 8, 8)
    assert experts.down_proj.shape == (2, 4, 8)
    assert not getattr(experts, "is_transposed", False)
    assert "^experts.down_proj" in class_facts("GptOssForCausalLM")["stacks"]


def test_names_that_leave_the_parameter_open_are_asked_about(tmp_path: Path) -> None:
    square_stack(tmp_path, "0.21.2")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(LoratoolError, match="name the trained ones alone"):
        merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors")


@pytest.mark.parametrize("module", ["model.layers.0.mlp.experts.w1", "model.unembed_tokens"])
def test_tinkers_layout_is_named_with_its_converter(tmp_path: Path, module: str) -> None:
    """tinker-cookbook: experts' factors in three dimensions, of which one may be shared by all experts."""
    stem = f"base_model.model.{module}"
    (tmp_path / "adapter").mkdir()
    tensors = {f"{stem}.lora_A.weight": torch.ones(1, 4, 8), f"{stem}.lora_B.weight": torch.ones(4, 6, 4)}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 32}))
    llm("qwen3_moe").save_pretrained(tmp_path / "base")

    with pytest.raises(LoratoolError, match="build_lora_adapter"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


def test_attention_beside_packed_experts_is_merged(tmp_path: Path) -> None:
    """gpt-oss as it was released: its experts in MXFP4, all else in 16 bits."""
    from loratool import inspect

    model = gpt_oss().bfloat16()
    model.save_pretrained(tmp_path / "plain")
    peft_adapter(copy.deepcopy(model), tmp_path / "adapter", r=2, lora_alpha=6, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    packed = {
        f"{name}_blocks": torch.ones(4, 8, dtype=torch.uint8) for name in tensors if name.endswith("experts.down_proj")
    }
    rest = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in packed}
    (tmp_path / "base").mkdir()
    save_file(rest | packed, tmp_path / "base" / "model.safetensors")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merge(tmp_path / "plain", [tmp_path / "adapter"], tmp_path / "right")

    got, right = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "right")
    assert all(torch.equal(got[name], packed[name] if name in packed else right[name]) for name in got)
    assert any("mxfp4" in line for line in inspect(tmp_path / "base").suspicions)
