"""Modules dropped and scaled: the rest keeps its bytes, the change is the one that was asked for, and blocks are those of
the tools whose vectors they come from."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratool import LoratoolError, Strength, compare, edit, merge
from loratool.archs import ARCHS
from loratool.archs.blocks import VECTOR_LENGTHS, VECTORS, block_of
from loratool.archs.sd import SD1, SDXL
from loratool.errors import NeedsBase
from loratool.files.header import read_header
from loratool.names import DIFFUSERS, ORIGINAL, Module, flat
from loratool.verbs.compare.compare import AdapterComparison
from tests.models import kohya, llm, peft_adapter, save
from tests.oracles.test_lycoris import ADDITIVE, OTHERS, train
from tests.verbs.test_combine import dense

pytestmark = [pytest.mark.filterwarnings("ignore")]

XL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
OUT = "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {XL: (8, 2048), OUT: (8, 2048), TEXT: (8, 6)}


def adapter(folder: Path, alpha: float | None = 1.0, dtype: torch.dtype = torch.float16, **metadata: str) -> Path:
    tensors = {name: tensor.to(dtype) for name, tensor in kohya(SHAPES, 2, alpha).items()}
    return save(folder / "a.safetensors", tensors, **metadata)


@pytest.mark.parametrize("alpha", [None, 1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_not_edited_keeps_its_bytes(tmp_path: Path, alpha: float | None, dtype: torch.dtype) -> None:
    path = adapter(tmp_path, alpha, dtype, note="mine", modelspec_hash="x", **{"modelspec.hash_sha256": "0x1"})
    before = load_file(path)

    report = edit(path, tmp_path / "b.safetensors", drop=("*te1*",), scale=(("OUT*", 0.7),))

    after = load_file(tmp_path / "b.safetensors")
    assert (report.dropped, report.scaled) == (1, 1)
    assert not any(name.startswith("lora_te1") for name in after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.startswith(XL))
    same = {
        name for name, tensor in after.items() if tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    }
    changed = after.keys() - same
    assert changed == {f"{OUT}.lora_up.weight" if alpha is None else f"{OUT}.alpha"}
    deltas, edited = dense(path), dense(tmp_path / "b.safetensors")
    assert float((edited[OUT] - 0.7 * deltas[OUT]).norm()) <= 1e-6 * float(deltas[OUT].norm())
    metadata = read_header(tmp_path / "b.safetensors").metadata
    assert metadata["note"] == "mine"
    assert "modelspec.hash_sha256" not in metadata
    assert json.loads(metadata["loratool"])["command"] == "edit"


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"keep": ("IN*", "lora_te1*")}, (1, 0, 1)),
        ({"keep": ("*attn2*",), "drop": ("OUT05",)}, (1, 0, 0)),
        ({"scale": (("*attn2*", -2.0), ("OUT*", 0.5))}, (-2, -1, 1)),
        ({"strength": Strength(1.0, (), {"unet": 0.25, "te1": 0.0})}, (0.25, 0.25, 0)),
        ({"strength": Strength(1.0, (0, 3, *[1.0] * 9, 0.5))}, (3, 0.5, 0)),
        ({"strength": Strength(1.0, (0.5, *[1.0] * 4, 2.0, *[1.0] * 10, 0.0, *[1.0] * 3))}, (2, 0, 0.5)),
    ],
)
def test_globs_blocks_and_components(tmp_path: Path, options: dict[str, Any], factors: tuple[float, ...]) -> None:
    path = adapter(tmp_path)
    report = edit(path, tmp_path / "b.safetensors", **options)
    before, after = dense(path), dense(tmp_path / "b.safetensors")
    assert {module.name: module.factor for module in report.modules} == dict(zip(SHAPES, factors, strict=True))
    for stem, factor in zip(SHAPES, factors, strict=True):
        assert (stem in after) == (factor != 0)
        torch.testing.assert_close(after.get(stem, 0 * before[stem]), factor * before[stem], rtol=1e-6, atol=0)


def sd_scripts_index(name: str, *, xl: bool) -> int:
    """The number of a module in sd-scripts' vectors of 26, as networks/svd_merge_lora.py describes it: 0 for text encoders,
    1 on for the input blocks, 13 for the middle, 14 on for the output blocks; -1 for what it does not know."""
    if "text_model_encoder_" in name:
        return 0
    if xl:
        name = name.removeprefix("lora_unet_")
        starts = {"time_embed_": 1, "label_emb_": 1, "middle_block_": 13, "out_": 23}
        for start, index in starts.items():
            if name.startswith(start):
                return index
        side, number = name.split("_")[0], name.split("_")[2]
        return (1 if side == "input" else 14) + int(number)
    if "mid_block_" in name:
        return 13
    found = re.search(r"(up|down)_blocks_(\d+)_(resnets|upsamplers|downsamplers|attentions)_(\d+)_", name)
    if not found:
        return -1
    side, i, what, j = found[1], int(found[2]), found[3], int(found[4])
    if side == "down":
        return 1 + (3 * (i + 1) if what == "downsamplers" else 3 * i + j + 1)
    return 14 + (3 * i + 2 if what == "upsamplers" else 3 * i + j)


@pytest.mark.parametrize("arch", [SD1, SDXL], ids=lambda arch: arch.name)
def test_blocks_are_those_that_sd_scripts_means(arch: Any) -> None:
    """kohya names SD1's modules as diffusers does, SDXL's as the original."""
    xl = arch is SDXL
    unet = arch.component("unet")
    for link in unet.links[ORIGINAL]:
        path = link.whole if xl else link.parts[0]
        index = sd_scripts_index(f"lora_unet_{flat(path)}", xl=xl)
        block = block_of(arch, Module("unet", flat(path), f"lora_unet_{flat(path)}"))
        names = (*VECTORS[26], "?")
        if path.startswith(("conv_in", "conv_out", "conv_norm_out", "time_embedding", "out.")):
            continue
        assert block == names[index], path
    for encoder in arch.components[1:]:
        path = encoder.links[next(iter(encoder.links))][0].parts[0]
        assert block_of(arch, Module(encoder.name, path, path)) == "BASE"


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.name in VECTOR_LENGTHS], ids=lambda arch: arch.name)
def test_every_naming_of_a_module_is_in_the_same_block(arch: Any) -> None:
    for link in arch.component("unet").links[ORIGINAL]:
        assert block_of(arch, Module("unet", link.whole, "")) == block_of(arch, Module("unet", link.parts[0], ""))
    assert DIFFUSERS not in arch.component("unet").rows


def test_short_vectors_are_the_long_ones_without_blocks() -> None:
    """As A1111's extension has them (BLOCKID12 to 26)."""
    assert {length: len(names) for length, names in VECTORS.items()} == {12: 12, 17: 17, 20: 20, 26: 26}
    for length in (12, 17, 20):
        assert [name for name in VECTORS[26] if name in VECTORS[length]] == list(VECTORS[length])
    assert VECTORS[17] == (
        "BASE",
        "IN01",
        "IN02",
        "IN04",
        "IN05",
        "IN07",
        "IN08",
        "M00",
        *(f"OUT{i:02}" for i in range(3, 12)),
    )
    assert VECTORS[12] == ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02}" for i in range(6)))


