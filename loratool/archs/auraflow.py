"""AuraFlow: pure renames, and an adaLN whose halves are exchanged.

Source: diffusers loaders/single_file_utils.py (convert_auraflow_transformer_checkpoint_to_diffusers).
"""

from __future__ import annotations

from collections.abc import Iterator

from loratool.archs.links import Link, rename, swap
from loratool.archs.table import Arch, Component
from loratool.archs.text_encoders import t5_xxl
from loratool.names import ORIGINAL, TE1, UNET

_TOP = {
    "context_embedder": "cond_seq_linear",
    "pos_embed.proj": "init_x_linear",
    "proj_out": "final_linear",
    "time_step_proj.linear_1": "t_embedder.mlp.0",
    "time_step_proj.linear_2": "t_embedder.mlp.2",
}
_FEEDFORWARD = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}


def auraflow() -> Iterator[Link]:
    """4 joint blocks, 32 single ones."""
    yield from rename("", "", _TOP)
    yield swap("norm_out.linear", "modF.1")
    for i in range(4):
        ours, theirs = f"joint_transformer_blocks.{i}", f"double_layers.{i}"
        yield from rename(f"{ours}.ff", f"{theirs}.mlpX", _FEEDFORWARD)
        yield from rename(f"{ours}.ff_context", f"{theirs}.mlpC", _FEEDFORWARD)
        yield from rename(ours, theirs, {"norm1.linear": "modX.1", "norm1_context.linear": "modC.1"})
        yield from rename(f"{ours}.attn", f"{theirs}.attn", {f"to_{x}": f"w2{x}" for x in "qkv"} | {"to_out.0": "w2o"})
        text = {f"add_{x}_proj": f"w1{x}" for x in "qkv"} | {"to_add_out": "w1o"}
        yield from rename(f"{ours}.attn", f"{theirs}.attn", text)
    for i in range(32):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_layers.{i}"
        yield from rename(f"{ours}.ff", f"{theirs}.mlp", _FEEDFORWARD)
        yield Link((f"{ours}.norm1.linear",), f"{theirs}.modCX.1")
        yield from rename(f"{ours}.attn", f"{theirs}.attn", {f"to_{x}": f"w1{x}" for x in "qkv"} | {"to_out.0": "w1o"})


AURAFLOW = Arch(
    "auraflow",
    "AuraFlow",
    (Component(UNET, {ORIGINAL: auraflow}, {"attn.to_q": 3072, "context_embedder": 2048}), t5_xxl(TE1, "te")),
    ("auraflow",),
)
