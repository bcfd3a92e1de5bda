"""`convert --to`: ΔW stays what it was in every format of every architecture, bytes where only names change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as encoded
from torch import Tensor

from loratool.adapter.load import load
from loratool.adapter.rename import rename_changes
from loratool.archs import ARCHS, Arch, Component
from loratool.archs.links import Link
from loratool.errors import AmbiguousFile, LoratoolError, OutputError, Unsupported
from loratool.files.header import read_header
from loratool.formats.table import FORMATS, Format, format_named
from loratool.keys.resolve import Hints, resolve_routes
from loratool.names import DIFFUSERS
from loratool.verbs.convert import convert
from loratool.verbs.inspect.inspect import AdapterReport, inspect
from tests.conftest import FIXTURES, Run
from tests.models import kohya, save

RANK = 2
UNIT = 4
"""Rows of the smallest part; the others are as many times larger as their links say."""
WIDTH = 3

Tensors = dict[str, Tensor]


def rows_of(component: Component) -> dict[str, int]:
    """How many rows each module of diffusers' naming has, so that the parts of a stack are in the link's ratio."""
    rows: dict[str, int] = {}
    for links in component.links.values():
        for link in links:
            rows |= {part: UNIT * size for part, size in zip(link.parts, link.sizes, strict=True) if len(link.parts) > 1}
    return rows


def some_links(component: Component, naming: str) -> Sequence[Link]:
    """The links of the first and of the last of every sort of block, and all that are in none."""
    links = component.links[naming]
    numbers: dict[str, set[int]] = {}
    for link in links:
        for name, number in _numbered(link):
            numbers.setdefault(name, set()).add(number)
    ends = {name: {min(found), max(found)} for name, found in numbers.items()}
    return [link for link in links if all(number in ends[name] for name, number in _numbered(link))]


def _numbered(link: Link) -> list[tuple[str, int]]:
    """The blocks that a module is in: ("transformer_blocks", 3)."""
    return [
        (name, int(number)) for name, number in re.findall(r"(\w*(?:blocks|layers|refiner)(?:\.\d)?)\.(\d+)\.", link.whole)
    ]


def made_for(arch: Arch, spelling: Format, *, seed: int = 0, alpha: float | None = 1.0) -> Tensors:
    """An adapter for the denoiser of `arch` as a trainer of `spelling` writes it: every module that it names with a weight
    of two dimensions, each with factors of its own."""
    component = arch.component("unet")
    assert component is not None
    prefix = spelling.prefix(
        "unet", place=component.diffusers_folder, kohya=component.kohya, encoder=component.encoder, inside=component.inside
    )
    naming, rows = component.naming(spelling.namings), rows_of(component)
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for link in some_links(component, component.stored_naming if naming == DIFFUSERS else naming):
        names = link.parts if naming == DIFFUSERS else (link.whole,)
        for name in names:
            parts = (name,) if naming == DIFFUSERS else link.parts
            height = sum(rows.get(part, UNIT) for part in parts)
            stem = spelling.stem(prefix, name)
            tensors[spelling.key(stem, "down")] = torch.randn(RANK, WIDTH, generator=generator)
            tensors[spelling.key(stem, "up")] = torch.randn(height, RANK, generator=generator)
            if alpha is not None and "alpha" in spelling.leaves and spelling.alpha == "tensor":
                tensors[spelling.key(stem, "alpha")] = torch.tensor(alpha)
    return tensors


def parts_of(path: Path, arch: Arch) -> dict[tuple[str, str], Tensor]:
    """ΔW of every module of diffusers' naming that the adapter changes, by the tables; zeros left out."""
    adapter = load(path)
    target = format_named("diffusers")
    _, ways = resolve_routes([adapter.keys], target, Hints(arch.name))
    moved = rename_changes(adapter.changes, ways)
    return {(item.prefix, item.path): item.delta.dense() for item in moved if bool(item.delta.dense().any())}


def same(one: Mapping[tuple[str, str], Tensor], other: Mapping[tuple[str, str], Tensor]) -> None:
    """float32 products of factors that are the same up to an exact or once rounded scale."""
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-5, atol=1e-6)


CELLS = [pytest.param(arch, row, id=f"{arch.name}-{row.name}") for arch in ARCHS for row in FORMATS if row.holds(arch.name)]
"""Every cell of the README's matrix that says yes, but those of language models."""


