"""An adapter on the disk: where its files lie, and what they were like when they were first read. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.errors import InvalidFile, Unsupported, first_few
from loratool.files.header import (
    ADAPTER_HEADER_BYTES,
    Header,
    JsonFile,
    identity,
    open_regular,
    read_header,
    read_json_file,
    require_unchanged,
)
from loratool.files.in_place import current_path
from loratool.files.walk import leads_out

CONFIG_NAME: Final = "adapter_config.json"
"""PEFT's config, beside the tensors."""
WEIGHTS: Final = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapters.safetensors")
"""What PEFT, diffusers and MLX call the tensors' file in a folder."""
PICKLES: Final = ("adapter_model.bin",)
"""What PEFT called that file before safetensors."""
PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt"})
"""The endings of pickles, which may run code when they are opened."""


def locate(path: Path) -> tuple[Path, Path | None]:
    """The paths of the tensors' file and of the config, if any, of the adapter at `path`, a file or a folder; raises
    `InvalidFile` for a folder without tensors."""
    if not path.is_dir():
        # A config counts only for files of these names: any other may lie by chance in a folder that has one.
        beside = path.parent / CONFIG_NAME
        return path, beside if path.name in (*WEIGHTS, *PICKLES) and beside.exists() else None
    config = path / CONFIG_NAME
    # Safetensors first: of a folder that has both, no pickle is opened.
    for name in (*WEIGHTS, *PICKLES):
        if (path / name).exists():
            return path / name, config if config.exists() else None
    # A trainer's output holds its checkpoints, and PEFT puts an adapter that has a name into a folder of that name.
    inside = sorted((entry.name for entry in path.iterdir() if is_adapter_folder(entry)), key=lambda name: (len(name), name))
    if inside:
        raise InvalidFile(
            f"{path}: is no adapter itself, but holds {first_few(inside)}; name one, such as {path / inside[-1]}"
        )
    raise InvalidFile(f"{path}: a folder without {WEIGHTS[0]}: not an adapter")


def is_adapter_folder(path: Path) -> bool:
    """Whether `path` is a folder that holds an adapter."""
    return path.is_dir() and any((path / name).exists() for name in (CONFIG_NAME, *WEIGHTS, *PICKLES))


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter that was opened once: whoever needs its header or its config later takes them from here.

    `path` is what the user named, a file or a PEFT folder, `weights` the tensors' file, and `identity` the identity of that
    file when it was opened. `header` is that of the tensors; a pickle's is that of a temporary file, which is gone.
    """

    path: Path
    weights: Path
    header: Header
    identity: tuple[int, ...]
    config_file: JsonFile | None = None

    @property
    def is_pickle(self) -> bool:
        return self.weights.suffix in PICKLE_SUFFIXES

    @property
    def config(self) -> Mapping[str, Any]:
        """PEFT's adapter_config.json, empty where there is none."""
        return self.config_file.document if self.config_file else {}

    @property
    def read_files(self) -> tuple[Path, ...]:
        """The tensors' file and the config."""
        return (self.weights, *((self.config_file.path,) if self.config_file else ()))

    def links_out(self) -> tuple[Path, ...]:
        """The files that links lead to out of the folder that was named."""
        if not self.path.is_dir():
            return ()
        return tuple(path for path in self.read_files if leads_out(self.path, path))

    def require_unchanged(self) -> None:
        """Raises `InvalidFile` where the tensors' file, or the config, is no longer the one that was read."""
        require_unchanged(self.weights, self.identity)
        if self.config_file:
            self.config_file.require_unchanged()


def open_adapter(path: Path) -> AdapterFile:
    """Reads the header and the config of the adapter at `path`, a safetensors file or a PEFT folder; raises
    `LoratoolError`, for a pickle too."""
    weights, _ = locate(path)
    if weights.suffix in PICKLE_SUFFIXES:
        raise Unsupported(
            f"{weights}: a pickle can run code when it is opened; load it with PEFT and save_pretrained it as safetensors, "
            "or pass `allow_pickle=True` if you trust where it comes from"
        )
    header = read_header(current_path(weights), ADAPTER_HEADER_BYTES)
    return adapter_file(path, header, header.identity)


def adapter_file(path: Path, header: Header, who: tuple[int, ...]) -> AdapterFile:
    """The adapter at `path`, whose tensors' header is known, with its config; raises `InvalidConfig`."""
    weights, config = locate(path)
    return AdapterFile(path, weights, header, who, read_json_file(config) if config else None)


def identity_of(path: Path) -> tuple[int, ...]:
    """The identity of the regular file at `path`, which is another once the file is replaced or written to; raises
    `InvalidFile`."""
    descriptor = open_regular(path)
    try:
        return identity(descriptor)
    finally:
        os.close(descriptor)
