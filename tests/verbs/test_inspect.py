"""Inspecting: what a file is and why, from its header alone, whatever a stranger put into it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loratool import AdapterReport, CheckpointReport, inspect
from loratool.files.header import TensorInfo, encode_header
from tests.conftest import FIXTURES
from tests.models import kohya, lora, save


def header_only(path: Path, source: Path) -> Path:
    """A sparse file with the names, dtypes and shapes of a packed header, and no values."""
    with gzip.open(source) as file:
        listed = json.load(file)
    tensors, position = {}, 0
    for name, (dtype, shape) in listed.items():
        count = 2
        for dimension in shape:
            count *= dimension
        tensors[name] = TensorInfo(name, dtype, tuple(shape), position, position + count)
        position += count
    raw = encode_header(tensors, {})
    with open(path, "wb") as out:
        out.write(raw)
        out.truncate(len(raw) + position)
    return path


def test_a_kohya_file_is_described_whole(tmp_path: Path) -> None:
    stems = {"lora_unet_a": (8, 6), "lora_te1_b": (4, 6)}
    path = save(
        tmp_path / "x.safetensors",
        kohya(stems, 2, 1.0),
        ss_network_dim="2",
        ss_tag_frequency=json.dumps({"a": {"b" * 300: 1}}),
    )

    report = inspect(path)

    assert isinstance(report, AdapterReport)
    assert report.format.startswith("kohya")
    assert dict(report.components) == {"unet": 1, "te1": 1}
    assert dict(report.kinds) == {"lora": 2}
    assert dict(report.ranks) == {2: 2}
    assert dict(report.alphas) == {"1": 2}
    assert report.parameters == 2 * (8 + 6) + 2 * (4 + 6)
    assert report.share == report.parameters / (8 * 6 + 4 * 6)
    assert report.metadata["ss_tag_frequency"].startswith("JSON, 1 entries")
    assert [module.scale for module in report.modules] == [0.5, 0.5]


@pytest.mark.parametrize("arch", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("made", ["lora-{}-kohya-diffusers", "base-{}-unet-diffusers"])
def test_real_headers_are_told_apart_by_names_and_shapes(tmp_path: Path, arch: str, made: str) -> None:
    path = header_only(tmp_path / "x.safetensors", FIXTURES / "headers" / f"{made.format(arch)}.json.gz")

    report = inspect(path)

    assert report.arch.arch == arch
    assert "explains all" in report.arch.reason


def test_a_peft_folder_shows_its_configs_scales() -> None:
    report = inspect(FIXTURES / "llama-lora")

    assert isinstance(report, AdapterReport)
    assert report.format == "PEFT folder"
    assert report.arch.arch == "llm"
    assert {module.scale for module in report.modules} == {2.0}


def test_checkpoints_are_described_as_such() -> None:
    sharded, single = inspect(FIXTURES / "llama"), inspect(FIXTURES / "sdxl.safetensors")

    assert isinstance(sharded, CheckpointReport)
    assert isinstance(single, CheckpointReport)
    assert len(sharded.files) == 2
    assert sharded.arch.title == "llama"
    assert set(single.components) == {"unet", "te1", "te2", "vae"}


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    tensors = kohya({"lora_unet_a": (8, 6)}, 2, None)
    tensors["lora_unet_b.lora_down.weight"] = torch.ones(2, 6).half()
    tensors["lora_unet_c.surprise"] = torch.ones(1)
    report = inspect(save(tmp_path / "x.safetensors", tensors))

    assert isinstance(report, AdapterReport)
    said = " | ".join(report.suspicions)
    for what in ("lora_unet_b: has down but no up", "lora_unet_c.surprise", "no alpha", "mixed dtypes"):
        assert what in said


def test_values_come_from_the_factors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = lora((40, 30), 3, generator)
    tensors = {f"lora_unet_a.{leaf}": tensor for leaf, tensor in factors.items()} | {"lora_unet_a.alpha": torch.tensor(6.0)}
    tensors |= {"lora_unet_z.lora_down.weight": torch.ones(1, 4), "lora_unet_z.lora_up.weight": torch.zeros(4, 1)}
    tensors |= {
        "lora_unet_n.lora_down.weight": torch.full((1, 4), float("nan")),
        "lora_unet_n.lora_up.weight": torch.ones(4, 1),
    }

    report = inspect(save(tmp_path / "x.safetensors", tensors), values=True)

    assert isinstance(report, AdapterReport)
    by_name = {module.name: module.values for module in report.modules}
    delta = 2.0 * factors["lora_up.weight"].double() @ factors["lora_down.weight"].double()
    sigma = torch.linalg.svdvals(delta)
    found = by_name["lora_unet_a"]
    assert found is not None
    assert found.norm == pytest.approx(float(delta.norm()), rel=1e-6)
    assert found.largest == pytest.approx(float(sigma[0]), rel=1e-6)
    assert 1 < found.effective_rank <= 3
    assert by_name["lora_unet_z"].remark == "all zero: up"
    assert by_name["lora_unet_n"].remark == "NaN or Inf in down"


@pytest.mark.parametrize(
    "value",
    [
        "[" * 60_000,
        "not JSON",
        json.dumps({"x": "y" * 3_000_000}),
        "\x1b]52;c;evil\x07",
        "[/] [link=http://x]y[/link] :skull: \u202egnp",
    ],
)
def test_metadata_of_any_make_is_shown_and_never_obeyed(tmp_path: Path, run, value: str) -> None:
    save(
        tmp_path / "x.safetensors", kohya({"lora_unet_a": (4, 4)}, 1, 1.0), **{"ss_output_name": value, "ss_k\x1b[2J": value}
    )

    shown = run("inspect", "x.safetensors")
    as_json = run("inspect", "--json", "x.safetensors")

    for output in (shown.stdout, as_json.stdout):
        assert not any(character in output for character in "\x1b\x07\u202e")
        assert len(output) < 20_000
    assert shown.returncode == 0
    assert json.loads(as_json.stdout)["what"] == "adapter"


def test_inspecting_and_asking_for_help_import_no_torch() -> None:
    code = (
        "import sys; from loratool.cli import cli\n"
        "for words in (['inspect', *sys.argv[1:]], ['inspect', '--json', *sys.argv[1:]], ['--help'], ['merge', '--help']):\n"
        "    cli(words, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    paths = [str(FIXTURES / name) for name in ("llama", "llama-lora", "style.safetensors", "sdxl.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("adapters", [["a"], "a", 1, {"a": 1}, [None, {"name": "b"}]])
def test_a_history_of_another_shape_is_passed_over(tmp_path: Path, invoke, adapters: object) -> None:
    said = json.dumps({"command": "x", "adapters": adapters})
    save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (8, 8)}, 2, 1.0), loratool=said)
    assert "x" in invoke("inspect", "a.safetensors").stdout
