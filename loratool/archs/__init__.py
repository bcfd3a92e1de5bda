"""The architectures that loratool has a table for, as data. Adding one: a file here, and a line below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.archs.sd import SD1, SD2, SDXL
from loratool.archs.table import Arch, Component

ARCHS: Final[Sequence[Arch]] = (SD1, SD2, SDXL)

__all__ = ["ARCHS", "Arch", "Component"]
