"""Names in memory and names on disk, as transformers converts them."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from docs.models import build
from loratool.archs.memory import name_on_disk, tensors_in_memory

KINDS = {
    "prefixes exchanged": "LlavaForConditionalGeneration",
    "several prefixes at once": "Qwen2VLForConditionalGeneration",
    "an encoder's names": "ViTForImageClassification",
    "a part's own conversions": "VisionEncoderDecoderModel",
    "one name": "GPTNeoXForCausalLM",
    "names that follow each other": "Kimi_K25ForConditionalGeneration",
    "experts": "MixtralForCausalLM",
}


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_every_tensor_of_a_saved_model_is_found_in_memory(name: str) -> None:
    model = build(getattr(transformers, name))
    memory = {key for key, _ in model.named_parameters()}
    with torch.device("meta"):
        disk = set(revert_weight_conversion(model, dict(model.state_dict())))
    made = list(tensors_in_memory({**model.config.to_dict(), "architectures": [name]}, disk))

    consumed = {source for each in made for sources in each.sources for source in sources}
    found = {target for each in made for target in each.names} | (disk - consumed)
    assert made, "this class is here because it converts names"
    assert memory <= found
    assert consumed <= disk


@pytest.mark.parametrize(
    ("name", "disk"),
    [
        ("LlavaForConditionalGeneration", "language_model.lm_head.weight"),
        ("Qwen2VLForConditionalGeneration", "lm_head.weight"),
        ("GPTNeoXForCausalLM", "embed_out.weight"),
        ("NoSuchModel", "lm_head.weight"),
    ],
)
def test_a_head_that_is_not_stored_has_a_name_on_disk(name: str, disk: str) -> None:
    assert name_on_disk({"architectures": [name]}, "lm_head.weight") == disk


def test_names_without_a_class_stay_as_they_are() -> None:
    assert not list(tensors_in_memory({"model_type": "none"}, ["encoder.layer.0.attention.attention.query.weight"]))
    assert not list(tensors_in_memory({}, ["model.layers.0.mlp.experts.0.w1.weight"]))
