"""What programs make of adapters: by their own loaders where there are any, else by their source's formula."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratool import load
from loratool.formats.consumers import CONSUMERS
from loratool.verbs.check.check import COSTLY, DIFFERENT, NOTE, REFUSED, CheckReport, check
from loratool.verbs.check.fix import fix
from tests.conftest import FIXTURES, Run
from tests.models import kohya, save

LORA, STYLE, LLAMA = FIXTURES / "llama-lora", FIXTURES / "style.safetensors", FIXTURES / "llama"
Q, K = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.k_proj"


def folder(path: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir(parents=True)
    save(path / "adapter_model.safetensors", dict(tensors))
    document = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], **config}
    (path / "adapter_config.json").write_text(json.dumps(document))
    return path


def factors(stem: str, rank: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = 32 if stem == Q else 16
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, 32, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def meant(path: Path) -> dict[str, torch.Tensor]:
    return {change.module.path: change.delta.dense() for change in load(path).changes if change.parameter == "weight"}


def taken(path: Path, scale_of: Callable[[Mapping[str, Any], int], float]) -> dict[str, torch.Tensor]:
    """ΔW of a folder by a program's own formula of scales."""
    tensors, config = load_file(path / "adapter_model.safetensors"), json.loads((path / "adapter_config.json").read_text())
    found = {}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace("lora_A", "lora_B")]
            stem = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
            found[stem] = scale_of(config, len(down)) * up.float() @ down.float()
    return found


def vllms(config: Mapping[str, Any], rank: int) -> float:
    """vllm/lora/peft_helper.py."""
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def llamas(config: Mapping[str, Any], rank: int) -> float:
    """src/llama-adapter.h."""
    return config["lora_alpha"] / rank if config["lora_alpha"] else 1.0


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[key], other[key], rtol=1e-5, atol=1e-6) for key in one)


def levels(report: CheckReport) -> set[str]:
    return {finding.level for finding in report.findings}


