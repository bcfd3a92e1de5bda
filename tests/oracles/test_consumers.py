"""diffusers and PEFT as judges of what `convert` writes: every key is taken, and fusing gives what our merge gives.

diffusers 0.42.1 reads kohya's files for all models here but Stable Diffusion 3. Of FLUX it reads the blocks rightly; of the
layers at both ends it loses the alpha or the prefix (see the note in `test_diffusers.py`), so that they are left out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratool import WeightedAdapter, merge
from loratool.names import flat
from loratool.verbs.convert import convert
from tests.models import SD1_UNET, SDXL_UNET, Tensors, clip, llm, lora, peft_adapter, save, unet

pytestmark = [pytest.mark.filterwarnings("ignore")]


@dataclass(frozen=True)
class Case:
    """A tiny pipeline of an architecture, its denoiser's name there, and which of its modules are trained."""

    build: Callable[[], Any]
    denoiser: str
    trained: tuple[str, ...]


def scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def sd1() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    parts = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(
        **parts,
        unet=unet(SD1_UNET),
        text_encoder=clip(),
        scheduler=EulerDiscreteScheduler(),
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    parts = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
    encoders = {"text_encoder": clip(projection=True), "text_encoder_2": clip(width=24, projection=True, seed=5)}
    return StableDiffusionXLPipeline(**parts, **encoders, unet=unet(SDXL_UNET), scheduler=EulerDiscreteScheduler())


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=24, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=8, pooled_projection_dim=8, pos_embed_max_size=8, dual_attention_layers=(0, 1),
    )  # fmt: skip
    parts = dict.fromkeys(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler(), vae=None, **parts)


def flux(head: int = 12) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=head, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, in_channels=4, axes_dims_rope=(head // 3, head // 3, head // 3),
    )  # fmt: skip
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=transformer, scheduler=scheduler(), **parts)


def wan() -> Any:
    from diffusers import WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_layers=2, attention_head_dim=12, num_attention_heads=2, ffn_dim=16, freq_dim=8, text_dim=8, in_channels=4,
        out_channels=4,
    )  # fmt: skip
    return WanPipeline(transformer=transformer, scheduler=scheduler(), vae=None, text_encoder=None, tokenizer=None)


def qwen() -> Any:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8, in_channels=4, out_channels=4,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return QwenImagePipeline(transformer=transformer, scheduler=scheduler(), vae=None, text_encoder=None, tokenizer=None)


UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
BLOCKS = (*UNET, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
CASES: Mapping[str, Case] = {
    "sd1": Case(sd1, "unet", UNET),
    "sdxl": Case(sdxl, "unet", UNET),
    "sd3-medium": Case(sd3, "transformer", (*BLOCKS, "norm1.linear", "norm1_context.linear", "proj_out", "norm_out.linear")),
    "flux1": Case(flux, "transformer", (*BLOCKS, "norm1.linear", "norm.linear", "proj_mlp", "blocks.0.proj_out")),
    "wan-1.3b": Case(wan, "transformer", (*UNET, "ffn.net.0.proj", "ffn.net.2")),
    "qwen-image": Case(qwen, "transformer", (*BLOCKS, "img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "txt_mlp.net.2")),
}


def adapter_for(case: Case, pipe: Any) -> Tensors:
    """What a trainer of diffusers' names in kohya's leaves writes, with an alpha that is not the rank."""
    generator = torch.Generator().manual_seed(7)
    prefix = "lora_unet_" if case.denoiser == "unet" else "lora_transformer_"
    tensors: Tensors = {}
    for name, weight in getattr(pipe, case.denoiser).state_dict().items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(case.trained):
            stem = prefix + flat(module)
            tensors |= {f"{stem}.{leaf}": factor for leaf, factor in lora(tuple(weight.shape), 2, generator).items()}
            tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    return tensors | encoder_adapter(pipe, generator)


def encoder_adapter(pipe: Any, generator: torch.Generator) -> Tensors:
    """Its text encoders' part, under the names that all but transformers 5 have for CLIP."""
    tensors: Tensors = {}
    for number, encoder in enumerate((getattr(pipe, "text_encoder", None), getattr(pipe, "text_encoder_2", None)), 1):
        for name, weight in encoder.state_dict().items() if encoder else ():
            if re.search(r"(q_proj|out_proj|fc1)\.weight", name):
                path = name.removesuffix(".weight")
                path = path if path.startswith("text_model.") else f"text_model.{path}"
                stem = f"lora_te{number if hasattr(pipe, 'text_encoder_2') else ''}_{flat(path)}"
                tensors |= {f"{stem}.{leaf}": factor for leaf, factor in lora(tuple(weight.shape), 2, generator).items()}
                tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    return tensors


def trained_modules(tensors: Tensors) -> int:
    return sum(name.endswith(".alpha") for name in tensors)


FULL_WIDTH = Case(partial(flux, 1536), "transformer", CASES["flux1"].trained)
"""diffusers' conversion of kohya's FLUX files has the real width of 3072 written into it."""
JUDGED = [
    *(
        pytest.param(case, arch, to, id=f"{arch}-{to}")
        for arch, case in CASES.items()
        for to in ("diffusers", "kohya")
        if (arch, to) not in (("sd3-medium", "kohya"), ("flux1", "kohya"))
    ),
    pytest.param(FULL_WIDTH, "flux1", "kohya", id="flux1-kohya", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "arch", "spelling"), JUDGED)
def test_diffusers_loads_and_fuses_what_was_converted(case: Case, arch: str, spelling: str, tmp_path: Path) -> None:
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    pipe.save_pretrained(tmp_path / "base")
    tensors = adapter_for(case, pipe)
    save(tmp_path / "a.safetensors", tensors)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", spelling, arch=arch)

    pipe.load_lora_weights(tmp_path / "b.safetensors")
    encoders = [encoder for name in ("text_encoder", "text_encoder_2") if (encoder := getattr(pipe, name, None))]
    loaded = [tensor for model in (denoiser, *encoders) for name, tensor in model.state_dict().items() if ".lora_B." in name]
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    merge(tmp_path / "base", [WeightedAdapter(tmp_path / "b.safetensors")], tmp_path / "out")

    assert len(loaded) == trained_modules(tensors)
    assert all(bool(tensor.any()) for tensor in loaded)
    for folder in (case.denoiser, "text_encoder", "text_encoder_2"):
        if model := getattr(pipe, folder, None):
            is_alike(tmp_path / "out" / folder, model.state_dict())


def is_alike(folder: Path, expected: Tensors) -> None:
    """float32 sums of a product of rank 2."""
    merged: Tensors = {}
    for file in folder.glob("*.safetensors"):
        merged |= load_file(file)
    assert {name.removeprefix("text_model.") for name in merged} == {name.removeprefix("text_model.") for name in expected}
    for name, tensor in merged.items():
        found = expected[name] if name in expected else expected[name.removeprefix("text_model.")]
        torch.testing.assert_close(tensor, found, rtol=1e-5, atol=1e-6)


def test_peft_takes_a_language_models_adapter_that_was_converted(tmp_path: Path) -> None:
    """There and back through loralib's leaves, which hold neither the alpha nor a config; ranks differ by pattern."""
    from peft import PeftModel

    model = llm("llama")
    wrapped = peft_adapter(
        model, tmp_path / "a", r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"q_proj": 2}, use_rslora=True
    )
    expected = wrapped.merge_and_unload().state_dict()
    convert(tmp_path / "a", tmp_path / "b.safetensors", "loralib")
    convert(tmp_path / "b.safetensors", tmp_path / "c", "peft")
    convert(tmp_path / "a", tmp_path / "single.safetensors", "peft-file")
    convert(tmp_path / "single.safetensors", tmp_path / "d", "peft")

    for folder in ("c", "d"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            merged = PeftModel.from_pretrained(llm("llama"), tmp_path / folder).merge_and_unload().state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_peft_takes_biases_of_lora_that_went_through_another_format(tmp_path: Path) -> None:
    """lora_B.bias shares its module's scale; kohya's formats have a difference of the bias in its place."""
    from peft import PeftModel

    wrapped = peft_adapter(
        llm("qwen2"), tmp_path / "a", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], lora_bias=True
    )
    expected = wrapped.merge_and_unload().state_dict()
    convert(tmp_path / "a", tmp_path / "b.safetensors", "peft-file")
    convert(tmp_path / "b.safetensors", tmp_path / "c", "peft")

    merged = PeftModel.from_pretrained(llm("qwen2"), tmp_path / "c").merge_and_unload().state_dict()

    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projection", [False, True])
def test_peft_takes_a_text_encoders_adapter_that_was_kohyas(projection: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    encoder = clip(projection=projection)
    tensors = encoder_adapter(type("Pipe", (), {"text_encoder": encoder, "text_encoder_2": None})(), torch.Generator())
    save(tmp_path / "a.safetensors", tensors)
    # SD3 has both of its CLIPs with their projection, which is another class to transformers.
    convert(tmp_path / "a.safetensors", tmp_path / "b", "peft", arch="sd3-medium" if projection else "sdxl")
    encoder.save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", [WeightedAdapter(tmp_path / "b")], tmp_path / "out")

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        merged = PeftModel.from_pretrained(encoder, tmp_path / "b").merge_and_unload().state_dict()

    is_alike(tmp_path / "out", merged)
