"""kohya adapters on SD1.5- and SDXL-shaped models: the same merge whatever the base's naming, and equal to float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratool import WeightedAdapter, merge
from loratool.archs.sd import SD1, SDXL
from loratool.archs.table import Arch
from tests.models import Tensors, kohya, linear_shapes, original_names, save, sd1_checkpoint, sdxl_checkpoint

FOLDERS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "te1": "model.safetensors",
    "te2": "model.safetensors",
}


def pipeline_folder(folder: Path, components: dict[str, Tensors]) -> Path:
    """A diffusers folder: each component in its own, and the file that says so."""
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    for name, tensors in components.items():
        (folder / FOLDERS[name]).mkdir()
        save(folder / FOLDERS[name] / WEIGHTS[name], tensors)
    return folder


def as_original(arch: Arch, components: dict[str, Tensors]) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for component, tensors in components.items()
        for name, tensor in original_names(arch, component, tensors).items()
    }


def adapters(single: Tensors, components: dict[str, Tensors], te1: str) -> dict[str, Tensors]:
    """The two spellings of a U-Net in the wild, with text encoders."""
    prefix = "model.diffusion_model."
    original = {name.removeprefix(prefix): tensor for name, tensor in single.items() if name.startswith(prefix)}
    encoders = linear_shapes(components["te1"], te1)
    if "te2" in components:
        encoders |= linear_shapes(components["te2"], "lora_te2_")
    return {
        "original": kohya(linear_shapes(original, "lora_unet_", conv=True) | encoders, rank=3, alpha=2.0),
        "diffusers": kohya(
            linear_shapes(components["unet"], "lora_unet_", conv=True) | encoders, rank=2, alpha=None, seed=9
        ),
    }


@pytest.mark.parametrize(("build", "arch", "te1"), [(sd1_checkpoint, SD1, "lora_te_"), (sdxl_checkpoint, SDXL, "lora_te1_")])
def test_both_namings_of_base_and_adapter_give_the_same_weights(tmp_path: Path, build, arch: Arch, te1: str) -> None:
    single, components = build()
    save(tmp_path / "base.safetensors", single)
    pipeline_folder(tmp_path / "base", components)
    made = adapters(single, components, te1)
    sources = [
        WeightedAdapter(save(tmp_path / f"{name}.safetensors", made[name]), w)
        for name, w in (("original", 0.8), ("diffusers", -0.3))
    ]

    one = merge(tmp_path / "base.safetensors", sources, tmp_path / "single.safetensors")
    other = merge(tmp_path / "base", sources, tmp_path / "folder")

    assert one.matched == other.matched
    merged = load_file(tmp_path / "single.safetensors")
    parts = {name: load_file(tmp_path / "folder" / FOLDERS[name] / WEIGHTS[name]) for name in components}
    for component, prefix in (("unet", "model.diffusion_model."), ("te2", "conditioner.embedders.1.model.")):
        if component in parts:
            for name, tensor in original_names(arch, component, parts[component]).items():
                torch.testing.assert_close(merged[prefix + name], tensor, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text() == "{}"


def test_every_module_gets_what_float64_says(tmp_path: Path) -> None:
    single, components = sdxl_checkpoint()
    pipeline_folder(tmp_path / "base", components)
    adapter = adapters(single, components, "lora_te1_")["diffusers"]
    save(tmp_path / "a.safetensors", adapter)

    merge(tmp_path / "base", [WeightedAdapter(tmp_path / "a.safetensors", 0.8)], tmp_path / "out")

    changed = 0
    for component, stem in (("unet", "lora_unet_"), ("te1", "lora_te1_"), ("te2", "lora_te2_")):
        merged = load_file(tmp_path / "out" / FOLDERS[component] / WEIGHTS[component])
        for name, before in components[component].items():
            key = stem + name.removesuffix(".weight").replace(".", "_")
            expected = before.double()
            if f"{key}.lora_up.weight" in adapter:
                up, down = (adapter[f"{key}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
                expected = expected + 0.8 * (up @ down).reshape(before.shape)
                changed += 1
            torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert changed == len([name for name in adapter if name.endswith("lora_up.weight")])


def test_the_fixtures_of_the_readme_merge_into_one_file(tmp_path: Path) -> None:
    from tests.conftest import FIXTURES

    sources = [WeightedAdapter(FIXTURES / "style.safetensors", 0.8), WeightedAdapter(FIXTURES / "detail.safetensors", -0.3)]
    report = merge(FIXTURES / "sdxl.safetensors", sources, tmp_path / "out.safetensors")

    assert report.unmatched == ()
    assert report.realised_strength == pytest.approx(1, abs=0.01)
