"""Real key lists: every adapter among them is detected, written back with the same names and shapes, and converted to each
format of its architecture and back. They lie beside the repository where there are any, and in fixtures/headers."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratool.adapter.load import load
from loratool.adapter.verify import relative_difference
from loratool.deltas.base import Delta
from loratool.errors import Unsupported
from loratool.files.layout import open_layout
from loratool.formats.table import FORMATS, Format
from loratool.keys.detect import archs_by_name, detect
from loratool.keys.listing import read_listing
from loratool.keys.places import inputs_of
from loratool.verbs.convert import convert
from tests.conftest import FIXTURES
from tests.models import save

SHARED = Path(__file__).parent.parent.parent.parent / "shared" / "headers"
RANK = 2


def lists() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of every list, by the file's name."""
    found = {path.stem: json.loads(path.read_text()) for path in SHARED.glob("*.json") if path.stem != "INDEX"}
    for path in (FIXTURES / "headers").glob("*.json.gz"):
        with gzip.open(path) as file:
            found[path.name.partition(".")[0]] = {key: shape for key, (_, shape) in json.load(file).items()}
    return found


LISTS = lists()
LARGE = 300
"""Tensors from which on a list takes seconds to go to every format and back."""
ADAPTERS = [
    pytest.param(name, marks=pytest.mark.slow if len(LISTS[name]) > LARGE else ())
    for name in sorted(LISTS)
    if name.startswith(("gen__", "lora")) and "gen__peft" not in name
]
BASES = {
    "base__sdmecha__sd1-ldm": "sd1",
    "base__sdmecha__sdxl-sgm": "sdxl",
    "base__sdmecha__flux-flux": "flux1",
    "base__sdmecha__sd3-comfyui": "sd3-medium",
    "base__diffusers__FluxTransformer2DModel": "flux1",
    "base__diffusers__ChromaTransformer2DModel": "chroma",
    "base__diffusers__Flux2Transformer2DModel": "flux2-dev",
    "base__diffusers__SD3Transformer2DModel": "sd3-medium",
    "base__diffusers__QwenImageTransformer2DModel": "qwen-image",
    "base__diffusers__ZImageTransformer2DModel": "z-image",
    "base__diffusers__Lumina2Transformer2DModel": "lumina2",
    "base__diffusers__WanTransformer3DModel": "wan-14b",
    "base__diffusers__HunyuanVideoTransformer3DModel": "hunyuan-video",
    "base__diffusers__HunyuanImageTransformer2DModel": "hunyuan-image",
    "base__diffusers__LTXVideoTransformer3DModel": "ltx-video",
    "base__diffusers__CogVideoXTransformer3DModel": "cogvideox-2b",
    "base__diffusers__PixArtTransformer2DModel": "pixart",
    "base__diffusers__AuraFlowTransformer2DModel": "auraflow",
    "base__diffusers__Krea2Transformer2DModel": "krea2",
    "base__diffusers__StableCascadeUNet": "cascade",
    "base__invokeai__z_image_transformer_comfyui_keys": "z-image",
    "base__invokeai__anima_comfyui_keys": "anima",
}
"""Whole models, by the architecture that each is of."""
STRANGERS = sorted(
    name for name in LISTS if name.startswith("base__diffusers") and name not in BASES and "ConsisID" not in name
)
"""Models that no table is for, or of another size than it. (ConsisID's default is CogVideoX to the letter.)"""


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Random numbers at a lower rank, which is arbitrary; alphas are 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        size = list(shape)
        if re.search(r"lora_down|lora_A|lora\.down", name) and len(size) > 1:
            size[0] = min(size[0], RANK)
        if re.search(r"lora_up|lora_B|lora\.up", name) and len(size) > 1:
            size[1] = min(size[1], RANK)
        tensors[name] = (0.1 * torch.randn(size, generator=generator)).half() if size else torch.tensor(1.0).half()
    return tensors