def test_blocks_without_a_number_are_kept_and_said(tmp_path: Path) -> None:
    stems = SHAPES | {"lora_unet_input_blocks_1_0_in_layers_2": (4, 4, 3, 3)}
    path = save(tmp_path / "a.safetensors", kohya(stems, 2, 1.0))
    report = edit(path, tmp_path / "b.safetensors", arch="sdxl", strength=Strength(1.0, (0.0, *[1.0] * 11)))
    assert "1 modules are in blocks that the vector has no number for" in report.warnings[0]
    assert "lora_unet_input_blocks_1_0_in_layers_2.alpha" in load_file(tmp_path / "b.safetensors")


def test_the_preview_adds_up_and_writes_nothing(tmp_path: Path) -> None:
    path = adapter(tmp_path)
    report = edit(path, None, scale=(("OUT05", 2.0),), drop=("BASE",))
    norms = {name: float(delta.norm()) ** 2 for name, delta in dense(path).items()}
    shares = {block.name: (block.before, block.after) for block in report.blocks}
    whole, left = sum(norms.values()), norms[XL] + 4 * norms[OUT]
    assert shares["OUT05"] == pytest.approx((norms[OUT] / whole, 4 * norms[OUT] / left))
    assert shares["BASE"] == pytest.approx((norms[TEXT] / whole, 0))
    assert report.dry_run
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("case", [*ADDITIVE, *OTHERS])
def test_every_kind_is_scaled_exactly_or_refused(tmp_path: Path, case: str) -> None:
    train((ADDITIVE | OTHERS)[case], tmp_path)
    base = load_file(tmp_path / "base.safetensors")
    options: dict[str, Any] = {"scale": (("*", -0.6),)}
    if case in OTHERS:
        with pytest.raises(NeedsBase, match=r"combine\(base=BASE\)"):
            edit(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
        return
    edit(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "x.safetensors")
    merge(tmp_path / "base.safetensors", [tmp_path / "b.safetensors"], tmp_path / "y.safetensors")
    one, other = load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "y.safetensors")
    for name, weight in base.items():
        torch.testing.assert_close(other[name], weight - 0.6 * (one[name] - weight), rtol=1e-4, atol=2e-6)


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora, patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    },
    "bias": {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "saved": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_folders_keep_their_tensors_and_get_their_config(tmp_path: Path, name: str) -> None:
    import peft

    model = llm("qwen2")
    peft_adapter(copy.deepcopy(model), tmp_path / "a", **CONFIGS[name])

    edit(tmp_path / "a", tmp_path / "b", drop=("*layers.1.*",), scale=(("*_proj", 0.7), ("*q_proj", 0.5)))

    before, after = (load_file(tmp_path / each / "adapter_model.safetensors") for each in "ab")
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    base = model.state_dict()
    one, other = (
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / each).merge_and_unload().state_dict()
        for each in "ab"
    )
    for key, weight in base.items():
        factor = 0.0 if "layers.1." in key else 0.35 if "q_proj" in key else 0.7 if "_proj" in key else 1.0
        if "lm_head" not in key:
            torch.testing.assert_close(other[key], weight + factor * (one[key] - weight), rtol=1e-5, atol=1e-6)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b")
    assert not [key for key, _ in loaded.named_parameters() if "lora" in key and "layers.1." in key]


