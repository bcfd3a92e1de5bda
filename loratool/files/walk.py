"""One walk over a model's folder: what belongs to the model, and what an output that is made of it takes over. No torch."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

WEIGHT_SUFFIXES: Final = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack", ".h5", ".tflite"}
)
"""The endings of files of weights."""
NO_PART: Final = (".*", "__pycache__", "*.lock", "*.tmp", "*.incomplete", "*.partial")
"""The names of files and folders that are no part of a model, wherever they lie: git's, a cache's, an editor's or a user's
hidden ones, locks, temporaries of any program, and unfinished downloads."""
A_MODELS: Final = (
    "config.json", "generation_config.json", "model_index.json", "adapter_config.json", "*_config.json", "tokenizer*.json",
    "tokenizer.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.*", "quantize_config.json", "*.safetensors.index.json",
    "*.bin.index.json", "model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "pytorch_lora_weights.safetensors",
    "*-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors",
    "*-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].bin", "README.md", "LICENSE*", "NOTICE*", ".gitattributes",
    "USE_POLICY.md",
)  # fmt: skip
"""The names that transformers, diffusers, PEFT and the hub give to the files of a model."""
OURS: Final = re.compile(r"\.loratool-.*")
"""The names of loratool's own locks, temporaries and journals."""
DIGEST: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""The names of files in the hub's cache, which are hashes of their contents."""


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """The files of a model's folder, and the links in it that lead out of it, both by their paths in it."""

    files: tuple[str, ...]
    outside: tuple[str, ...]


def walk_model(root: Path) -> FolderFiles:
    """The files that belong to the model in the folder `root`, sorted: plain files, and those that links within it lead to.
    Neither what `NO_PART` names, nor devices and the like."""
    files: list[str] = []
    outside: list[str] = []
    for path, inside in _walk(root, root, ()):
        (files if inside else outside).append(path.relative_to(root).as_posix())
    return FolderFiles(tuple(sorted(files)), tuple(sorted(outside)))


def _walk(root: Path, folder: Path, above: tuple[str, ...]) -> Iterator[tuple[Path, bool]]:
    real = os.path.realpath(folder)
    # A link to a folder above it would be walked for ever.
    if real in above:
        return
    for entry in sorted(folder.iterdir()):
        if any(fnmatchcase(entry.name, pattern) for pattern in NO_PART):
            continue
        if leads_out(root, entry):
            yield entry, False
        elif entry.is_dir():
            yield from _walk(root, entry, (*above, real))
        elif entry.is_file():
            yield entry, True


def leads_out(root: Path, path: Path) -> bool:
    """Whether `path`, in the folder `root`, is a link or lies behind one that leads out of the folder: not into the store of
    the hub's cache, where files are called by their hashes, so that none can be named that one does not have."""
    real, place = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath((real, place)) == place:
        return False
    blob = Path(real)
    return not (blob.parent.name == "blobs" and blob.parents[1].name.startswith("models--") and DIGEST.fullmatch(blob.name))


def foreign_files(folder: Path, written: Iterable[str]) -> list[str]:
    """What lies in `folder`, at any depth, that is neither to be `written` nor called as the files of a model are; without
    any weights, all that is not to be written."""
    known = set(written)
    is_model = any(path.suffix in WEIGHT_SUFFIXES for path in folder.rglob("*"))
    found = []
    for place, folders, names in os.walk(folder):
        # Links to folders are entries, too, and are not followed.
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*links, *names):
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            a_models = is_model and any(fnmatchcase(name, pattern) for pattern in A_MODELS) and relative.count("/") < 2
            if relative not in known and not (a_models and not path.is_symlink()) and not OURS.fullmatch(name):
                found.append(relative)
    return sorted(found)


def restrict_mode(path: Path, sources: Iterable[Path]) -> None:
    """Takes from the file or folder at `path` what is not granted for each of the `sources` to their group and to others:
    what is made of a private file is private."""
    mode = granted = stat.S_IMODE(path.stat().st_mode)
    for source in sources:
        granted &= stat.S_IMODE(source.stat().st_mode) | 0o711
    # Whoever may read a folder's files may enter the folder.
    granted |= (granted & 0o044) >> 2 if path.is_dir() else 0
    if granted & mode != mode:
        os.chmod(path, granted & mode)
