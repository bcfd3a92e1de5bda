"""What wrappers of a model leave in the names of an adapter: it is taken off before anything is asked of the names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratool import Checkpoint, merge
from loratool.names import without_wrappers
from tests.models import llm, peft_adapter, save

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("_orig_mod.base_model.model.model.norm.weight", "base_model.model.model.norm.weight"),
        ("base_model.model._orig_mod.model.norm.weight", "base_model.model.model.norm.weight"),
        ("module.base_model.model.lm_head.weight", "base_model.model.lm_head.weight"),
        ("_fsdp_wrapped_module.module.base_model.model.a._fsdp_wrapped_module.b", "base_model.model.a.b"),
        ("layers.0._checkpoint_wrapped_module.mlp.up.lora_A.weight", "layers.0.mlp.up.lora_A.weight"),
        ("base_model.model.base_model.model.lm_head.weight", "base_model.model.lm_head.weight"),
        ("pretrained_model.base_model.model.lm_head.weight", "base_model.model.lm_head.weight"),
        ("lora_unet_blocks_0__orig_mod_attn_q.lora_down.weight", "lora_unet_blocks_0_attn_q.lora_down.weight"),
        # A model's own names, which only begin or end like a wrapper's.
        ("levit.stages.0.layers.1.module.queries.weight", "levit.stages.0.layers.1.module.queries.weight"),
        ("transformer.base_model.model.blocks.0.weight", "transformer.base_model.model.blocks.0.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_only_wrappers_are_taken_off(name: str, bare: str) -> None:
    assert without_wrappers(name) == bare
    assert without_wrappers(bare) == bare


def of_layers(wrapper: str) -> Callable[[str], str]:
    return lambda name: name.replace("layers.1.", f"layers.1.{wrapper}.")


WRAPPINGS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled by layer": of_layers("_orig_mod"),
    "FSDP": lambda name: "_fsdp_wrapped_module." + of_layers("_fsdp_wrapped_module")(name),
    "DDP": lambda name: f"module.{name}",
    "wrapped twice": lambda name: f"base_model.model.{name}",
    "a value head": lambda name: f"pretrained_model.{name}",
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_wrapped_adapter_merges_as_the_plain_one(tmp_path: Path, wrap: Callable[[str], str]) -> None:
    """Its saved head and its anchored patterns too."""
    model = llm("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    pattern = {"^model.layers.1.self_attn.q_proj": 64}
    peft_adapter(
        model,
        tmp_path / "plain",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        alpha_pattern=pattern,
    )
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    (wrapped / "adapter_config.json").write_bytes((tmp_path / "plain/adapter_config.json").read_bytes())
    tensors = load_file(tmp_path / "plain/adapter_model.safetensors")
    save(wrapped / "adapter_model.safetensors", {wrap(name): tensor for name, tensor in tensors.items()})

    for name in ("plain", "wrapped"):
        merge(tmp_path / "base", [tmp_path / name], tmp_path / f"{name}-out")
    want, got = Checkpoint(tmp_path / "plain-out"), Checkpoint(tmp_path / "wrapped-out")
    assert set(want) == set(got)
    assert all(torch.equal(got[name], want[name]) for name in want)