def test_a_dora_can_lose_modules(tmp_path: Path) -> None:
    model = llm("llama")
    peft_adapter(copy.deepcopy(model), tmp_path / "a", r=4, use_dora=True, target_modules=["q_proj", "v_proj"])
    edit(tmp_path / "a", tmp_path / "b", drop=("*v_proj",))
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["use_dora"] is True
    report = edit(tmp_path / "b", None)
    assert (report.unmeasured, len(report.modules)) == (2, 2)
    with pytest.raises(NeedsBase, match=r"combine\(base=BASE\)"):
        edit(tmp_path / "a", tmp_path / "c", scale=(("*", 0.5),))
    found = compare([tmp_path / "b", tmp_path / "b"])
    assert isinstance(found, AdapterComparison)
    assert found.same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ("*typo*",)}, r"`drop='\*typo\*'`: matches no module"),
        ({"scale": (("IN05", 2.0),)}, "`scale='IN05'`: matches no module"),
        ({"drop": ("*",)}, "nothing is left"),
        ({"scale": (("*", float("nan")),)}, "finite"),
        ({"strength": Strength(1.0, (1.0,) * 13)}, "a vector of 13 block weights: .* takes 17 or 26"),
        ({"arch": "flux1", "strength": Strength(1.0, (1.0,) * 12)}, "has no such vectors"),
    ],
)
def test_what_cannot_be_meant_is_an_error(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = adapter(tmp_path)
    with pytest.raises(LoratoolError, match=message):
        edit(path, tmp_path / "b.safetensors", **options)
    assert not (tmp_path / "b.safetensors").exists()


def test_edit_on_the_command_line(tmp_path: Path, invoke) -> None:
    path = adapter(tmp_path)
    shown = invoke("edit", path, "--dry-run", "--blocks", "1,0,1,1,1,1,1,1,1,1,1,0.5")
    assert shown.returncode == 0
    assert re.search(r"IN04 +1 +[\d.]+% +0 +0\.00%", shown.stdout)
    done = invoke("edit", path, "-o", "b.safetensors", "--scale", "OUT*=0.5", "--component", "te1=0", "--json")
    report = json.loads(done.stdout)
    assert [module["factor"] for module in report["modules"]] == [0.0, 1.0, 0.5]
    for words, code, message in (
        ([], 2, "give -o OUT"),
        (["-o", "c.safetensors"], 2, "what to change"),
        (["-o", "c.safetensors", "--scale", "OUT*"], 1, "expected GLOB=NUMBER"),
        (["-o", "c.safetensors", "--blocks", "1,x"], 2, "list of numbers"),
        (["-o", "b.safetensors", "--drop", "BASE"], 1, "--overwrite"),
    ):
        failed = invoke("edit", path, *words)
        assert failed.returncode == code
        assert message in failed.stderr
    assert not (tmp_path / "c.safetensors").exists()