def arch_of(path: Path) -> str:
    """The architecture that explains the names; of several alike, any."""
    return archs_by_name([group.module for group in read_listing(path).groups])[0].name


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_goes_to_every_format_of_its_model_and_back(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", filled(LISTS[name]))
    arch = arch_of(source)
    done = [row.name for row in FORMATS if row.holds(arch) and _there_and_back(source, row, arch, tmp_path)]

    assert "kohya-diffusers" in done


def _there_and_back(source: Path, row: Format, arch: str, folder: Path) -> bool:
    """Whether `row` can hold the adapter; if so, what comes back as it was has the same modules and the same ΔW."""
    there, back = folder / f"there-{row.name}", folder / f"back-{row.name}"
    try:
        convert(source, there, row.name, arch=arch)
    except Unsupported:
        return False
    convert(there, back, _own(source).name, arch=arch)
    before, after = _deltas(source), _deltas(back)
    assert after.keys() == before.keys()
    assert all(relative_difference(before[key], after[key]) < 1e-5 for key in before)
    return True


def _deltas(path: Path) -> dict[tuple[str, str], Delta]:
    """By module and parameter. CLIP's `text_model.` is left out, as transformers 5 does; the first text encoder is te1."""
    return {
        (re.sub(r"text_model[._]", "", change.module.stem).replace("lora_te_", "lora_te1_"), change.parameter): change.delta
        for change in load(path).changes
    }


def _own(source: Path) -> Format:
    """The format that a key list is in, as far as three tell."""
    return next(row for row in FORMATS if row.name in ("kohya", "kohya-diffusers", "diffusers") and _is_like(source, row))


def _is_like(path: Path, row: Format) -> bool:
    """Whether the file is spelled by `row`, but for CLIP's two names."""
    stems = [group.module.stem for group in read_listing(path).groups]
    dotted = "." in stems[0]
    original = any("input_blocks" in stem or "double_blocks" in stem for stem in stems)
    return dotted != row.flat and (row.name == "kohya") == original if not dotted else row.name == "diffusers"


@pytest.mark.parametrize("name", [param.values[0] for param in ADAPTERS])
def test_an_adapter_written_in_its_own_format_keeps_names_and_shapes(name: str, tmp_path: Path) -> None:
    """In files that mix spellings of leaves it keeps the modules."""
    source = save(tmp_path / "a.safetensors", filled(LISTS[name]))
    convert(source, tmp_path / "b.safetensors", _own(source).name, arch=arch_of(source))

    mine, theirs = load_file(source), load_file(tmp_path / "b.safetensors")
    if any(re.search(r"\.lora\.(up|down)|lora_linear_layer|[^.]_lora\.", key) for key in mine):
        assert _deltas(source).keys() == _deltas(tmp_path / "b.safetensors").keys()
        return
    assert {key: tensor.shape for key, tensor in mine.items()} == {key: tensor.shape for key, tensor in theirs.items()}
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.skipif(not SHARED.exists(), reason="the key lists are not beside the repository")
@pytest.mark.parametrize(("name", "arch"), BASES.items())
def test_a_whole_model_is_called_by_its_name(name: str, arch: str, tmp_path: Path) -> None:
    verdict = detect(inputs_of(open_layout(_on_disk(name, tmp_path))))

    assert verdict.arch == arch, verdict.reason


@pytest.mark.skipif(not SHARED.exists(), reason="the key lists are not beside the repository")
@pytest.mark.parametrize("name", STRANGERS)
def test_no_model_is_called_by_anothers_name(name: str, tmp_path: Path) -> None:
    verdict = detect(inputs_of(open_layout(_on_disk(name, tmp_path))))

    assert verdict.arch == ("wan-14b" if "WanVACE" in name else None), verdict.title


def _on_disk(name: str, folder: Path) -> Path:
    """A safetensors file with these names and shapes, whose numbers are a hole in the disk."""
    offset, header = 0, {}
    for key, shape in LISTS[name].items():
        size = 2
        for dimension in shape:
            size *= dimension
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path
