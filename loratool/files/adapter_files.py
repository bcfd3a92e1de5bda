"""Where an adapter's files lie: the tensors' file and PEFT's config beside it. Names alone; nothing is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loratool.errors import InvalidFile

CONFIG_NAME: Final = "adapter_config.json"
"""PEFT's config, beside the tensors."""
WEIGHTS: Final = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
PICKLES: Final = ("adapter_model.bin",)
PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt"})
"""How the names of files end that may run code when they are opened."""


def locate(path: Path) -> tuple[Path, Path | None]:
    """The tensors' file and the config's, if any, of an adapter given as a file or as a folder."""
    if not path.is_dir():
        beside = path.parent / CONFIG_NAME
        return path, beside if path.name in (*WEIGHTS, *PICKLES) and beside.exists() else None
    config = path / CONFIG_NAME
    for name in (*WEIGHTS, *PICKLES):
        if (path / name).exists():
            return path / name, config if config.exists() else None
    raise InvalidFile(f"{path}: a folder without {WEIGHTS[0]}: not an adapter")


def is_adapter_folder(path: Path) -> bool:
    """Whether `path` is a folder that holds an adapter."""
    return path.is_dir() and any((path / name).exists() for name in (CONFIG_NAME, *WEIGHTS, *PICKLES))
