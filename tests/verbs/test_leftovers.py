"""What is left over on one side of a merge is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool import Selection, merge
from tests.models import save

NAMES = ("self_attn.q_proj", "mlp.up_proj")


def base(path: Path, layers: int, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}))
    weights = {f"model.layers.{i}.{name}.weight": torch.randn(4, 4) for i in range(layers) for name in NAMES}
    save(path / "model.safetensors", weights)
    return path


def adapter(path: Path, layers: list[int], **config: Any) -> Path:
    path.mkdir()
    saved = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config}
    (path / "adapter_config.json").write_text(json.dumps(saved))
    stems = [f"base_model.model.model.layers.{i}.{name}" for i in layers for name in NAMES]
    factors = {
        f"{stem}.lora_{side}.weight": torch.ones(shape) for stem in stems for side, shape in (("A", (1, 4)), ("B", (4, 1)))
    }
    save(path / "adapter_model.safetensors", factors)
    return path


@pytest.mark.parametrize(
    ("layers", "config", "said"),
    [
        ([0, 1, 2], {}, True),
        ([0, 1, 2], {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": None}, True),
        ([0, 1, 2], {"target_modules": r"model\.layers\.\d{1,2}\..*proj"}, True),
        ([0, 1, 2], {"layers_to_transform": [0, 1, 2]}, False),
        ([0, 1, 2], {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]}, False),
        ([0, 1, 2], {"target_modules": r"model\.layers\.(0|1|2)\..*proj"}, False),
        ([0, 2], {}, False),
        ([1, 2, 3, 4], {}, False),
        ([0, 1, 2, 3, 4], {}, False),
    ],
)
def test_layers_behind_those_that_an_adapter_changes(
    tmp_path: Path, layers: list[int], config: dict[str, Any], said: bool
) -> None:
    report = merge(base(tmp_path / "base", 5), [adapter(tmp_path / "adapter", layers, **config)], tmp_path / "out")
    found = [note for note in report.warnings if "changes layers 0 to 2 of 5" in note]
    assert bool(found) is said


def test_layers_that_the_config_does_not_count_are_none(tmp_path: Path) -> None:
    # DeepSeek-V3 and GLM-4.5 store a layer more, which predicts further tokens, and load none of it.
    base(tmp_path / "base", 5, num_hidden_layers=4)
    report = merge(tmp_path / "base", [adapter(tmp_path / "adapter", [0, 1, 2, 3])], tmp_path / "out")
    assert not report.warnings


def test_nothing_is_said_of_modules_that_were_left_out_on_purpose(tmp_path: Path) -> None:
    base(tmp_path / "base", 5)
    chosen = Selection(exclude=("*layers.3*", "*layers.4*"))
    report = merge(tmp_path / "base", [adapter(tmp_path / "adapter", [0, 1, 2, 3, 4])], tmp_path / "out", selection=chosen)
    assert not report.warnings