@pytest.mark.parametrize(("arch", "row"), CELLS)
def test_a_file_as_its_trainer_writes_it_comes_back_from_diffusers_with_the_same_change(
    arch: Arch, row: Format, tmp_path: Path
) -> None:
    """Read, written as diffusers, read, and written as it was: the names are the same, and so is every part's ΔW."""
    tensors = made_for(arch, row)
    source = written(tmp_path / "source", row, tensors)

    convert(source, tmp_path / "there.safetensors", "diffusers", arch=arch.name)
    convert(tmp_path / "there.safetensors", tmp_path / "back", row.name, arch=arch.name)

    assert load_file(weights(tmp_path / "back")).keys() == tensors.keys()
    same(parts_of(source, arch), parts_of(tmp_path / "there.safetensors", arch))
    same(parts_of(source, arch), parts_of(tmp_path / "back", arch))


@pytest.mark.parametrize(("arch", "row"), CELLS)
def test_every_format_writes_what_diffusers_names(arch: Arch, row: Format, tmp_path: Path) -> None:
    """Parts with factors of their own become stacks, and the way back leads to the very same bytes."""
    tensors = made_for(arch, format_named("diffusers"))
    if row.name == "xlabs":
        tensors = {key: tensor for key, tensor in tensors.items() if re.search(r"attn\.(to|add)_|single.*proj_out", key)}
    save_file(tensors, tmp_path / "source.safetensors")

    report = convert(tmp_path / "source.safetensors", tmp_path / "there", row.name, arch=arch.name)
    convert(tmp_path / "there", tmp_path / "back.safetensors", "diffusers", arch=arch.name)

    assert report.difference < 1e-6
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(("arch", "row"), CELLS)
def test_a_file_is_called_by_its_format(arch: Arch, row: Format, tmp_path: Path) -> None:
    """Or by one that spells every key the same."""
    source = written(tmp_path / "source", row, made_for(arch, row))

    report = inspect(source)

    assert isinstance(report, AdapterReport)
    keys = made_for(arch, row).keys()
    alike = [other.title for other in FORMATS if other.holds(arch.name) and made_for(arch, other).keys() >= keys]
    assert report.format.startswith(tuple(["PEFT"] if row.single else alike))


def written(path: Path, row: Format, tensors: Tensors, alpha: int = 1) -> Path:
    """An adapter file, or a PEFT folder, of these tensors."""
    if not row.single:
        return save(path.with_suffix(".safetensors"), tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha}
    if row.folder:
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config))
        save(path / "adapter_model.safetensors", tensors)
        return path
    return save(path.with_suffix(".safetensors"), tensors, lora_adapter_metadata=json.dumps(config))


def weights(path: Path) -> Path:
    return path / "adapter_model.safetensors" if path.is_dir() else path


ENCODER_STEMS = {
    "sd1": "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "sdxl": "lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
    "sd3-medium": "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "flux1": "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0",
    "lumina2": "lora_te_layers_0_self_attn_q_proj",
    "anima": "lora_unet_llm_adapter_blocks_0_self_attn_q_proj",
}
ENCODER_NAMES = {
    ("sd1", "diffusers"): "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ("sdxl", "diffusers"): "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj",
    ("sd3-medium", "diffusers"): "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
    ("flux1", "diffusers"): "text_encoder_2.encoder.block.23.layer.1.DenseReluDense.wi_0",
    ("lumina2", "diffusers"): "text_encoder.layers.0.self_attn.q_proj",
    ("anima", "diffusers"): "text_conditioner.blocks.0.self_attn.q_proj",
    ("anima", "comfyui"): "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj",
    ("sd1", "comfyui"): "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    ("sdxl", "comfyui"): "text_encoders.clip_g.transformer.text_model.encoder.layers.31.self_attn.q_proj",
    ("sd3-medium", "comfyui"): "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ("flux1", "comfyui"): "text_encoders.t5xxl.transformer.encoder.block.23.layer.1.DenseReluDense.wi_0",
    ("lumina2", "comfyui"): "text_encoders.gemma2_2b.transformer.model.layers.0.self_attn.q_proj",
    ("flux1", "onetrainer"): "lora_te2_encoder_block_23_layer_1_DenseReluDense_wi_0",
    ("flux1", "omi"): "t5.encoder.block.23.layer.1.DenseReluDense.wi_0",
    ("sdxl", "omi"): "clip_g.text_model.encoder.layers.31.self_attn.q_proj",
}


