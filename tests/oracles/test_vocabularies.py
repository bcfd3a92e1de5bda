"""New tokens and new heads, however PEFT wrote them: the merged folder gives the logits of the trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model

from loratool import LoratoolError, check, inspect, merge
from loratool.errors import ShapeMismatch, UnmatchedModules, Unsupported
from tests.models import llm

pytestmark = [pytest.mark.filterwarnings("ignore")]

EMBEDDING, HEAD, NEW = "embed_tokens", "lm_head", [48, 49, 50, 51]
Q = ["q_proj"]


def vision_language(*, tied: bool) -> torch.nn.Module:
    """A tiny Qwen3-VL, whose config nests that of its language model."""
    import transformers as hf

    torch.manual_seed(2)
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 48,
    }
    text["tie_word_embeddings"] = tied
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text |= {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    return hf.Qwen3VLForConditionalGeneration(config).eval()


def train(model: torch.nn.Module, folder: Path, config: Any) -> torch.nn.Module:
    """Wraps a model as `config` says, gives what it trains random values, and saves the adapter."""
    wrapped = get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                shift = 0.1 * torch.randn_like(parameter)
                parameter.copy_(shift if "lora_" in name else parameter + shift)
    wrapped.eval().save_pretrained(folder)
    return wrapped


def logits(model: torch.nn.Module, tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(tokens - 12, tokens)[None]).logits


def grow(kind: str, folder: Path, size: int | None, config: Any, *, tied: bool) -> tuple[type, torch.Tensor]:
    """Saves a base and an adapter of it whose vocabulary was resized before training; the class, and the trained logits."""
    model = vision_language(tied=tied) if kind == "nested" else llm("llama", tie_word_embeddings=tied, pad_token_id=0)
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base").eval()
    if size:
        torch.manual_seed(9)
        model.resize_token_embeddings(size, mean_resizing=False)
    made = config if not isinstance(config, dict) else LoraConfig(r=4, lora_alpha=8, **config)
    wrapped = train(model, folder / "adapter", made)
    return type(wrapped.get_base_model()), logits(wrapped, size or 48)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "size", "config"),
    [
        ("flat", 52, {"target_modules": Q}),
        ("flat", 52, {"target_modules": Q, "modules_to_save": [EMBEDDING, HEAD]}),
        ("flat", 52, {"target_modules": Q, "modules_to_save": [EMBEDDING]}),
        ("flat", 44, {"target_modules": Q, "modules_to_save": [EMBEDDING, HEAD]}),
        ("flat", 52, {"target_modules": [*Q, EMBEDDING, HEAD]}),
        ("flat", 52, {"target_modules": Q, "trainable_token_indices": NEW}),
        ("flat", 52, {"target_modules": Q, "trainable_token_indices": {EMBEDDING: NEW, HEAD: NEW}}),
        ("flat", None, TrainableTokensConfig(target_modules=[EMBEDDING], token_indices=[3, 7, 11])),
        ("nested", 52, {"target_modules": Q, "modules_to_save": [EMBEDDING, HEAD]}),
        ("nested", 52, {"target_modules": [*Q, EMBEDDING, HEAD]}),
        ("flat", 52, {"target_modules": Q, "modules_to_save": [EMBEDDING, HEAD], "ensure_weight_tying": True}),
        ("nested", None, {"target_modules": Q, "trainable_token_indices": [3, 5]}),
    ],
)
def test_logits_are_those_of_the_trained_model(tmp_path: Path, kind: str, size: int | None, config: Any, tied: bool) -> None:
    model, wanted = grow(kind, tmp_path, size, config, tied=tied)

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    got = logits(model.from_pretrained(tmp_path / "out").eval(), size or 48)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", [EMBEDDING, HEAD])
def test_what_is_beneath_a_trained_weight_is_of_its_twin_too(tmp_path: Path, target: str) -> None:
    """PEFT saves the grown weight beneath the LoRA alone, which the other weight of a tied model has as well."""
    model, wanted = grow("flat", tmp_path, 52, {"target_modules": [*Q, target]}, tied=True)

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    torch.testing.assert_close(logits(model.from_pretrained(tmp_path / "out").eval(), 52), wanted, rtol=1e-4, atol=1e-4)


def test_new_rows_of_a_tied_vocabulary_may_come_alone(tmp_path: Path) -> None:
    """PEFT does not see that a nested vocabulary grew, and saves the trained rows: here all that are new."""
    model, wanted = grow("nested", tmp_path, 52, {"target_modules": Q, "trainable_token_indices": NEW}, tied=True)

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    torch.testing.assert_close(logits(model.from_pretrained(tmp_path / "out").eval(), 52), wanted, rtol=1e-4, atol=1e-4)


def test_rows_that_nobody_saved_are_missed(tmp_path: Path) -> None:
    grow("nested", tmp_path, 52, {"target_modules": Q, "trainable_token_indices": NEW}, tied=False)
    with pytest.raises(ShapeMismatch, match=r"lm_head\.weight keeps 48"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    grow("nested", tmp_path / "gap", 52, {"target_modules": Q, "trainable_token_indices": NEW[1:]}, tied=True)
    with pytest.raises(LoratoolError, match="save_embedding_layers=True"):
        merge(tmp_path / "gap" / "base", [tmp_path / "gap" / "adapter"], tmp_path / "out")


def classifier(base: torch.nn.Module, name: str, folder: Path, targets: list[str], **changes: Any) -> torch.Tensor:
    """Trains the class `name` on a saved base, with its head in modules_to_save; the trained logits."""
    import transformers as hf

    base.save_pretrained(folder / "base")
    torch.manual_seed(1)
    model = getattr(hf, name).from_pretrained(folder / "base", **changes).eval()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS")
    return logits(train(model, folder / "adapter", config), 48)


def bert(name: str) -> torch.nn.Module:
    import transformers as hf

    torch.manual_seed(2)
    config = hf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=48)
    return getattr(hf, name)(config).eval()


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_a_new_head_is_added_with_its_class(tmp_path: Path, labels: int) -> None:
    """Reward models and classifiers on a language model."""
    import transformers as hf

    name = "LlamaForSequenceClassification"
    wanted = classifier(llm("llama", pad_token_id=0), name, tmp_path, Q, num_labels=labels)

    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    unread = f"lm_head.weight stays in the output, and {name}, which it now is, does not read it"
    assert unread in report.warnings
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architectures"] == [name]
    assert len(said["id2label"]) == labels
    assert said["vocab_size"] == 48
    got = logits(getattr(hf, name).from_pretrained(tmp_path / "out").eval(), 48)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_head_of_other_labels_leaves_the_vocabulary(tmp_path: Path) -> None:
    import transformers as hf

    name = "BertForSequenceClassification"
    changes = {"num_labels": 5, "ignore_mismatched_sizes": True}
    wanted = classifier(bert(name), name, tmp_path, ["query"], **changes)

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["vocab_size"], len(said["id2label"])) == (48, 5)
    got = logits(hf.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval(), 48)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_head_that_needs_what_nobody_saved_is_refused(tmp_path: Path) -> None:
    """BERT's masked language model has no pooler, and PEFT does not save the random one of the classifier."""
    classifier(bert("BertForMaskedLM"), "BertForSequenceClassification", tmp_path, ["query"], num_labels=3)

    with pytest.raises(Unsupported, match=r"bert\.pooler\.dense"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_without_a_class_says_what_is_lost(tmp_path: Path) -> None:
    classifier(llm("llama", pad_token_id=0), "LlamaForSequenceClassification", tmp_path, Q, num_labels=1)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": None}))

    with pytest.raises(UnmatchedModules, match=r"loses base_model\.model\.score"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize(("tuner", "loads"), [("C3A", True), ("LN_TUNING", True), ("PROMPT_TUNING", True)])
def test_tuners_that_are_not_computed_are_named_and_loaded_by_peft(tmp_path: Path, tuner: str, loads: bool) -> None:
    import peft

    configs = {
        "C3A": lambda: peft.C3AConfig(target_modules=Q, block_size=8),
        "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    train(llm("llama"), tmp_path / "adapter", configs[tuner]())

    report: Any = inspect(tmp_path / "adapter")
    assert report.peft_type == tuner
    assert check(tmp_path / "adapter", "peft").good is loads
    if tuner != "LN_TUNING":
        assert check(tmp_path / "adapter", "vllm").verdict == "does not load"
        llm("llama").save_pretrained(tmp_path / "base")
        way = "merge_and_unload" if tuner == "C3A" else "cannot be merged"
        with pytest.raises(Unsupported, match=way):
            merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


def test_velora_is_a_lora_and_trained_norms_are_norms(tmp_path: Path) -> None:
    import peft
    from peft.tuners.lora.config import VeloraConfig

    from loratool import Checkpoint

    for name, config in (
        ("velora", LoraConfig(r=4, target_modules=Q, velora_config=VeloraConfig())),
        ("norms", peft.LNTuningConfig(target_modules=["input_layernorm"])),
    ):
        llm("llama").save_pretrained(tmp_path / name / "base")
        wrapped = train(llm("llama"), tmp_path / name / "adapter", config)
        wrapped.merge_and_unload().save_pretrained(tmp_path / name / "right")
        merge(tmp_path / name / "base", [tmp_path / name / "adapter"], tmp_path / name / "out")
        ours, theirs = Checkpoint(tmp_path / name / "out"), Checkpoint(tmp_path / name / "right")
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)


def test_lora_bias_is_loaded_by_peft(tmp_path: Path) -> None:
    train(llm("qwen2"), tmp_path / "adapter", LoraConfig(r=4, lora_bias=True, target_modules=Q))
    assert check(tmp_path / "adapter", "peft").good
