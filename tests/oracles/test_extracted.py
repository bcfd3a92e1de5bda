"""PEFT and diffusers as judges of what `extract` writes: loaded on the base, it is the tuned model to the stated error."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool import Rule, Selection, extract
from tests.models import clip, llm
from tests.oracles.test_consumers import sdxl

pytestmark = [pytest.mark.filterwarnings("ignore")]

TOKENS = torch.arange(12).reshape(2, 6)


def changed(model: torch.nn.Module, by: float = 0.05, only: str = "") -> torch.nn.Module:
    """The same model with all of its parameters, or those whose names contain `only`, changed at random."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def loaded(base: torch.nn.Module, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_peft_reproduces_the_logits_of_the_tuned_model(tmp_path: Path, kind: str) -> None:
    """At full rank: linear layers, embeddings, norms, biases and the head."""
    base = llm(kind)
    tuned = changed(base)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="30KB")

    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", Rule("rank", 999), dtype="float32")

    assert report.error < 1e-5
    with torch.no_grad():
        theirs, ours = tuned(TOKENS).logits, loaded(base, tmp_path / "lora")(TOKENS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    if kind != "gpt2":  # PEFT merges what it has for the embedding and for the tied head into the one weight that they are
        merged = loaded(base, tmp_path / "lora").merge_and_unload().state_dict()
        for name, tensor in tuned.state_dict().items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_peft_reproduces_a_text_encoder(tmp_path: Path, projection: bool) -> None:
    base = clip(projection=projection)
    tuned = changed(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")

    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", Rule("rank", 999), dtype="float32")

    with torch.no_grad():
        theirs, ours = tuned(TOKENS).last_hidden_state, loaded(base, tmp_path / "lora")(TOKENS).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_peft_gives_the_stated_error_at_a_low_rank(tmp_path: Path) -> None:
    base = llm("llama")
    tuned = changed(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")

    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", Rule("rank", 8))

    merged = loaded(base, tmp_path / "lora").merge_and_unload().state_dict()
    wrong = sum(float((merged[name] - tensor).double().square().sum()) for name, tensor in tuned.state_dict().items())
    assert report.error == pytest.approx(math.sqrt(wrong) / report.norm, rel=1e-3)


@pytest.mark.parametrize(("to", "rank"), [("diffusers", 999), ("diffusers", 5), ("kohya", 5)])
def test_diffusers_takes_what_was_extracted_from_an_sdxl(tmp_path: Path, to: str, rank: int) -> None:
    """Of kohya's files diffusers 0.42.1 takes one alpha for all modules, so that their ranks must be alike."""
    pipe = sdxl()
    pipe.save_pretrained(tmp_path / "base")
    tuned = {name: changed(getattr(pipe, name), only="attn") for name in ("unet", "text_encoder", "text_encoder_2")}
    pipe.register_modules(**tuned)
    pipe.save_pretrained(tmp_path / "tuned")
    # Biases are another thing: diffusers refuses kohya's files that have them.
    options: dict[str, Any] = {"to": to, "dtype": "float32", "selection": Selection(exclude=("*.bias", "*norm*"))}
    out = tmp_path / "lora.safetensors"

    report = extract(tmp_path / "base", tmp_path / "tuned", out, Rule("rank", rank), **options)
    fresh = sdxl()
    fresh.load_lora_weights(str(out))
    fresh.fuse_lora(components=list(tuned))
    fresh.unload_lora_weights()

    wrong = 0.0
    for name, model in tuned.items():
        found = getattr(fresh, name).state_dict()
        wrong += sum(
            float((found[key] - tensor).double().square().sum())
            for key, tensor in model.state_dict().items()
            if not key.endswith(".bias") and "norm" not in key
        )
    assert math.sqrt(wrong) / report.norm == pytest.approx(report.error, rel=1e-3, abs=1e-5)
