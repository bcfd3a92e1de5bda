"""Bases in one naming and adapters in another: every architecture's table leads to the same weights, whichever it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratool import WeightedAdapter, merge
from loratool.archs import ARCHS, Arch
from loratool.files.layout import open_layout
from loratool.formats.table import format_named
from loratool.keys.places import WeightIndex, WeightRows
from loratool.names import Module
from tests.models import original_names, save
from tests.verbs.test_convert import UNIT, WIDTH, made_for, rows_of, some_links

Tensors = dict[str, Tensor]


def base_of(arch: Arch) -> Tensors:
    """Weights under diffusers' names, of the first and last block of each sort."""
    component = arch.component("unet")
    assert component is not None
    rows, generator = rows_of(component), torch.Generator().manual_seed(1)
    parts = [part for link in some_links(component, component.stored_naming) for part in link.parts]
    return {f"{part}.weight": torch.randn(rows.get(part, UNIT), WIDTH, generator=generator) for part in parts}


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "comfyui"])
def test_both_namings_of_the_base_and_of_the_adapter_give_the_same_weights(
    arch: Arch, spelling: str, tmp_path: Path
) -> None:
    ours = base_of(arch)
    save(tmp_path / "diffusers.safetensors", ours)
    prefix = "model.diffusion_model."
    theirs = {prefix + name: tensor for name, tensor in original_names(arch, "unet", ours).items()}
    save(tmp_path / "original.safetensors", theirs)
    adapter = save(tmp_path / "a.safetensors", made_for(arch, format_named(spelling)))

    for base in ("diffusers", "original"):
        report = merge(
            tmp_path / f"{base}.safetensors", [WeightedAdapter(adapter, 0.5)], tmp_path / f"merged-{base}.safetensors"
        )
        assert not report.unmatched

    merged = load_file(tmp_path / "merged-diffusers.safetensors")
    assert all(not torch.equal(merged[name], ours[name]) for name in ours)
    expected = original_names(arch, "unet", merged)
    for name, tensor in load_file(tmp_path / "merged-original.safetensors").items():
        torch.testing.assert_close(tensor, expected[name.removeprefix(prefix)], rtol=1e-5, atol=1e-6)


HEADS, GROUPS, HEAD = 4, 2, 3
"""Attention heads, those of keys and values, and the rows of one."""
ROWS = {"self_attn.q_proj": HEADS * HEAD, "self_attn.k_proj": GROUPS * HEAD, "self_attn.v_proj": GROUPS * HEAD,
        "mlp.gate_proj": 10, "mlp.up_proj": 10}  # fmt: skip
STACKS = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
          "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
LAYER = "model.layers.0."


def stacked(apart: Tensors) -> Tensors:
    """Weights of Llama's layers as Phi-3 and vLLM have them."""
    return {whole: torch.cat([apart[part] for part in parts]) for whole, parts in STACKS.items()}


@pytest.mark.parametrize("base_is_stacked", [True, False])
@pytest.mark.parametrize("adapter_is_stacked", [True, False])
def test_language_models_with_stacked_and_with_separate_layers(
    base_is_stacked: bool, adapter_is_stacked: bool, tmp_path: Path
) -> None:
    """The ratio of the stack is that of the heads in config.json."""
    generator = torch.Generator().manual_seed(0)
    apart = {name: torch.randn(rows, 8, generator=generator) for name, rows in ROWS.items()}
    base = stacked(apart) if base_is_stacked else apart
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
    (folder / "config.json").write_text(json.dumps(config))
    save(folder / "model.safetensors", {f"{LAYER}{name}.weight": tensor for name, tensor in base.items()})
    shapes = {name: tensor.shape for name, tensor in (stacked(apart) if adapter_is_stacked else apart).items()}
    factors = {
        name: (torch.randn(shape[0], 2, generator=generator), torch.randn(2, 8, generator=generator))
        for name, shape in shapes.items()
    }
    tensors = {f"base_model.model.{LAYER}{name}.lora_B.weight": up for name, (up, _) in factors.items()}
    tensors |= {f"base_model.model.{LAYER}{name}.lora_A.weight": down for name, (_, down) in factors.items()}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    save(tmp_path / "a" / "adapter_model.safetensors", tensors)

    merge(folder, [WeightedAdapter(tmp_path / "a")], tmp_path / "out")

    changes = {name: up @ down for name, (up, down) in factors.items()}
    whole = changes if adapter_is_stacked else stacked(changes)
    merged = {
        name.removeprefix(LAYER).removesuffix(".weight"): tensor
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    merged = merged if base_is_stacked else stacked(merged)
    for name, tensor in stacked(apart).items():
        torch.testing.assert_close(merged[name], tensor + whole[name])


def test_experts_apart_are_found_whole_beside_the_names_of_their_stacks(tmp_path: Path) -> None:
    """gate_up_proj is both tensors, one after the other; gate_proj and up_proj stay the whole of their own."""
    expert = "model.layers.0.mlp.experts.0"
    base = {f"{expert}.gate_proj.weight": torch.zeros(6, 4), f"{expert}.up_proj.weight": torch.zeros(6, 4)}
    targets = WeightIndex(open_layout(save(tmp_path / "base.safetensors", base)))

    places = {name: targets.find(Module("", f"{expert}.{name}", name)) for name in ("gate_proj", "up_proj", "gate_up_proj")}

    gate, up = (WeightRows(f"{expert}.{name}.weight", 0, 6) for name in ("gate_proj", "up_proj"))
    assert places == {"gate_proj": (gate,), "up_proj": (up,), "gate_up_proj": (gate, up)}
