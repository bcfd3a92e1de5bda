"""transformers as the oracle: what it loads from a merged folder is the base's parameters plus what PEFT's layers add.

`benchmarks.classes` does the same for every class; here stands one of each kind.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.classes import try_class

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
}


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_merges_what_the_adapter_was_trained_to_add(tmp_path: Path, name: str) -> None:
    found = try_class(name, tmp_path)
    assert found["result"] == "same", found
