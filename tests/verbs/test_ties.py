"""Weights that a model's class makes one: a change of one of them leaves the others as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratool import merge
from loratool.verbs.merge.merge import MergeReport
from tests.models import Tensors, save

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def base(path: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save(path / "model.safetensors", tensors)
    return path


def adapter(path: Path, *modules: str, **config: Any) -> Path:
    """An adapter that replaces the weights of `modules` by ones."""
    path.mkdir()
    saved = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "modules_to_save": list(modules), **config}
    (path / "adapter_config.json").write_text(json.dumps(saved))
    save(path / "adapter_model.safetensors", {f"base_model.model.{name}.weight": torch.ones(6, 4) for name in modules})
    return path


def merged(tmp_path: Path) -> tuple[Tensors, dict[str, Any], MergeReport]:
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    return load_file(tmp_path / "out/model.safetensors"), json.loads((tmp_path / "out/config.json").read_text()), report


@pytest.mark.parametrize("changed", [EMBEDDING, HEAD])
def test_what_is_stored_twice_with_the_same_numbers_is_tied_by_the_config(tmp_path: Path, changed: str) -> None:
    weight = torch.randn(6, 4)
    tensors = {f"{EMBEDDING}.weight": weight, f"{HEAD}.weight": weight.clone()}
    base(tmp_path / "base", {**LLAMA, "tie_word_embeddings": True}, tensors)
    adapter(tmp_path / "adapter", changed)

    out, config, _ = merged(tmp_path)
    other = HEAD if changed == EMBEDDING else EMBEDDING
    assert torch.equal(out[f"{changed}.weight"], torch.ones(6, 4))
    assert torch.equal(out[f"{other}.weight"], weight)
    assert config["tie_word_embeddings"] is False


def test_what_is_stored_twice_with_other_numbers_is_two_weights(tmp_path: Path) -> None:
    tensors = {f"{EMBEDDING}.weight": torch.randn(6, 4), f"{HEAD}.weight": torch.randn(6, 4)}
    base(tmp_path / "base", {**LLAMA, "tie_word_embeddings": True}, tensors)
    adapter(tmp_path / "adapter", HEAD)

    out, config, _ = merged(tmp_path)
    assert torch.equal(out[f"{EMBEDDING}.weight"], tensors[f"{EMBEDDING}.weight"])
    assert config["tie_word_embeddings"] is False


def test_an_adapter_of_tied_weights_leaves_them_tied(tmp_path: Path) -> None:
    base(tmp_path / "base", {**LLAMA, "tie_word_embeddings": True}, {f"{EMBEDDING}.weight": torch.randn(6, 4)})
    adapter(tmp_path / "adapter", EMBEDDING, HEAD, ensure_weight_tying=True)

    out, config, report = merged(tmp_path)
    assert set(out) == {f"{EMBEDDING}.weight"}
    assert torch.equal(out[f"{EMBEDDING}.weight"], torch.ones(6, 4))
    assert config["tie_word_embeddings"] is True
    assert report.matched == 2


def test_every_config_that_says_so_is_changed(tmp_path: Path) -> None:
    text = {"model_type": "qwen3_vl_text", "tie_word_embeddings": True, "vocab_size": 6}
    config = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "text_config": text}
    base(
        tmp_path / "base",
        {**config, "tie_word_embeddings": True},
        {"model.language_model.embed_tokens.weight": torch.ones(6, 4)},
    )
    adapter(tmp_path / "adapter", HEAD)

    _, config, _ = merged(tmp_path)
    assert config["tie_word_embeddings"] is False
    assert config["text_config"] == {**text, "tie_word_embeddings": False}


def test_a_weight_of_several_names_is_stored_under_all_of_them(tmp_path: Path) -> None:
    """Without a tie each of them is looked for, and would be random where it is missing."""
    shared = torch.randn(6, 4)
    base(tmp_path / "base", {"architectures": ["BartForConditionalGeneration"]}, {"model.shared.weight": shared})
    adapter(tmp_path / "adapter", HEAD)

    out, config, _ = merged(tmp_path)
    assert config["tie_word_embeddings"] is False
    assert torch.equal(out.pop("lm_head.weight"), torch.ones(6, 4))
    assert {name for name, tensor in out.items() if torch.equal(tensor, shared)} == {
        "model.shared.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    }


def test_a_class_of_its_own_is_read_by_the_usual_names(tmp_path: Path) -> None:
    base(tmp_path / "base", {"architectures": ["OurForCausalLM"]}, {f"{EMBEDDING}.weight": torch.randn(6, 4)})
    adapter(tmp_path / "adapter", HEAD)
    out, config, _ = merged(tmp_path)
    assert set(out) == {f"{EMBEDDING}.weight", f"{HEAD}.weight"}
    assert config["tie_word_embeddings"] is False
