"""Text encoders: CLIP in the names of transformers and of OpenCLIP, T5, and language models in the place of one.

Adapters use the names of transformers everywhere; OpenCLIP's names are in checkpoints only.
Source: open_clip's transformer.py and diffusers loaders/single_file_utils.py (convert_open_clip_checkpoint).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

from loratool.archs.links import Link, fuse, rename, same
from loratool.archs.table import Component
from loratool.names import CHECKPOINT, COMFYUI, TE1, TE2, TRANSFORMERS_5, UNWRAPPED

_EMBEDDINGS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "positional_embedding",
    "final_layer_norm": "ln_final",
}
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"


def clip(layers: int) -> Iterator[Link]:
    """CLIP of `layers` layers, called alike everywhere."""
    # The same modules as OpenCLIP's, each part as a whole of its own name.
    for link in openclip(layers):
        for part in link.parts:
            yield Link((part,), part)


def unwrap(layers: int) -> Iterator[Link]:
    """CLIP of `layers` layers, without the `text_model.` of its names."""
    for link in clip(layers):
        yield Link(link.parts, link.whole.removeprefix("text_model."))


def openclip(layers: int) -> Iterator[Link]:
    """OpenCLIP of `layers` layers, whose q, k and v are one raw parameter, and whose projection is stored transposed."""
    yield from rename("text_model", "", _EMBEDDINGS)
    yield Link(("text_projection",), "text_projection", transposed=True)
    for i in range(layers):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        yield from rename(ours, theirs, LAYER)
        yield fuse(ours, _ATTENTION, f"{theirs}.attn.in_proj")


def t5(layers: int) -> Iterator[Link]:
    """The encoder of T5 v1.1 with `layers` blocks, called alike everywhere."""
    yield from same("", "shared encoder.final_layer_norm")
    # T5 shares the position bias of its first block with all others.
    yield from same("encoder.block.0.layer.0", "SelfAttention.relative_attention_bias")
    for i in range(layers):
        yield from same(
            f"encoder.block.{i}.layer.0", "layer_norm SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o"
        )
        yield from same(f"encoder.block.{i}.layer.1", "layer_norm DenseReluDense.wi_0 DenseReluDense.wi_1 DenseReluDense.wo")


def decoder(layers: int, ours: str, theirs: str) -> Iterator[Link]:
    """A language model of `layers` layers as a text encoder: its names begin with `ours` in diffusers' naming, and with
    `theirs` in the other."""
    attention = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj self_attn.q_norm self_attn.k_norm"
    rest = "mlp.gate_proj mlp.up_proj mlp.down_proj input_layernorm post_attention_layernorm"
    blocks = (f"layers.{i}.{name}" for i in range(layers) for name in f"{attention} {rest}".split())
    for name in ("embed_tokens", "norm", *blocks):
        yield Link((f"{ours}{name}",), f"{theirs}{name}")


@cache
def clip_l(name: str = TE1, kohya: str = "", *, projected: bool = False) -> Component:
    """OpenAI's CLIP ViT-L/14, of SD1, SDXL and FLUX.1, and `projected`, with its projection, of SD3."""
    rows = {CHECKPOINT: partial(clip, 12), UNWRAPPED if projected else TRANSFORMERS_5: partial(unwrap, 12)}
    return Component(name, rows, {"q_proj": 768, "fc1": 768}, 123_060_480, encoder="clip_l", kohya=kohya)


@cache
def open_clip(
    layers: int, width: int, parameters: int, name: str = TE2, encoder: str = "clip_g", folder: str = "", kohya: str = ""
) -> Component:
    """OpenCLIP ViT-bigG with its projection (SDXL, SD3), or ViT-H without (SD2)."""
    # transformers 5.6 renamed CLIPTextModel, which SD2 has, and left CLIPTextModelWithProjection as it was.
    plain = TRANSFORMERS_5 if encoder == "clip_h" else UNWRAPPED
    rows = {CHECKPOINT: partial(openclip, layers), plain: partial(unwrap, layers)}
    return Component(name, rows, {"q_proj": width, "fc1": width}, parameters, encoder=encoder, folder=folder, kohya=kohya)


@cache
def t5_xxl(name: str, kohya: str = "te3") -> Component:
    """T5 v1.1 XXL; kohya calls it te3 whatever stands before it (sd-scripts networks/lora_flux.py)."""
    return Component(name, {CHECKPOINT: partial(t5, 24)}, {"SelfAttention.q": 4096}, encoder="t5xxl", kohya=kohya)


@cache
def language_model(encoder: str, layers: int, width: int, *, with_head: bool = False) -> Component:
    """Qwen, Llama or Gemma as a text encoder. In diffusers' pipelines it is a bare model, or one `with_head`, whose names
    begin with `model.`; in ComfyUI the names of both do."""
    ours = "model." if with_head else ""
    rows = {CHECKPOINT: partial(decoder, layers, ours, "model."), UNWRAPPED: partial(decoder, layers, ours, "")}
    inputs = {"q_proj": width, "gate_proj": width}
    return Component(TE1, rows, inputs, encoder=encoder, kohya="te", same={COMFYUI: CHECKPOINT})
