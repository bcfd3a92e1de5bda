"""diffusers as the oracle: `load_lora_weights` and `fuse_lora` of the same file, in every spelling it reads and writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratool import WeightedAdapter, merge
from tests.models import SDXL_UNET, Tensors, clip, kohya, linear_shapes, save, unet

pytestmark = [pytest.mark.filterwarnings("ignore")]

ATTENTION = ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0")


def pipeline():
    """A tiny Stable Diffusion XL pipeline, without tokenizers and VAE, which fusing does not need."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=clip(projection=True),
        text_encoder_2=clip(width=24, projection=True, seed=5),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet(SDXL_UNET),
        scheduler=EulerDiscreteScheduler(),
    )


def kohya_file(pipe) -> Tensors:
    shapes = linear_shapes(pipe.unet.state_dict(), "lora_unet_") | linear_shapes(pipe.text_encoder.state_dict(), "lora_te1_")
    wanted = {stem: shape for stem, shape in shapes.items() if "attn" in stem or "mlp" in stem}
    return kohya(wanted, rank=3, alpha=2.0)


def diffusers_file(pipe, down: str, up: str) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    tensors: Tensors = {}
    for name, weight in pipe.unet.state_dict().items():
        module = name.removesuffix(".weight")
        if module.endswith(ATTENTION):
            tensors[f"unet.{module}.{down}"] = 0.2 * torch.randn(2, weight.shape[1], generator=generator)
            tensors[f"unet.{module}.{up}"] = 0.2 * torch.randn(weight.shape[0], 2, generator=generator)
    return tensors


FILES = {
    "kohya": kohya_file,
    "lora_A": lambda pipe: diffusers_file(pipe, "lora_A.weight", "lora_B.weight"),
    "lora.down": lambda pipe: diffusers_file(pipe, "lora.down.weight", "lora.up.weight"),
}


@pytest.mark.parametrize("spelling", FILES)
def test_merging_equals_load_lora_weights_and_fuse_lora(tmp_path: Path, spelling: str) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "base")
    save(tmp_path / "lora.safetensors", FILES[spelling](pipe))
    merge(tmp_path / "base", [WeightedAdapter(tmp_path / "lora.safetensors", 0.7)], tmp_path / "out")

    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()

    merged = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    expected = pipe.unet.state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
    merged = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    for name, tensor in pipe.text_encoder.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metadata", [True, False])
def test_what_diffusers_saves_is_read_with_its_alpha(tmp_path: Path, metadata: bool) -> None:
    """Its alpha is in the metadata, or lost: diffusers then loads with scale 1, and so do we."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "base")
    targets = ["to_q", "to_v", "to_out.0", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, rank_pattern={"conv1": 2}))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    extra = _collate_lora_metadata({"unet": pipe.unet}) if metadata else {}
    layers = get_peft_model_state_dict(pipe.unet)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers, **extra)
    merge(tmp_path / "base", [tmp_path / "lora"], tmp_path / "out")

    fresh = pipeline()
    fresh.load_lora_weights(tmp_path / "lora")
    fresh.fuse_lora()
    fresh.unload_lora_weights()

    merged = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in fresh.unet.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("old", ["processor", "linear_layer"])
def test_spellings_that_diffusers_no_longer_writes(tmp_path: Path, old: str) -> None:
    """diffusers up to 0.20 kept U-Net factors in attention processors, and text encoders' in linear layers."""
    weight = torch.zeros(4, 4)
    stem, leaf = {
        "processor": ("unet.mid_block.attn1", "processor.to_out_lora.{}.weight"),
        "linear_layer": ("text_encoder.text_model.layers.0.q_proj", "lora_linear_layer.{}.weight"),
    }[old]
    target = {"processor": "unet/mid_block.attn1.to_out.0", "linear_layer": "text_encoder/text_model.layers.0.q_proj"}[old]
    folder, _, name = target.partition("/")
    (tmp_path / "base" / folder).mkdir(parents=True)
    (tmp_path / "base" / "model_index.json").write_text("{}")
    save(tmp_path / "base" / folder / "model.safetensors", {f"{name}.weight": weight})
    down, up = torch.randn(2, 4), torch.randn(4, 2)
    save(tmp_path / "a.safetensors", {f"{stem}.{leaf.format('down')}": down, f"{stem}.{leaf.format('up')}": up})

    merge(tmp_path / "base", [tmp_path / "a.safetensors"], tmp_path / "out")

    torch.testing.assert_close(load_file(tmp_path / "out" / folder / "model.safetensors")[f"{name}.weight"], up @ down)
