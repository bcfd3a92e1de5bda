"""What is known of transformers' classes, held against the transformers that is installed."""

from __future__ import annotations

import json

import pytest
import transformers

from docs.models import FILE, class_row, conversions, model_classes
from loratool.archs.classes import class_facts, conversion_rows, is_stack_transposed, model_parts

READ = json.loads(FILE.read_text())
same_version = pytest.mark.skipif(
    transformers.__version__ != READ["transformers"], reason="the facts are those of another version of transformers"
)


@same_version
def test_conversions_are_those_of_transformers() -> None:
    assert json.loads(json.dumps(conversions())) == READ["conversions"]


@same_version
@pytest.mark.slow
def test_every_class_is_known() -> None:
    for model in model_classes():
        row, known = class_row(model, None, {}), class_facts(model.__name__)
        assert {key: known.get(key) for key in ("type", "prefix")} == {key: row.get(key) for key in ("type", "prefix")}


def test_every_part_is_a_known_class() -> None:
    for name, row in READ["classes"].items():
        for part, *_ in row.get("parts", {}).values():
            assert part in READ["classes"], f"{part} in {name}"


def test_parts_follow_the_config() -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "mixtral"}}
    parts = {part.path: part.name for part in model_parts(config)}
    assert parts == {
        "": "LlavaForConditionalGeneration",
        "model": "LlavaModel",
        "model.vision_tower": "CLIPVisionModel",
        "model.language_model": "MixtralModel",
    }


def test_an_unknown_class_has_no_parts() -> None:
    assert model_parts({"architectures": ["NoSuchModel"], "model_type": "none"}) == ()
    assert model_parts({"architectures": [3], "model_type": ["llama"]}) == ()
    assert conversion_rows("NoSuchModel") is None


@pytest.mark.parametrize(("name", "transposed"), [("GptOssForCausalLM", True), ("Qwen3MoeForCausalLM", False)])
def test_stacks_of_experts(name: str, transposed: bool) -> None:
    config = {"architectures": [name]}
    assert is_stack_transposed(config, "model.layers.0.mlp.experts.gate_up_proj") is transposed
    assert is_stack_transposed(config, "model.layers.0.self_attn.q_proj") is None
