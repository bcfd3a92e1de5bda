"""The architectures that loratool has a table for, as data. Adding one: a file here, and a line below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.archs.auraflow import AURAFLOW
from loratool.archs.cascade import CASCADE
from loratool.archs.cosmos import ANIMA
from loratool.archs.flux import CHROMA, FLUX1, FLUX2, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from loratool.archs.hidream import HIDREAM
from loratool.archs.hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO
from loratool.archs.krea import KREA2
from loratool.archs.next_dit import LUMINA2, Z_IMAGE
from loratool.archs.pixart import PIXART
from loratool.archs.qwen_image import QWEN_IMAGE
from loratool.archs.sd import SD1, SD2, SDXL, SDXL_REFINER, SSD1B, VEGA
from loratool.archs.sd3 import SD3_MEDIUM, SD35_LARGE
from loratool.archs.table import Arch, Component, NameReading
from loratool.archs.video import COGVIDEOX_2B, COGVIDEOX_5B, LTX_VIDEO
from loratool.archs.wan import WAN_1_3B, WAN_5B, WAN_14B
from loratool.errors import look_up

ARCHS: Final[Sequence[Arch]] = (
    SD1, SD2, SDXL, SDXL_REFINER, SSD1B, VEGA, SD3_MEDIUM, SD35_LARGE,
    FLUX1, FLUX2, FLUX2_KLEIN_9B, FLUX2_KLEIN_4B, CHROMA,
    LUMINA2, Z_IMAGE, QWEN_IMAGE, HIDREAM, AURAFLOW, PIXART, ANIMA, KREA2, CASCADE,
    HUNYUAN_IMAGE, HUNYUAN_VIDEO, WAN_1_3B, WAN_5B, WAN_14B, LTX_VIDEO, COGVIDEOX_2B, COGVIDEOX_5B,
)  # fmt: skip


def arch_named(name: str) -> Arch:
    """The architecture that is called `name`; raises `UnknownName`."""
    return look_up({arch.name: arch for arch in ARCHS}, name, "architecture")


__all__ = ["ARCHS", "Arch", "Component", "NameReading", "arch_named"]
