"""HunyuanVideo and Hunyuan-Image 2.1: FLUX's two kinds of blocks behind a refiner of text tokens.

Three spellings: diffusers', the original's (which musubi and kohya train), and ComfyUI's, which calls layers as FLUX does.
Source: diffusers loaders/single_file_utils.py (convert_hunyuan_video_transformer_to_diffusers), ComfyUI comfy/lora.py,
sd-scripts networks/convert_hunyuan_image_lora_to_comfy.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from loratool.archs.flux import IMAGE, TEXT
from loratool.archs.links import Link, fuse, rename, swap
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import clip_l, language_model
from loratool.names import COMFYUI, ORIGINAL, TE2, UNET

DOUBLE = {
    "attn.to_out.0": "img_attn_proj",
    "attn.to_add_out": "txt_attn_proj",
    "attn.norm_q": "img_attn_q_norm",
    "attn.norm_k": "img_attn_k_norm",
    "attn.norm_added_q": "txt_attn_q_norm",
    "attn.norm_added_k": "txt_attn_k_norm",
    "norm1.linear": "img_mod.linear",
    "norm1_context.linear": "txt_mod.linear",
    "ff.net.0.proj": "img_mlp.fc1",
    "ff.net.2": "img_mlp.fc2",
    "ff_context.net.0.proj": "txt_mlp.fc1",
    "ff_context.net.2": "txt_mlp.fc2",
}
SINGLE = {
    "attn.norm_q": "q_norm",
    "attn.norm_k": "k_norm",
    "norm.linear": "modulation.linear",
    "proj_out": "linear2",
}
_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.to_out.0": "self_attn_proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm_out.linear": "adaLN_modulation.1",
}
COMFY_NAMES = {
    "img_attn_qkv": "img_attn.qkv",
    "txt_attn_qkv": "txt_attn.qkv",
    "img_attn_proj": "img_attn.proj",
    "txt_attn_proj": "txt_attn.proj",
    "img_attn_q_norm": "img_attn.norm.query_norm",
    "img_attn_k_norm": "img_attn.norm.key_norm",
    "txt_attn_q_norm": "txt_attn.norm.query_norm",
    "txt_attn_k_norm": "txt_attn.norm.key_norm",
    "q_norm": "norm.query_norm",
    "k_norm": "norm.key_norm",
    "img_mod.linear": "img_mod.lin",
    "txt_mod.linear": "txt_mod.lin",
    "modulation.linear": "modulation.lin",
    "img_mlp.fc1": "img_mlp.0",
    "img_mlp.fc2": "img_mlp.2",
    "txt_mlp.fc1": "txt_mlp.0",
    "txt_mlp.fc2": "txt_mlp.2",
    "self_attn_qkv": "self_attn.qkv",
    "self_attn_proj": "self_attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
TIME = {"timestep_embedder.linear_1": "mlp.0", "timestep_embedder.linear_2": "mlp.2"}


def text_in() -> Iterator[Link]:
    """The refiner of text tokens."""
    yield from rename("context_embedder.time_text_embed", "txt_in.t_embedder", TIME)
    yield from rename(
        "context_embedder.time_text_embed.text_embedder",
        "txt_in.c_embedder",
        {"linear_1": "linear_1", "linear_2": "linear_2"},
    )
    yield Link(("context_embedder.proj_in",), "txt_in.input_embedder")
    for i in range(2):
        ours, theirs = f"context_embedder.token_refiner.refiner_blocks.{i}", f"txt_in.individual_token_refiner.blocks.{i}"
        yield from rename(ours, theirs, _REFINER)
        yield fuse(ours, IMAGE, f"{theirs}.self_attn_qkv")


def blocks() -> Iterator[Link]:
    """20 double blocks, 40 single ones, and the layers at both ends that both models have."""
    yield from rename("", "", {"x_embedder.proj": "img_in.proj", "proj_out": "final_layer.linear"})
    yield swap("norm_out.linear", "final_layer.adaLN_modulation.1")
    yield from text_in()
    for i in range(20):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        yield from rename(ours, theirs, DOUBLE)
        yield fuse(ours, IMAGE, f"{theirs}.img_attn_qkv")
        yield fuse(ours, TEXT, f"{theirs}.txt_attn_qkv")
    for i in range(40):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield from rename(ours, theirs, SINGLE)
        yield fuse(ours, f"{IMAGE} proj_mlp", f"{theirs}.linear1", (1, 1, 1, 4))


def video() -> Iterator[Link]:
    """HunyuanVideo."""
    yield from blocks()
    yield from rename("time_text_embed", "time_in", TIME)
    yield from rename(
        "time_text_embed", "guidance_in", {"guidance_embedder.linear_1": "mlp.0", "guidance_embedder.linear_2": "mlp.2"}
    )
    yield from rename(
        "time_text_embed", "vector_in", {"text_embedder.linear_1": "in_layer", "text_embedder.linear_2": "out_layer"}
    )


def image() -> Iterator[Link]:
    """Hunyuan-Image 2.1."""
    yield from blocks()
    yield from rename("time_guidance_embed", "time_in", TIME)


COMFY_EMBEDDERS = {
    "time_in.mlp.0": "time_in.in_layer",
    "time_in.mlp.2": "time_in.out_layer",
    "guidance_in.mlp.0": "guidance_in.in_layer",
    "guidance_in.mlp.2": "guidance_in.out_layer",
    "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
    "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.out_layer",
    "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
    "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
}


def comfy(links: Iterator[Link]) -> Iterator[Link]:
    """ComfyUI's spelling of `links`: blocks' leaves as in FLUX, and embedders as it calls them."""
    # `whole` is a name of the original: what stands before "blocks.", a number, and the leaf that ComfyUI renames.
    for link in links:
        block, _, leaf = link.whole.partition("blocks.")
        number, _, name = leaf.partition(".")
        embedder = COMFY_EMBEDDERS.get(link.whole, link.whole)
        yield replace(link, whole=f"{block}blocks.{number}.{COMFY_NAMES.get(name, name)}" if leaf else embedder)


def _denoiser(rows: Callable[[], Iterator[Link]], width: int, **others: int) -> Component:
    inputs = {**dict.fromkeys(("attn.to_q", "proj_mlp", "ff.net.0.proj"), width), **others}
    return Component(UNET, {ORIGINAL: rows, COMFYUI: lambda: comfy(rows())}, inputs)


HUNYUAN_VIDEO = Arch(
    "hunyuan-video",
    "HunyuanVideo",
    (
        _denoiser(video, 3072, proj_in=4096),
        language_model("llama", 32, 4096),
        clip_l(TE2),
    ),
    ("hunyuan_video", "hunyuan-video", "hunyuanvideo", "hv"),
)
HUNYUAN_IMAGE = Arch(
    "hunyuan-image",
    "Hunyuan-Image 2.1",
    (
        _denoiser(image, 3584),
        language_model("qwen25_7b", 28, 3584),
    ),
    ("hunyuan_image", "hunyuan-image"),
)
