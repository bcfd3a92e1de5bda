"""Language models: what Hugging Face names look like, and where one model's experts have two names.

transformers 5 renamed the blocks of mixture-of-experts models in memory while files keep the old names, so that an
adapter says `mlp.gate` where the base on disk says `block_sparse_moe.gate`
(transformers conversion_mapping.py; PEFT utils/transformers_weight_conversion.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from loratool.archs.links import Link, fuse, rename

# Not behind `encoder.`, where the text encoders of diffusion models have layers of the same names.
_DECODER: Final = re.compile(
    r"(?!.*\bencoder\.)(?:.*\.)?(?:layers\.\d+\.(?:self_attn|mlp|block_sparse_moe|linear_attn)|h\.\d+\.(?:attn|mlp))\..*"
    r"|(?:.*\.)?(?:lm_head|embed_tokens|wte|score)"
)
EXPERT: Final = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
OF_EXPERT: Final = re.compile(r".*\.experts\.\d+(?=\.)")
INPUTS_FIRST: Final = frozenset({"llama4", "llama4_text"})
"""The model types whose classes hold stacked experts as (experts, in, out) in memory and do not say so to PEFT; those that
do are known to `archs.classes.is_stack_transposed`, and all others hold them as (experts, out, in)."""
HALVES_INTERLEAVED: Final = frozenset({"gpt_oss"})
"""The model types whose stacks of gate and up have their outputs by turns (`is_concatenated=False`)."""
CONV1D: Final = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""Modules that GPT-2 and its kin build from transformers' Conv1D, which stores the weight as (in, out)."""


def mixture_of_experts(names: frozenset[str]) -> Iterator[Link]:
    """The links from the names in a base with module paths `names` to the second names of its experts, if it has any.

    Mixtral's blocks under their names in transformers 5, and for each expert the stack of gate and up that
    transformers 5 holds in memory as one `gate_up_proj`.
    """
    for block in sorted(name.removesuffix(".gate") for name in names if name.endswith(".block_sparse_moe.gate")):
        yield Link((f"{block.replace('block_sparse_moe', 'mlp')}.gate",), f"{block}.gate")
    # Mixtral's w1 and w3 are gate and up, in this order in the stack; other models have their names already.
    for expert in sorted({found[0] for name in names if (found := OF_EXPERT.match(name))}):
        ours = expert.replace("block_sparse_moe", "mlp")
        if f"{expert}.w1" in names:
            yield from rename(ours, expert, EXPERT)
            yield Link((f"{expert}.w1", f"{expert}.w3"), f"{ours}.gate_up_proj", (1, 1))
        else:
            yield fuse(expert, "gate_proj up_proj", f"{expert}.gate_up_proj")


def fuse_rows(names: frozenset[str], heads: tuple[int, int]) -> Iterator[Link]:
    """The links of the stacks of q, k and v, and of gate and up, which some models have and others have apart, for a base
    with module paths `names`. `heads` are the numbers of heads of queries, and of keys and values; (0, 0) if unknown.

    Source: transformers models/phi3/modeling_phi3.py, vllm model_executor/models/llama.py (packed_modules_mapping).
    """
    of_queries, of_keys = heads
    for block in sorted({name.rpartition(".")[0] for name in names if name.endswith((".q_proj", ".qkv_proj"))}):
        # A stack is cut in the ratio of its heads, and cannot be cut without; parts that are stored can be joined anyway.
        if f"{block}.q_proj" in names or of_queries:
            yield fuse(block, "q_proj k_proj v_proj", f"{block}.qkv_proj", (of_queries, of_keys, of_keys))
    for block in sorted({name.rpartition(".")[0] for name in names if name.endswith((".gate_proj", ".gate_up_proj"))}):
        yield fuse(block, "gate_proj up_proj", f"{block}.gate_up_proj")


META: Final = {
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ROTARY: Final = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk"}
META_TOP: Final = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
META_LAYER: Final = re.compile(r"layers\.(\d+)\.attention\.wq")


def meta(names: frozenset[str]) -> Iterator[Link]:
    """The links to the Hugging Face names of a Llama that is stored under Meta's names, if `names` are such.

    The rows of wq and wk are permuted within each head (transformers models/llama/convert_llama_weights_to_hf.py).
    """
    layers = [found[1] for name in names if (found := META_LAYER.fullmatch(name))]
    if layers:
        yield from rename("", "", META_TOP)
    for i in layers:
        yield from rename(f"model.layers.{i}", f"layers.{i}", META)
        for ours, theirs in ROTARY.items():
            yield Link((f"model.layers.{i}.{ours}",), f"layers.{i}.{theirs}", rotary=True)


META_NAMES: Final = re.compile(
    r"(?:layers\.\d+\.(?:attention\.w[qkvo]|feed_forward\.w[123]|attention_norm|ffn_norm)|tok_embeddings|norm|output)"
)


def is_meta(paths: Iterable[str]) -> bool:
    """Whether module paths are those of Meta's Llama, with attention among them: others call feedforward layers so, too."""
    names = list(paths)
    return all(map(META_NAMES.fullmatch, names)) and any(".attention.w" in name for name in names)


def is_decoder(path: str) -> bool:
    """Whether a module path is that of a layer of a decoder-only language model, as Hugging Face names these."""
    return _DECODER.fullmatch(path) is not None


EMBEDDING: Final = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|wpe|tok_embeddings|token_embedding|position_embedding|word_embeddings|shared)"
)


def is_embedding(path: str) -> bool:
    """Whether a module path is that of an embedding in transformers' models."""
    return EMBEDDING.fullmatch(path) is not None
