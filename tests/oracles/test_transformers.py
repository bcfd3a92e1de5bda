"""transformers as the oracle: what it loads from a merged folder is the base's parameters plus what PEFT's layers add.

`benchmarks.classes` does the same for every class; here stands one of each kind.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from benchmarks.classes import build, try_class
from loratool import Rule, check, extract

pytestmark = [pytest.mark.filterwarnings("ignore")]

KINDS = {
    "prefixes exchanged, a tied head on disk": "InternVLForConditionalGeneration",
    "several prefixes at once": "Qwen2VLForConditionalGeneration",
    "layers of an encoder renamed": "DeiTForImageClassification",
    "numbers that change places": "SegformerForImageClassification",
    "a head of another name": "GPTNeoXForCausalLM",
    "stacks cut, rows of heads permuted": "Kimi_K25ForConditionalGeneration",
    "a tied head and its bias": "BertForMaskedLM",
    "an embedding of another name": "BloomForCausalLM",
    "four weights that are one": "BartForConditionalGeneration",
    "weights that no config unties": "T5ForConditionalGeneration",
    "a config inside the config": "Qwen3VLForConditionalGeneration",
    "another entry of the config": "Lfm2ForCausalLM",
    "Conv1D in cross attention": "GPT2LMHeadModel",
    "Conv1D without a stack of q, k and v": "ClvpForCausalLM",
}


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_merges_what_the_adapter_was_trained_to_add(tmp_path: Path, name: str) -> None:
    found = try_class(name, tmp_path)
    assert found["result"] == "same", found


@pytest.mark.parametrize(
    "name",
    ["LlavaForConditionalGeneration", "ViTForImageClassification", "GPTNeoXForCausalLM", "Kimi_K25ForConditionalGeneration"],
)
def test_extract_names_modules_as_peft_finds_them(tmp_path: Path, name: str) -> None:
    model_class = getattr(transformers, name)
    build(model_class).save_pretrained(tmp_path / "base")
    base, tuned = (model_class.from_pretrained(tmp_path / "base") for _ in range(2))
    torch.manual_seed(5)
    with torch.no_grad():
        for part in tuned.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight += 0.1 * torch.randn(part.out_features, 2) @ torch.randn(2, part.in_features)
    tuned.save_pretrained(tmp_path / "tuned")

    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rule=Rule("rank", 2))
    wrapped = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").get_base_model()
    layers = {path: layer for path, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)}
    found = {path: layer.get_delta_weight("default") for path, layer in layers.items()}
    theirs = dict(tuned.named_parameters(remove_duplicate=False))
    for path, weight in base.named_parameters(remove_duplicate=False):
        change = theirs[path] - weight
        if change.any():
            torch.testing.assert_close(found[path.removesuffix(".weight")], change, rtol=0, atol=1e-5)
    assert check(tmp_path / "adapter", "peft", base=tmp_path / "base").good