@pytest.mark.parametrize(("arch", "to"), ENCODER_NAMES)
def test_text_encoders_are_called_what_each_format_calls_them(arch: str, to: str, tmp_path: Path) -> None:
    """T5 is te3 to kohya whatever stands before it, and the second encoder of FLUX.1 to all others."""
    source = save(tmp_path / "a.safetensors", kohya({ENCODER_STEMS[arch]: (6, 4)}, 2, 1.0))

    convert(source, tmp_path / "b.safetensors", to, arch=arch)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", arch=arch)

    down = format_named(to).key(ENCODER_NAMES[arch, to], "down")
    assert down in load_file(tmp_path / "b.safetensors")
    assert load_file(tmp_path / "c.safetensors").keys() == load_file(source).keys()


FLUX_QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LOHA = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 8)}


def loha(stem: str) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {f"{stem}.{leaf}": torch.randn(shape, generator=generator) for leaf, shape in LOHA.items()}


def test_a_pure_rename_there_and_back_is_the_same_file(tmp_path: Path) -> None:
    source = FIXTURES / "style.safetensors"

    convert(source, tmp_path / "there.safetensors", "diffusers", arch="sdxl")
    convert(tmp_path / "there.safetensors", tmp_path / "back.safetensors", "kohya", arch="sdxl")

    mine, theirs = load_file(source), load_file(tmp_path / "back.safetensors")
    assert mine.keys() == theirs.keys()
    assert encoded(theirs) == encoded(mine)