SCALES = {
    "one rank": (dict(factors(Q, 4, 0) | factors(K, 4, 1)), {}),
    "unlike ranks": (dict(factors(Q, 4, 0) | factors(K, 2, 1)), {"rank_pattern": {"k_proj": 2}}),
    "unlike alphas": (dict(factors(Q, 4, 0) | factors(K, 4, 1)), {"alpha_pattern": {"k_proj": 1}}),
    "both": (dict(factors(Q, 4, 0) | factors(K, 2, 1)), {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
    "rsLoRA": (dict(factors(Q, 4, 0) | factors(K, 4, 1)), {"use_rslora": True}),
    "rsLoRA of unlike ranks": (
        dict(factors(Q, 4, 0) | factors(K, 2, 1)),
        {"use_rslora": True, "rank_pattern": {"k_proj": 2}},
    ),
}


@pytest.mark.parametrize("case", SCALES)
@pytest.mark.parametrize(("target", "formula"), [("vllm", vllms), ("llama.cpp", llamas)])
def test_a_strength_that_a_program_gets_wrong_is_found_and_fixed(
    tmp_path: Path, target: str, formula: Any, case: str
) -> None:
    """The finding is there just where the program's formula makes something else of the file, and not after the fix."""
    tensors, config = SCALES[case]
    path = folder(tmp_path / "a", tensors, **config)
    wanted = meant(path)
    assert (DIFFERENT in levels(check(path, target))) != same(taken(path, formula), wanted)
    report = fix(path, target, tmp_path / "fixed")
    assert same(meant(tmp_path / "fixed"), wanted)
    assert same(taken(tmp_path / "fixed", formula), wanted)
    assert check(tmp_path / "fixed", target).good
    assert report.error == 0


def test_vllm_allots_ranks_in_steps(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", factors(Q, 48, 0), r=48, lora_alpha=48)
    report = check(path, "vllm")
    assert levels(report) == {COSTLY, NOTE}
    assert "--max-lora-rank 64" in " ".join(finding.what for finding in report.findings)
    fix(path, "vllm", tmp_path / "fixed")
    assert {change.delta.rank for change in load(tmp_path / "fixed").changes} == {64}  # type: ignore[attr-defined]
    assert same(meant(tmp_path / "fixed"), meant(path))
    assert levels(check(tmp_path / "fixed", "vllm")) == {NOTE}
    assert REFUSED in levels(check(folder(tmp_path / "b", factors(Q, 513, 0), r=513), "vllm"))


def test_vllm_has_no_biases_no_saved_modules_and_no_dora(tmp_path: Path) -> None:
    bias = {f"{Q}.lora_B.bias": torch.ones(32)}
    path = folder(tmp_path / "bias", factors(Q, 4, 0) | bias, lora_bias=True)
    report = check(path, "vllm")
    (found,) = [finding for finding in report.findings if finding.level == REFUSED]
    assert "biases" in found.what
    assert found.lost == pytest.approx(2 * math.sqrt(32))
    fixed = fix(path, "vllm", tmp_path / "fixed")
    assert fixed.lost == found.lost
    assert not [name for name in load_file(tmp_path / "fixed" / "adapter_model.safetensors") if name.endswith("bias")]
    assert check(tmp_path / "fixed", "vllm").good
    head = {"base_model.model.lm_head.weight": torch.ones(8, 32)}
    saved = folder(tmp_path / "saved", factors(Q, 4, 0) | head, modules_to_save=["lm_head"])
    assert "modules_to_save" in check(saved, "vllm").findings[0].what
    dora = {f"{Q}.lora_magnitude_vector": torch.ones(32)}
    path = folder(tmp_path / "dora", factors(Q, 4, 0) | dora, use_dora=True)
    assert "DoRA" in check(path, "vllm").findings[0].what
    assert "base=BASE" in check(path, "vllm").findings[0].way


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_what_is_said_to_load() -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert check(LORA, "peft", base=LLAMA).good
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(LLAMA), str(LORA))
    assert check(STYLE, "peft").verdict == "does not load"


@pytest.mark.parametrize("target", ["diffusers", "comfyui", "a1111"])
def test_image_programs_take_kohyas_files_and_no_language_models(tmp_path: Path, target: str) -> None:
    path = FIXTURES / "style.safetensors"
    assert check(path, target).good
    report = check(LORA, target)
    assert [finding.level for finding in report.findings] == [REFUSED]
    assert "is for a language model" in report.findings[0].what
    with pytest.raises(Exception, match="is for a language model"):
        fix(LORA, target, tmp_path / "fixed")


def test_comfyui_reads_no_alphas_from_metadata(tmp_path: Path, invoke: Run) -> None:
    assert invoke("convert", STYLE, "--to", "diffusers", "-o", "d.safetensors").returncode == 0
    report = check(tmp_path / "d.safetensors", "comfyui")
    assert DIFFERENT in levels(report)
    fix(tmp_path / "d.safetensors", "comfyui", tmp_path / "c.safetensors")
    assert check(tmp_path / "c.safetensors", "comfyui").good
    assert invoke("compare", STYLE, "c.safetensors").returncode == 0


def test_formats_and_kinds_that_a_program_lacks(tmp_path: Path, invoke: Run) -> None:
    assert invoke("convert", STYLE, "--to", "omi", "-o", "omi.safetensors").returncode == 0
    report = check(tmp_path / "omi.safetensors", "a1111")
    assert "does not read" in report.findings[0].what
    fix(tmp_path / "omi.safetensors", "a1111", tmp_path / "k.safetensors")
    assert check(tmp_path / "k.safetensors", "a1111").good
    stem = "lora_unet_input_blocks_4_1_proj_in"
    loha = {f"{stem}.hada_w{side}_{half}": torch.randn(4, 4) for side in (1, 2) for half in "ab"}
    save(tmp_path / "loha.safetensors", loha)
    assert check(tmp_path / "loha.safetensors", "comfyui").good
    report = check(tmp_path / "loha.safetensors", "diffusers")
    assert "loha" in report.findings[0].what
    fixed = fix(tmp_path / "loha.safetensors", "diffusers", tmp_path / "lora.safetensors")
    assert fixed.error < 1e-6
    assert check(tmp_path / "lora.safetensors", "diffusers").good


def test_a_base_without_the_modules_is_found(tmp_path: Path) -> None:
    report = check(LORA, "vllm", base=FIXTURES / "sdxl.safetensors")
    assert not report.good
    shape = next(change.delta.shape for change in load(STYLE).changes if str(change).endswith("4_1_proj_in"))
    tensors = dict(kohya({"lora_unet_input_blocks_4_1_proj_in": shape, "lora_unet_not_there": (8, 8)}, 2, 1.0))
    save(tmp_path / "a.safetensors", tensors)
    assert any(
        "have no place in" in f.what or "no target" in f.what
        for f in check(tmp_path / "a.safetensors", "comfyui", base=FIXTURES / "sdxl.safetensors").findings
    )


@pytest.mark.parametrize("target", CONSUMERS)
def test_the_command_says_it_with_its_exit_code(invoke: Run, target: str) -> None:
    done = invoke("check", LORA, "--for", target)
    assert done.returncode == (0 if "and is the same" in done.stdout else 1)
    assert CONSUMERS[target].source.split()[0] in done.stdout
    assert json.loads(invoke("check", LORA, "--for", target, "--json").stdout)["verdict"] in done.stdout


def test_fix_needs_a_place(invoke: Run) -> None:
    assert invoke("check", LORA, "--for", "vllm", "--fix").returncode == 2
    assert invoke("check", LORA, "--for", "vllm", "--fix", "-o", "out").returncode == 0
    assert invoke("check", "out", "--for", "vllm").returncode == 0
