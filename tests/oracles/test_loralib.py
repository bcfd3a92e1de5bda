"""microsoft/loralib's own layers as the oracle: what `eval()` merges, from what `lora_state_dict` saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loratool import LoratoolError, merge
from loratool.adapter.adapter import Assumptions
from tests.models import save

RANK, ALPHA = 3, 12

LAYERS = {
    "linear": lambda: loralib.Linear(6, 10, r=RANK, lora_alpha=ALPHA),
    "embedding": lambda: loralib.Embedding(20, 8, r=RANK, lora_alpha=ALPHA),
    "convolution": lambda: loralib.Conv2d(5, 4, 3, r=RANK, lora_alpha=ALPHA),
    "q and v": lambda: loralib.MergedLinear(6, 18, r=RANK, lora_alpha=ALPHA, enable_lora=[True, False, True]),
    "all of q, k, v": lambda: loralib.MergedLinear(6, 18, r=RANK, lora_alpha=ALPHA, enable_lora=[True, True, True]),
    "k and v": lambda: loralib.MergedLinear(6, 18, r=RANK, lora_alpha=ALPHA, enable_lora=[False, True, True]),
    "GPT-2's fused": lambda: loralib.MergedLinear(
        6, 18, r=RANK, lora_alpha=ALPHA, enable_lora=[True, False, True], fan_in_fan_out=True
    ),
}


def plain(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own weights under the names they had before loralib; its convolution wraps another one."""
    tensors = model.state_dict()
    return {key.replace(".conv.", "."): tensor for key, tensor in tensors.items() if "lora_" not in key}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_merges_as_loralib_merges_it(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    attention = nn.ModuleDict({"c_attn": LAYERS[name]()})
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"attn": attention})])})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_()
    adapter = loralib.lora_state_dict(model)
    base = {key: tensor.clone() for key, tensor in plain(model).items()}
    save(tmp_path / "base.safetensors", base)
    save(tmp_path / "a.safetensors", adapter)
    expected = plain(model.eval())
    enabled = tuple(getattr(attention["c_attn"], "enable_lora", ()))

    options: dict[str, Any] = {"assume": Assumptions(float(ALPHA), enabled)}
    merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors", **options)

    got = load_file(tmp_path / "out.safetensors")
    assert any(not torch.equal(expected[key], base[key]) for key in base)
    for key in base:
        torch.testing.assert_close(got[key], expected[key])


def test_what_the_file_does_not_say_is_assumed_aloud(tmp_path: Path) -> None:
    base = {"attn.weight": torch.zeros(18, 6)}
    adapter = {"attn.lora_A": torch.ones(RANK * 2, 6), "attn.lora_B": torch.ones(12, RANK)}
    save(tmp_path / "base.safetensors", base)
    save(tmp_path / "a.safetensors", adapter)

    report = merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")

    said = " ".join(report.warnings)
    assert "alpha" in said
    assert "taken as qv" in said
    got = load_file(tmp_path / "out.safetensors")["attn.weight"]
    assert torch.equal(got[:, 0], torch.tensor([3.0] * 6 + [0.0] * 6 + [3.0] * 6))


def test_slots_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    base = {"attn.weight": torch.zeros(18, 6)}
    adapter = {"attn.lora_A": torch.ones(RANK * 2, 6), "attn.lora_B": torch.ones(12, RANK)}

    save(tmp_path / "base.safetensors", base)
    save(tmp_path / "a.safetensors", adapter)

    options: dict[str, Any] = {"assume": Assumptions(slots=(True, True, True))}
    with pytest.raises(LoratoolError, match="slots="):
        merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors", **options)