@pytest.mark.parametrize("row", [row for row in FORMATS if row.holds("sdxl")], ids=lambda row: row.name)
def test_a_format_to_itself_changes_nothing(row: Format, tmp_path: Path) -> None:
    sdxl = next(arch for arch in ARCHS if arch.name == "sdxl")
    source = written(tmp_path / "a", row, made_for(sdxl, row), alpha=RANK)

    convert(source, tmp_path / "b", row.name, arch="sdxl")

    mine, theirs = load_file(weights(source)), load_file(weights(tmp_path / "b"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_equal_down_factors_keep_the_rank_and_unlike_ones_add_up(tmp_path: Path) -> None:
    """q, k and v that share `down`, as a cut stack does; and that do not, with scales that differ."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, 8, generator=generator)
    for name, shared in (("shared", True), ("unlike", False)):
        tensors = {}
        for i, part in enumerate("qkv"):
            stem = f"lora_transformer_transformer_blocks_0_attn_to_{part}"
            tensors[f"{stem}.lora_down.weight"] = down if shared else torch.randn(2 + i, 8, generator=generator)
            tensors[f"{stem}.lora_up.weight"] = torch.randn(4, 2 if shared else 2 + i, generator=generator)
            tensors[f"{stem}.alpha"] = torch.tensor(1.0 if shared else float(i + 1))
        save(tmp_path / f"{name}.safetensors", tensors)
        convert(tmp_path / f"{name}.safetensors", tmp_path / f"{name}-kohya.safetensors", "kohya", arch="flux1")

    shared = load_file(tmp_path / "shared-kohya.safetensors")
    assert shared[f"{FLUX_QKV}.lora_down.weight"].shape == (2, 8)
    assert float(shared[f"{FLUX_QKV}.alpha"]) == 1.0
    assert load_file(tmp_path / "unlike-kohya.safetensors")[f"{FLUX_QKV}.lora_down.weight"].shape == (9, 8)


def test_what_is_ambiguous_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    """A CLIP is te to kohya where it is a model's only one, te1 elsewhere."""
    save(tmp_path / "a.safetensors", {
        f"text_encoder.text_model.encoder.layers.0.mlp.fc1.{leaf}": torch.ones(shape)
        for leaf, shape in (("lora_A.weight", (2, 768)), ("lora_B.weight", (6, 2)))
    })  # fmt: skip

    with pytest.raises(AmbiguousFile, match=r"`arch='sd1'`\) or .*`arch='sdxl'`\)"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")

    assert not (tmp_path / "b.safetensors").exists()
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers-old", arch="sd1").before == 1


@pytest.mark.parametrize(
    ("stem", "shape", "leaves", "to", "match"),
    [
        (FLUX_QKV, (12, 8), LOHA, "diffusers", r"`rule=Rule\(\)`"),
        ("lora_unet_double_blocks_0_img_mlp_0", (12, 8), {}, "xlabs", "XLabs has no name for"),
        (FLUX_QKV, (12, 8), {}, "diffsynth", "is no format for"),
        ("lora_unet_double_blocks_0_nothing", (12, 8), {}, "diffusers", "has no such module"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", (12, 8), {}, "ai-toolkit", "no place for a text encoder"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_with_a_reason(
    stem: str, shape: tuple[int, ...], leaves: dict[str, tuple[int, ...]], to: str, match: str, tmp_path: Path
) -> None:
    tensors = {f"{stem}.{leaf}": torch.ones(size) for leaf, size in leaves.items()} or kohya({stem: shape}, 2, 1.0)
    save(tmp_path / "a.safetensors", tensors)

    with pytest.raises(LoratoolError, match=match):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to, arch="flux1")

    assert not (tmp_path / "b.safetensors").exists()


def test_loha_is_cut_and_stacked_exactly(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", loha(FLUX_QKV))

    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "onetrainer", arch="flux1")
    report = convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", arch="flux1")

    assert (report.before, report.after) == (3, 1)
    flux = next(arch for arch in ARCHS if arch.name == "flux1")
    same(parts_of(tmp_path / "a.safetensors", flux), parts_of(tmp_path / "c.safetensors", flux))


def test_metadata_stays_true(tmp_path: Path) -> None:
    """Hashes as kohya computes them (sd-scripts library/train_util.py), with safetensors' own writer as the oracle."""
    stems = {FLUX_QKV: (120, 4000)}
    source = save(
        tmp_path / "a.safetensors",
        kohya(stems, 64, 1.0) | {"bundle_emb.x.string_to_param.*": torch.ones(2, 3)},
        ss_network_dim="64",
        ss_network_alpha="1.0",
        ss_output_name="mine",
        sshs_model_hash="0",
        sshs_legacy_hash="0",
        **{"modelspec.hash_sha256": "0x0", "modelspec.architecture": "flux-1-dev/lora"},
    )

    convert(source, tmp_path / "b.safetensors", "diffusers")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")

    header, written = read_header(tmp_path / "c.safetensors"), load_file(tmp_path / "c.safetensors")
    metadata = header.metadata
    assert "bundle_emb.x.string_to_param.*" in written
    assert metadata["ss_output_name"] == "mine"
    assert metadata["ss_network_dim"] == "64"
    assert "modelspec.hash_sha256" not in metadata
    raw = (tmp_path / "c.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    training = encoded(written, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(training[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


def test_ranks_that_add_up_are_told_to_kohya(tmp_path: Path) -> None:
    stems = {f"lora_transformer_transformer_blocks_0_attn_to_{part}": (4, 8) for part in "qkv"}
    source = save(tmp_path / "a.safetensors", kohya(stems, 2, 1.0), ss_network_dim="2", ss_network_alpha="1.0")

    convert(source, tmp_path / "b.safetensors", "kohya", arch="flux1")

    metadata = read_header(tmp_path / "b.safetensors").metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("6", "3")


def test_a_model_without_a_table_keeps_its_naming(tmp_path: Path) -> None:
    dotted = {"diffusion_model.encoder.stage_0.mix.lora_A.weight": torch.ones(2, 8)}
    dotted |= {"diffusion_model.encoder.stage_0.mix.lora_B.weight": torch.ones(6, 2)}
    save(tmp_path / "a.safetensors", dotted)

    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")

    assert "lora_unet_encoder_stage_0_mix.lora_down.weight" in load_file(tmp_path / "b.safetensors")
    with pytest.raises(LoratoolError, match="no table explains"):
        convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "diffusers")
    with pytest.raises(LoratoolError, match="no table explains"):
        convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "comfyui")
    save(tmp_path / "base.safetensors", {"model.diffusion_model.encoder.stage_0.mix.weight": torch.ones(6, 8)})
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "comfyui", base=tmp_path / "base.safetensors")
    assert load_file(tmp_path / "c.safetensors").keys() == dotted.keys()


def test_from_narrows_what_a_file_may_be(tmp_path: Path) -> None:
    """te1 is kohya's spelling for models of two text encoders, not for SD1; and no diffusers file is spelled so."""
    source = save(tmp_path / "a.safetensors", kohya({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (6, 4)}, 2, 1.0))

    assert convert(source, tmp_path / "b.safetensors", "diffusers", from_format="kohya").after == 1
    with pytest.raises(LoratoolError, match="not spelled as diffusers"):
        convert(source, tmp_path / "c.safetensors", "diffusers", from_format="diffusers")


def test_a_folder_becomes_a_folder_and_names_what_failed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("one", "two"):
        save(tmp_path / "in" / f"{name}.safetensors", kohya({FLUX_QKV: (12, 8)}, 2, 1.0))
    (tmp_path / "in" / "broken.safetensors").write_bytes(b"nothing")

    done = run("convert", "in", "-o", "out", "--to", "diffusers", "--arch", "flux1")

    assert done.returncode == 1
    assert "1 of 3 were not converted: broken.safetensors" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.safetensors", "two.safetensors"]


def test_to_lora_and_to_a_format_at_once(tmp_path: Path, run: Run) -> None:
    save(tmp_path / "a.safetensors", loha(FLUX_QKV))

    done = run("convert", "a.safetensors", "-o", "b.safetensors", "--to", "diffusers", "--to-lora", "--arch", "flux1")

    assert done.returncode == 0, done.stderr
    assert "leaving out 0.00% of their ΔW" in done.stdout
    assert len(load_file(tmp_path / "b.safetensors")) == 6


def test_what_only_peft_can_hold_stays_with_peft(tmp_path: Path) -> None:
    """Stacked experts (target_parameters): copied into another PEFT folder, refused elsewhere."""
    (tmp_path / "a").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.down_proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{stem}.lora_A.weight": torch.ones(8, 6), f"{stem}.lora_B.weight": torch.ones(5, 8)}
    save(tmp_path / "a" / "adapter_model.safetensors", tensors)

    convert(tmp_path / "a", tmp_path / "b", "peft")

    assert load_file(tmp_path / "b" / "adapter_model.safetensors").keys() == tensors.keys()
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text()) == config
    with pytest.raises(Unsupported, match="target_parameters"):
        convert(tmp_path / "a", tmp_path / "c.safetensors", "peft-file")


def test_a_lokr_that_cannot_be_cut_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """Blocks of 8 rows do not end where parts of 4 do."""
    tensors = {f"{FLUX_QKV}.lokr_w1": torch.randn(3, 2), f"{FLUX_QKV}.lokr_w2": torch.randn(4, 4)}
    save(tmp_path / "good.safetensors", tensors)
    save(tmp_path / "bad.safetensors", {f"{FLUX_QKV}.lokr_w1": torch.randn(2, 2), f"{FLUX_QKV}.lokr_w2": torch.randn(6, 4)})

    assert convert(tmp_path / "good.safetensors", tmp_path / "b.safetensors", "onetrainer", arch="flux1").after == 3
    back = convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", arch="flux1")
    with pytest.raises(Unsupported, match=r"`rule=Rule\(\)`"):
        convert(tmp_path / "bad.safetensors", tmp_path / "d.safetensors", "onetrainer", arch="flux1")

    assert back.difference == 0
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "c.safetensors").items())


def test_a_folder_is_not_written_under_a_files_name(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="peft-file"):
        convert(FIXTURES / "llama-lora", tmp_path / "a.safetensors", "peft")


def test_the_constraint_of_an_orthogonal_delta_is_kept_where_alphas_are_folded(tmp_path: Path) -> None:
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    blocks = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    source = save(tmp_path / "a.safetensors", {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(1e-3)})

    report = convert(source, tmp_path / "b.safetensors", "ai-toolkit", arch="flux1")

    assert report.difference == 0
    assert float(
        load_file(tmp_path / "b.safetensors")["diffusion_model.double_blocks.0.img_attn.proj.alpha"]
    ) == pytest.approx(1e-3)


def test_an_adapter_in_memory_is_written_as_it_is_there(tmp_path: Path) -> None:
    whole = load(FIXTURES / "llama-lora")
    half = dataclasses.replace(whole, changes=whole.changes[:2])
    for name, adapter in (("whole", whole), ("half", half)):
        convert(adapter, tmp_path / name, "peft")
        assert len(load(tmp_path / name).changes) == len(adapter.changes)
