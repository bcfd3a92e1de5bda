"""What other programs leave behind: each gets its own true message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loratool import LoratoolError, inspect, load
from tests.models import Tensors, save

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
PLAIN: Tensors = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 8),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(8, 4),
}
HUSK = {next(iter(PLAIN)): torch.zeros(0)}
MEGATRON = "decoder.layers.0.self_attention.linear_qkv"
LEFT_BEHIND: dict[str, tuple[Tensors, str]] = {
    "no tensors": ({}, "zero_to_fp32"),
    "a husk among factors": ({**PLAIN, **HUSK}, "1 of 2 tensors are empty.*zero_to_fp32"),
    "a saved module's husk": ({**PLAIN, "base_model.model.lm_head.weight": torch.zeros(0)}, "1 of 3 tensors are empty"),
    "two adapters": (
        {key.replace(".weight", f".{name}.weight"): value for key, value in PLAIN.items() for name in ("default", "policy")},
        "holds 2 adapters, default, policy",
    ),
    "torchtune": ({"layers.0.attn.q_proj.lora_a.weight": torch.ones(4, 8)}, "torchtune"),
    "Megatron-Bridge": ({f"{MEGATRON}.adapter.linear_in.weight": torch.ones(4, 8)}, "export_adapter.py"),
    "Megatron-core": ({f"base_model.model.{MEGATRON}.lora_A.weight": torch.ones(4, 8)}, "swift export"),
}


def folder(path: Path, tensors: Tensors, file: str = "adapter_model.safetensors") -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(CONFIG))
    save(path / file, tensors)
    return path


@pytest.mark.parametrize(("tensors", "words"), LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_says_what_it_is_and_what_to_do(tmp_path: Path, tensors: Tensors, words: str) -> None:
    path = folder(tmp_path / "adapter", tensors)
    with pytest.raises(LoratoolError, match=words):
        load(path)
    (report,) = [inspect(path)]
    assert any(part in " ".join(report.suspicions) for part in words.split(".*"))


def test_mlx_keeps_its_scale_in_a_config_of_its_own(tmp_path: Path) -> None:
    path = folder(tmp_path / "mlx", {"model.layers.0.self_attn.q_proj.lora_a": torch.ones(8, 4)}, "adapters.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"scale": 20.0}}))
    with pytest.raises(LoratoolError, match=r"MLX.*mlx_lm\.fuse"):
        load(path)


def test_a_trainers_output_names_the_adapters_inside(tmp_path: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000"):
        folder(tmp_path / "run" / name, PLAIN)
    with pytest.raises(LoratoolError, match=r"holds checkpoint-500, checkpoint-1000; name one, such as .*checkpoint-1000"):
        load(tmp_path / "run")
    assert load(tmp_path / "run/checkpoint-500").changes
