"""Tables of names: laws that hold for every architecture by its being in the registry, and diffusers' own converters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from loratool.archs import ARCHS, Arch, Component
from loratool.archs.links import Link, fuse, parts_mentioned, rename
from loratool.archs.sd import SD1, SDXL
from loratool.names import flat
from tests.archs.architectures import BEYOND, CONVERTERS, converted, shapes
from tests.models import SD1_UNET, SDXL_UNET, clip, clip_tensors, original_names, unet

LINKS = [
    pytest.param(component, naming, id=f"{arch.name}-{component.name}-{naming}")
    for arch in ARCHS
    for component in arch.components
    for naming in component.rows
]
DENOISERS = [pytest.param(arch, id=arch.name) for arch in ARCHS]


@pytest.mark.parametrize(("component", "naming"), LINKS)
def test_no_name_stands_twice_in_a_column(component: Component, naming: str) -> None:
    links = component.links[naming]

    assert max(Counter(part for link in links for part in link.parts).values()) == 1
    assert max(Counter(link.whole for link in links).values()) == 1


@pytest.mark.parametrize(("component", "naming"), LINKS)
def test_flattening_loses_nothing(component: Component, naming: str) -> None:
    for column in parts_mentioned(component.links[naming]):
        assert len({flat(name) for name in column}) == len(column)


@pytest.mark.parametrize(("component", "naming"), LINKS)
def test_a_name_reads_as_what_it_stands_for(component: Component, naming: str) -> None:
    """Dotted or flattened, and whatever other naming has the same name: it means the same parts."""
    for link in component.links[naming]:
        for name in (link.whole, flat(link.whole)):
            reading = component.read_name(name)
            assert reading is not None
            assert reading.parts == link.parts


@pytest.mark.parametrize(("component", "naming"), LINKS)
def test_every_naming_speaks_of_modules_of_diffusers(component: Component, naming: str) -> None:
    parts = {part for link in component.links[component.stored_naming] for part in link.parts}

    assert {part for link in component.links[naming] for part in link.parts} <= parts


@pytest.mark.parametrize("arch", DENOISERS)
def test_the_table_covers_the_real_module_list(arch: Arch) -> None:
    names = {name.removesuffix(".weight") for name in shapes(arch.name) if name.endswith(".weight")}
    table = arch.component("unet")
    assert table is not None

    parts = {part for link in table.links[table.stored_naming] for part in link.parts}
    beyond = BEYOND.get(arch.name, ())
    assert names <= parts
    assert {part for part in parts if not any(name in part for name in beyond)} <= names


@pytest.mark.parametrize("arch", DENOISERS)
def test_the_widths_that_tell_it_apart_are_the_real_ones(arch: Arch) -> None:
    table = arch.component("unet")
    assert table is not None
    real = {name.removesuffix(".weight"): shape for name, shape in shapes(arch.name).items() if len(shape) > 1}

    assert not [name for name, shape in real.items() if table.contradicts(name, shape[1])]


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.name in CONVERTERS], ids=lambda arch: arch.name)
def test_diffusers_converts_what_the_table_renamed_back_to_the_same(arch: Arch) -> None:
    """At the real heights, which its conversions have written into them, and a width of one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.rand(shape[:1] if len(shape) == 1 else (shape[0], 1), generator=generator)
        for name, shape in shapes(arch.name).items()
        if name.endswith((".weight", ".bias"))
    }

    result = converted(arch.name, original_names(arch, "unet", tensors))

    assert not [name for name, tensor in tensors.items() if not torch.equal(result[name], tensor)]


@pytest.mark.parametrize(("arch", "config"), [(SD1, SD1_UNET), (SDXL, SDXL_UNET)])
def test_diffusers_converts_what_the_unet_table_renamed_back_to_the_same(arch: Arch, config: dict[str, Any]) -> None:
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
