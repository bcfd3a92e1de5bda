"""PEFT on nn.MultiheadAttention, whose own forward pass is the oracle, and lora_bias on layers without a bias."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratool import merge
from loratool.errors import UnmatchedModules
from tests.models import llm, peft_adapter, save

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Block(torch.nn.Module):
    """An attention layer and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        self.fc = torch.nn.Linear(16, 12)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.fc(self.attn(inputs, inputs, inputs)[0])
        return hidden


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["attn", "fc"]}, {"target_modules": ["fc"], "target_parameters": ["attn.in_proj_weight"]}],
    ids=["module", "parameter"],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_attention_merges_to_what_its_forward_pass_computes(tmp_path: Path, config: dict[str, Any], rslora: bool) -> None:
    model = Block()
    save(tmp_path / "base.safetensors", model.state_dict())
    wrapped = peft_adapter(copy.deepcopy(model), tmp_path / "adapter", r=4, lora_alpha=8, use_rslora=rslora, **config).eval()

    merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors")
    merged = Block().eval()
    merged.load_state_dict(load_file(tmp_path / "out.safetensors"))
    inputs = torch.randn(2, 5, 16)
    torch.testing.assert_close(merged(inputs), wrapped(inputs), rtol=0, atol=1e-5)


def test_lora_bias_names_the_bias_that_the_base_lacks(tmp_path: Path) -> None:
    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", r=4, lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(UnmatchedModules, match=r"q_proj \(bias\): the base's layer has no bias, which lora_bias trained"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", allow_unmatched=True)
    assert all(name.endswith("q_proj (bias)") for name in report.unmatched)
