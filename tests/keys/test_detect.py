"""What a file is for: never another model's name, and candidates where nothing decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratool import inspect, merge
from loratool.adapter.load import load
from loratool.archs import ARCHS
from loratool.errors import InvalidAdapter, Unsupported
from loratool.verbs.convert import convert
from loratool.verbs.inspect.inspect import AdapterReport
from tests.archs.architectures import shapes
from tests.models import save

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")


def lora(path: Path, modules: dict[str, tuple[int, ...]], prefix: str = "transformer.", **metadata: str) -> AdapterReport:
    """What `inspect` says of a LoRA of rank 1 on these modules, dotted, with the inputs of these weights."""
    tensors: dict[str, Tensor] = {}
    for name, shape in modules.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.ones(1, *shape[1:])
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.ones(shape[0], 1)
    report = inspect(save(path / "a.safetensors", tensors, **metadata))
    assert isinstance(report, AdapterReport)
    return report


def modules(arch: str, *endings: str) -> dict[str, tuple[int, ...]]:
    """Modules of the real model that end so, and the shapes of their weights."""
    found = {name.removesuffix(".weight"): shape for name, shape in shapes(arch).items() if name.endswith(".weight")}
    return {name: shape for name, shape in found.items() if len(shape) == 2 and name.endswith(endings)}


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.name not in ("vega",)], ids=lambda arch: arch.name)
def test_an_adapter_on_all_attention_and_feedforward_layers_is_recognised(arch, tmp_path: Path) -> None:
    """By names, by widths, or by having all that the model has; FLUX.1 and Chroma differ in more than these."""
    endings = ("to_q", "to_k", "to_out.0", "to_out", "norm1.linear", "norm_out.linear", "net.0.proj", "context_embedder")
    prefix = "unet." if arch.name.startswith(("sd1", "sd2", "sdxl", "ssd")) else "transformer."

    report = lora(tmp_path, modules(arch.name, *endings), prefix)

    if arch.name == "chroma":
        assert set(report.arch.candidates) == {"FLUX.1", "Chroma"}
        return
    assert report.arch.arch == arch.name, report.arch


def test_wans_sizes_are_told_apart_by_their_widths(tmp_path: Path) -> None:
    for arch in ("wan-1.3b", "wan-5b", "wan-14b"):
        found = {name: shape for name, shape in modules(arch, "attn1.to_q").items() if name.startswith("blocks.0.")}
        assert lora(tmp_path, found).arch.arch == arch


def test_what_several_models_have_alike_is_left_open_until_the_metadata_says(tmp_path: Path) -> None:
    some = {name: shape for name, shape in modules("flux1", *ATTENTION).items() if name.startswith("transformer_blocks.0.")}

    open_case = lora(tmp_path, some)
    said = lora(tmp_path, some, ss_base_model_version="flux1")

    assert open_case.arch.arch is None
    assert {"FLUX.1", "Chroma", "HunyuanVideo"} <= set(open_case.arch.candidates)
    assert said.arch.arch == "flux1"
    assert "ss_base_model_version" in said.arch.reason


def test_metadata_never_overrules_names_or_shapes(tmp_path: Path) -> None:
    found = modules("qwen-image", *ATTENTION, "img_mod.1")

    assert lora(tmp_path, found, ss_base_model_version="flux1").arch.arch == "qwen-image"


KEYS = {
    "nunchaku": ("transformer_blocks.0.mlp_context_fc1.lora_down", "4-bit"),
    "control-LoRA": ("lora_controlnet", "ControlNet"),
    "MLX": ("model.layers.0.self_attn.q_proj.lora_a", "MLX"),
    "Tinker": ("base_model.model.model.unembed_tokens.lora_A.weight", "Tinker"),
}


@pytest.mark.parametrize("name", KEYS)
def test_what_is_known_and_not_read_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    key, reason = KEYS[name]
    path = save(tmp_path / "a.safetensors", {key: torch.ones(2, 2), key.replace("down", "up"): torch.ones(2, 2)})

    with pytest.raises(Unsupported, match=reason):
        load(path)

    assert any(reason in line for line in inspect(path).suspicions)


def pair(stem: str, down: str = "lora_down.weight", up: str = "lora_up.weight") -> dict[str, Tensor]:
    return {f"{stem}.{down}": torch.ones(2, 8), f"{stem}.{up}": torch.ones(12, 2)}


WILD = {
    "dotted with kohya's leaves": pair("diffusion_model.double_blocks.17.img_attn.qkv"),
    "half flattened": pair("lora_unet_double_blocks_17.img_attn.qkv"),
    "two underscores": pair("lora_unet__double_blocks_17_img_attn_qkv"),
    "an underscore behind": pair("lora_unet_double_blocks_17_img_attn_qkv_"),
    "an adapter's name": pair("double_blocks.17.img_attn.qkv", "lora_A.style.weight", "lora_B.style.weight"),
    "behind PEFT's container": pair("transformer.double_blocks.17.img_attn.qkv", "lora_A.weight", "lora_B.weight"),
}


@pytest.mark.parametrize("name", WILD)
def test_spellings_from_the_wild_are_read_as_what_they_are(name: str, tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", WILD[name])

    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", arch="flux1")

    parts = {key.removeprefix("transformer.").partition(".lora")[0] for key in load_file(tmp_path / "b.safetensors")}
    assert parts == {f"transformer_blocks.17.{part}" for part in ATTENTION}


def test_ai_toolkits_lone_factors_are_whole_differences(tmp_path: Path) -> None:
    key = "diffusion_model.double_blocks.0.img_attn.proj"
    path = save(tmp_path / "a.safetensors", {f"{key}.lora_A.weight": torch.ones(6, 8)}, software='{"name": "ai-toolkit"}')

    (change,) = load(path).changes

    assert change.delta.kind == "full"
    report = inspect(path)
    assert isinstance(report, AdapterReport)
    assert report.trainer == "ai-toolkit"


def test_a_distilled_wan_keeps_its_biases_norms_and_modulation(tmp_path: Path) -> None:
    """As lightx2v publishes it: LoRA, and differences of whatever else changed (ComfyUI#8922)."""
    block = "diffusion_model.blocks.0"
    tensors = pair(f"{block}.cross_attn.k") | {
        f"{block}.cross_attn.k.diff_b": torch.ones(12),
        f"{block}.cross_attn.norm_k.diff": torch.ones(12),
        f"{block}.norm3.diff": torch.ones(8),
        f"{block}.norm3.diff_b": torch.ones(8),
        f"{block}.diff_m": torch.ones(1, 6, 8),
    }
    save(tmp_path / "a.safetensors", tensors)
    prefix = "model.diffusion_model.blocks.0"
    shapes = {"cross_attn.k.weight": (12, 8), "cross_attn.k.bias": (12,), "cross_attn.norm_k.weight": (12,),
              "norm3.weight": (8,), "norm3.bias": (8,), "modulation": (1, 6, 8)}  # fmt: skip
    save(tmp_path / "base.safetensors", {f"{prefix}.{name}": torch.zeros(shape) for name, shape in shapes.items()})

    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "onetrainer", arch="wan-14b")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "comfyui", arch="wan-14b")
    merge(tmp_path / "base.safetensors", [tmp_path / "c.safetensors"], tmp_path / "out.safetensors")

    assert f"{block}.diff_m" in load_file(tmp_path / "c.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert all(bool(tensor.all()) for tensor in merged.values())


def test_peft_names_without_a_config_are_read_where_they_are_no_language_models(tmp_path: Path) -> None:
    """fal's and ai-toolkit's files for FLUX and Krea; the scale of a language model's is anybody's guess."""
    flux = pair("base_model.model.double_blocks.0.img_attn.qkv", "lora_A.weight", "lora_B.weight")
    llama = pair("base_model.model.model.layers.0.self_attn.q_proj", "lora_A.weight", "lora_B.weight")

    convert(save(tmp_path / "a.safetensors", flux), tmp_path / "b.safetensors", "comfyui", arch="flux1")

    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in load_file(tmp_path / "b.safetensors")
    assert any("scale is taken to be 1" in note for note in load(tmp_path / "a.safetensors").warnings)
    with pytest.raises(InvalidAdapter, match=r"config\.json is missing"):
        load(save(tmp_path / "c.safetensors", llama))


def test_xlabs_single_blocks_change_the_first_rows_of_a_stack(tmp_path: Path) -> None:
    """linear1 of BFL is q, k, v and the MLP; XLabs trains the first three (ComfyUI comfy/lora.py)."""
    adapter = pair("single_blocks.0.processor.qkv_lora", "down.weight", "up.weight")
    base = {f"model.diffusion_model.{name}.weight": torch.zeros(28, 8) for name in ("single_blocks.0.linear1",)}
    base |= {f"model.diffusion_model.single_blocks.{i}.linear2.weight": torch.zeros(4, 8) for i in range(4)}
    save(tmp_path / "a.safetensors", adapter)
    save(tmp_path / "base.safetensors", base)

    merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")

    merged = load_file(tmp_path / "out.safetensors")["model.diffusion_model.single_blocks.0.linear1.weight"]
    assert torch.equal(merged[:12], torch.full((12, 8), 2.0))
    assert not merged[12:].any()


def test_a_flux_control_lora_is_merged_and_converted_whole(tmp_path: Path) -> None:
    """BFL's Canny and Depth: biases with LoRA, norms replaced, and an input layer of twice the width."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layers = {"img_in": (8, 4), "double_blocks.0.img_attn.proj": (6, 8)}
    base = {
        f"{name}.{leaf}": drawn(*shape[:count])
        for name, shape in layers.items()
        for leaf, count in (("weight", 2), ("bias", 1))
    }
    base["double_blocks.0.img_attn.norm.query_norm.scale"] = drawn(5)
    adapter = {}
    for name, (rows, width) in layers.items():
        wide = 2 * width if name == "img_in" else width
        adapter |= {
            f"{name}.lora_A.weight": drawn(2, wide),
            f"{name}.lora_B.weight": drawn(rows, 2),
            f"{name}.lora_B.bias": drawn(rows),
        }
    adapter["double_blocks.0.img_attn.norm.query_norm.scale"] = drawn(5)
    save(tmp_path / "base.safetensors", base)
    save(tmp_path / "a.safetensors", adapter)
    convert(tmp_path / "a.safetensors", tmp_path / "kohya.safetensors", "kohya", arch="flux1")
    convert(tmp_path / "kohya.safetensors", tmp_path / "comfy.safetensors", "comfyui", arch="flux1")

    for name in ("a", "kohya", "comfy"):
        merge(tmp_path / "base.safetensors", [tmp_path / f"{name}.safetensors"], tmp_path / f"{name}-out.safetensors")
        merged = load_file(tmp_path / f"{name}-out.safetensors")
        for layer in layers:
            product = adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
            padded = torch.nn.functional.pad(
                base[f"{layer}.weight"], (0, product.shape[1] - base[f"{layer}.weight"].shape[1])
            )
            torch.testing.assert_close(merged[f"{layer}.weight"], padded + product)
            torch.testing.assert_close(merged[f"{layer}.bias"], base[f"{layer}.bias"] + adapter[f"{layer}.lora_B.bias"])
        norm = "double_blocks.0.img_attn.norm.query_norm.scale"
        assert torch.equal(merged[norm], adapter[norm])
