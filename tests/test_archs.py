"""Tables of names: laws that hold for every architecture by its being in the registry, and diffusers' own converters."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest
import torch

from loratool.archs import ARCHS, Component
from loratool.archs.sd import SD1, SDXL
from loratool.names import Link, flat, fuse, rename
from tests.conftest import FIXTURES
from tests.models import SD1_UNET, SDXL_UNET, clip, clip_tensors, original_names, unet

COMPONENTS = [pytest.param(part, id=f"{arch.name}-{part.name}") for arch in ARCHS for part in arch.components]


@pytest.mark.parametrize("component", COMPONENTS)
def test_no_name_stands_twice_in_a_column(component: Component) -> None:
    ours = Counter(part for link in component.links for part in link.parts)
    theirs = Counter(link.whole for link in component.links)

    assert not [name for name, count in (ours + Counter()).items() if count > 1]
    assert not [name for name, count in theirs.items() if count > 1]


@pytest.mark.parametrize("component", COMPONENTS)
def test_flattening_loses_nothing(component: Component) -> None:
    for column in ({part for link in component.links for part in link.parts}, {link.whole for link in component.links}):
        assert len({flat(name) for name in column}) == len(column)


@pytest.mark.parametrize("arch", ["sd1", "sd2", "sdxl"])
def test_the_unet_table_covers_the_real_module_list(arch: str) -> None:
    """The list is that of diffusers' own model at full size, made by fixtures/make.py."""
    with gzip.open(FIXTURES / "headers" / f"base-{arch}-unet-diffusers.json.gz") as file:
        names = {name.rpartition(".")[0] for name in json.load(file)}
    table = next(found for found in ARCHS if found.name == arch).component("unet")
    assert table is not None

    assert {part for link in table.links for part in link.parts} == names


@pytest.mark.parametrize(("arch", "config"), [(SD1, SD1_UNET), (SDXL, SDXL_UNET)])
def test_diffusers_converts_what_the_unet_table_renamed_back_to_the_same(arch, config) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    tensors = unet(config).state_dict()
    renamed = original_names(arch, "unet", tensors)
    checkpoint = {f"model.diffusion_model.{name}": tensor for name, tensor in renamed.items()}
    layers = {"layers_per_block": 2, "num_class_embeds": None, **unet(config).config}

    converted = convert_ldm_unet_checkpoint(checkpoint, layers)

    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)


def test_diffusers_converts_what_the_openclip_table_renamed_back_to_the_same() -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model = clip(layers=2, width=24, projection=True)
    tensors = clip_tensors(model)
    prefix = "conditioner.embedders.1.model."
    checkpoint = {prefix + name: tensor for name, tensor in original_names(SDXL, "te2", tensors).items()}

    converted = convert_open_clip_checkpoint(model, checkpoint, prefix=prefix)

    converted = {name: tensor for name, tensor in converted.items() if not name.endswith("position_ids")}
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)


def test_rename_and_fuse_join_block_and_leaf() -> None:
    assert list(rename("a.0", "b.1", {"x": "y"})) == [Link(("a.0.x",), "b.1.y")]
    assert list(rename("", "", {"x": "y"})) == [Link(("x",), "y")]
    assert fuse("a", "q k", "b.qk") == Link(("a.q", "a.k"), "b.qk", (1, 1))
