"""`convert --to`: ΔW stays what it was in every format of every architecture, bytes where only names change."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratool.adapter import load
from loratool.archs import ARCHS, Arch, Component
from loratool.formats.table import FORMATS, Format, format_named
from loratool.names import DIFFUSERS, Link
from loratool.ops.choosing import Wanted, choose
from loratool.ops.convert import convert
from loratool.ops.inspect import AdapterReport, inspect
from loratool.ops.renaming import renamed
from tests.models import save

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
    """The links of the first and of the last block of each kind, and all that are in none."""
    links = component.links[naming]
    numbers: dict[str, list[int]] = {}
    for link in links:
        for name, number in re.findall(r"(\w+?)\.(\d+)\.", link.whole)[:1]:
            numbers.setdefault(name, []).append(int(number))

    def chosen(link: Link) -> bool:
        found = re.findall(r"(\w+?)\.(\d+)\.", link.whole)[:1]
        return all(int(number) in (min(numbers[name]), max(numbers[name])) for name, number in found)

    return [link for link in links if chosen(link)]


def made_for(arch: Arch, spelling: Format, *, seed: int = 0, alpha: float | None = 1.0) -> Tensors:
    """An adapter for the denoiser of `arch` as a trainer of `spelling` writes it: every module that it names with a weight
    of two dimensions, each with factors of its own."""
    component = arch.component("unet")
    assert component is not None
    prefix = spelling.prefix(
        "unet", place=component.place, kohya=component.kohya, encoder=component.encoder, inside=component.inside
    )
    naming, rows = component.naming(spelling.namings), rows_of(component)
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for link in some_links(component, component.stored if naming == DIFFUSERS else naming):
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
    _, ways = choose(adapter, target, Wanted(arch.name))
    moved = renamed(adapter.changes, ways)
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


def written(path: Path, row: Format, tensors: Tensors) -> Path:
    """An adapter file, or a PEFT folder, of these tensors."""
    if not row.single:
        return save(path.with_suffix(".safetensors"), tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 1}
    if row.folder:
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config))
        save(path / "adapter_model.safetensors", tensors)
        return path
    return save(path.with_suffix(".safetensors"), tensors, lora_adapter_metadata=json.dumps(config))


def weights(path: Path) -> Path:
    return path / "adapter_model.safetensors" if path.is_dir() else path
