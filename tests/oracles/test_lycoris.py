"""LyCORIS as the oracle: every algorithm, linear and convolution, against what its own module merges.

Known oddities of LyCORIS, kept out of the comparison: `get_diff_weight` of LoHa and of a decomposed LoKr applies the
scale twice, so alpha is the rank here; DyLoRA merges at a random rank; at a strength other than 1 DoRA and rescaled OFT
interpolate otherwise than W + w · (W' − W), so strengths are compared for the additive kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loratool import WeightedAdapter, merge
from tests.models import save

pytestmark = [pytest.mark.filterwarnings("ignore")]

ADDITIVE: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "lora, tucker": {"algo": "lora", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, both factored": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 2, "linear_alpha": 2},
    "lokr, whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr, huge dim": {
        "algo": "lokr",
        "factor": 4,
        "linear_dim": 10000,
        "linear_alpha": 1,
        "conv_dim": 10000,
        "conv_alpha": 1,
    },
    "lokr, tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "full": {"algo": "full"},
    "norms": {"algo": "lora", "train_norm": True},
    "glora": {"algo": "glora"},
    "scalar": {"algo": "lora", "use_scalar": True},
}
OTHERS: dict[str, dict[str, Any]] = {
    "lora, dora on output": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "lora, dora on input": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha, dora": {"algo": "loha", "dora_wd": True, "wd_on_output": True},
    "lokr, dora": {"algo": "lokr", "factor": 4, "dora_wd": True, "wd_on_output": False},
    "diag-oft": {"algo": "diag-oft"},
    "diag-oft, constrained": {"algo": "diag-oft", "constraint": 0.01},
    "diag-oft, rescaled": {"algo": "diag-oft", "rescaled": True},
    "boft": {"algo": "boft"},
    "boft, rescaled": {"algo": "boft", "rescaled": True},
    "ia3": {"algo": "ia3"},
    "ia3, on input": {"algo": "ia3", "train_on_input": True},
}


class Model(nn.Module):
    """One of each layer that LyCORIS trains, in a block that its preset takes by name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 32)
        self.fused = nn.Linear(16, 64, bias=False)
        self.conv = nn.Conv2d(8, 16, 3)
        self.point = nn.Conv2d(8, 16, 1)
        self.norm = nn.LayerNorm(16)


def train(config: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Saves base and adapter, and returns what LyCORIS merges at strength 1."""
    from lycoris import LycorisNetwork, create_lycoris

    torch.manual_seed(0)
    model = Model()
    save(folder / "base.safetensors", model.state_dict())
    preset = {"target_module": ["Model"], "lora_prefix": "lora_unet", "enable_conv": True}
    LycorisNetwork.apply_preset(preset)
    dims = {"linear_dim": 4, "linear_alpha": 4, "conv_dim": 4, "conv_alpha": 4}
    network = create_lycoris(model, 1.0, **dims | config)
    network.apply_to()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            shift = 0.3 * torch.randn_like(parameter)
            parameter.copy_(parameter.abs() + shift.abs() if "dora_scale" in name else parameter + shift)
    save(folder / "a.safetensors", network.state_dict())
    network.restore()
    network.merge_to(1.0)
    return dict(model.state_dict())


@pytest.mark.parametrize("case", [*ADDITIVE, *OTHERS])
def test_merging_equals_what_lycoris_merges(tmp_path: Path, case: str) -> None:
    expected = train((ADDITIVE | OTHERS)[case], tmp_path)

    merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")

    merged, base = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "base.safetensors")
    assert any(not torch.equal(expected[name], base[name]) for name in base)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", [*ADDITIVE, "ia3", "diag-oft"])
def test_a_strength_is_that_share_of_the_change(tmp_path: Path, case: str) -> None:
    expected = train((ADDITIVE | OTHERS)[case], tmp_path)

    merge(tmp_path / "base.safetensors", [WeightedAdapter(tmp_path / "a.safetensors", -0.6)], tmp_path / "out.safetensors")

    merged, base = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "base.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], base[name] - 0.6 * (tensor - base[name]), rtol=1e-5, atol=2e-6)
