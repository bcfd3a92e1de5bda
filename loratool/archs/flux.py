"""FLUX.1 and its kin: Chroma, which has no modulation, and FLUX.2, whose single blocks are stacked in both namings.

Source: diffusers loaders/single_file_utils.py (convert_flux_…, convert_chroma_…, convert_flux2_…) and BFL's flux/model.py.
In the adaLN of the last layer BFL has (shift, scale), diffusers (scale, shift).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loratool.archs.links import Link, apart, fuse, rename, swap
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import clip_l, language_model, t5_xxl
from loratool.names import OMI, ORIGINAL, TE1, TE2, UNET, XLABS

IMAGE = "attn.to_q attn.to_k attn.to_v"
TEXT = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_ATTENTION = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_FEEDFORWARD = {
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_MODULATION = {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"}
SINGLE_ATTENTION = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
_EMBEDDERS = {"context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear"}
LAST = "final_layer.adaLN_modulation.1"
TWO_LAYERS = {"linear_1": "in_layer", "linear_2": "out_layer"}


def double(i: int, table: dict[str, str]) -> Iterator[Link]:
    """Block `i` of the two streams, image and text."""
    ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
    yield from rename(ours, theirs, _ATTENTION | table)
    yield fuse(ours, IMAGE, f"{theirs}.img_attn.qkv")
    yield fuse(ours, TEXT, f"{theirs}.txt_attn.qkv")


def single(i: int, table: dict[str, str]) -> Iterator[Link]:
    """Block `i` of the joint stream: q, k, v and the four times wider MLP are one layer."""
    ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
    yield from rename(ours, theirs, SINGLE_ATTENTION | {"proj_out": "linear2"} | table)
    yield fuse(ours, f"{IMAGE} proj_mlp", f"{theirs}.linear1", (1, 1, 1, 4))


def flux() -> Iterator[Link]:
    """FLUX.1: 19 double blocks, 38 single ones."""
    yield from rename("", "", _EMBEDDERS)
    yield swap("norm_out.linear", LAST)
    for ours, theirs in {"timestep": "time_in", "guidance": "guidance_in", "text": "vector_in"}.items():
        yield from rename(f"time_text_embed.{ours}_embedder", theirs, TWO_LAYERS)
    for i in range(19):
        yield from double(i, _FEEDFORWARD | _MODULATION)
    for i in range(38):
        yield from single(i, {"norm.linear": "modulation.lin"})


def chroma() -> Iterator[Link]:
    """Chroma: FLUX.1 with a layer that distils all guidance in the place of modulation."""
    yield from rename("", "", _EMBEDDERS)
    guidance = "distilled_guidance_layer"
    yield from rename(guidance, guidance, {"in_proj": "in_proj", "out_proj": "out_proj"})
    for i in range(5):
        yield from rename(f"{guidance}.layers.{i}", f"{guidance}.layers.{i}", TWO_LAYERS)
        yield Link((f"{guidance}.norms.{i}",), f"{guidance}.norms.{i}")
    for i in range(19):
        yield from double(i, _FEEDFORWARD)
    for i in range(38):
        yield from single(i, {})


def flux2(doubles: int, singles: int) -> Iterator[Link]:
    """FLUX.2, of which there are several sizes."""
    yield from rename("", "", _EMBEDDERS)
    yield swap("norm_out.linear", LAST)
    for ours, theirs in {"timestep": "time_in", "guidance": "guidance_in"}.items():
        yield from rename(f"time_guidance_embed.{ours}_embedder", theirs, TWO_LAYERS)
    for stream in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        yield Link((f"{stream}.linear",), f"{stream}.lin")
    feedforward = {
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    }
    for i in range(doubles):
        yield from double(i, feedforward)
    # Single blocks are stacked in both namings, so that linear1 is renamed and not cut.
    for i in range(singles):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield from rename(ours, theirs, SINGLE_ATTENTION | {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"})


def xlabs() -> Iterator[Link]:
    """XLabs' attention processors: 1 is of the image, 2 of the text; a single block's qkv are the first rows of linear1.

    `formats/leaves.py` turns their processors' names into these.
    """
    for i in range(19):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}.processor"
        yield fuse(ours, IMAGE, f"{theirs}.qkv_lora1")
        yield fuse(ours, TEXT, f"{theirs}.qkv_lora2")
        yield from rename(ours, theirs, {"attn.to_out.0": "proj_lora1", "attn.to_add_out": "proj_lora2"})
    for i in range(38):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}.processor"
        # Of linear1's rows XLabs trains q, k and v alone; the link has no size for the rest, which stays as it is.
        yield fuse(ours, IMAGE, f"{theirs}.qkv_lora")
        yield from rename(ours, theirs, {"proj_out": "proj_lora"})


OMI_NAMES = {"img_in": "img_in.proj"}
"""Where OneTrainer's export is not called as the original is."""


def _flux2(width: int, doubles: int, singles: int, text: int) -> Component:
    inputs = {"to_q": width, "to_qkv_mlp_proj": width, "context_embedder": text, "ff.linear_in": width, "img_in": 128}
    return Component(UNET, {ORIGINAL: partial(flux2, doubles, singles)}, inputs)


HIDDEN = {"attn.to_q": 3072, "attn.add_q_proj": 3072, "proj_mlp": 3072, "ff.net.0.proj": 3072, "context_embedder": 4096}

FLUX1 = Arch(
    "flux1",
    "FLUX.1",
    (
        Component(
            UNET,
            {ORIGINAL: flux, XLABS: xlabs, OMI: lambda: apart(flux(), OMI_NAMES)},
            {**HIDDEN, "time_text_embed.text_embedder.linear_1": 768},
        ),
        clip_l(),
        t5_xxl(TE2),
    ),
    ("flux1", "flux-1", "flux.1", "flux_1", "flux"),
)
CHROMA = Arch(
    "chroma",
    "Chroma",
    (Component(UNET, {ORIGINAL: chroma, OMI: lambda: apart(chroma(), OMI_NAMES)}, HIDDEN), t5_xxl(TE1)),
    ("chroma",),
)
FLUX2 = Arch("flux2-dev", "FLUX.2 dev", (_flux2(6144, 8, 48, 15360),), ("flux2", "flux-2", "flux.2"))
FLUX2_KLEIN_9B = Arch(
    "flux2-klein-9b",
    "FLUX.2 klein 9B",
    (_flux2(4096, 8, 24, 12288), language_model("qwen3_8b", 36, 4096, with_head=True)),
    ("flux2_klein_9b", "flux-2-klein-9b"),
)
FLUX2_KLEIN_4B = Arch(
    "flux2-klein-4b",
    "FLUX.2 klein 4B",
    (_flux2(3072, 5, 20, 7680), language_model("qwen3_4b", 36, 2560, with_head=True)),
    ("flux2_klein_4b", "flux-2-klein-4b"),
)
