"""Finds the files that make up a checkpoint, from their headers alone: one, shards, or a diffusers folder. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from loratool.errors import InvalidConfig, InvalidFile, Unsupported, first_few
from loratool.files.adapter_files import PICKLE_SUFFIXES
from loratool.files.header import Header, JsonFile, TensorInfo, read_header, read_index, read_json_file
from loratool.files.in_place import current_path
from loratool.files.transaction import decided_path
from loratool.files.walk import WEIGHT_SUFFIXES, FolderFiles, leads_out, walk_model

SINGLE_NAMES: Final = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""What transformers and diffusers call the file of a model that is not sharded."""
INDEX_SUFFIX: Final = ".safetensors.index.json"
"""The ending of shard indexes."""
PIPELINE: Final = "model_index.json"
"""The file by which a diffusers folder is known."""
_QUANTISED: Final = (
    ".qweight", ".qzeros", ".scales", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".SCB",
    ".scale_weight", ".weight_scale", ".weight_scale_inv", ".g_idx", ".wscales",
)  # fmt: skip
"""The endings of tensors beside a quantised weight: of GPTQ, AWQ, bitsandbytes, scaled fp8, SVDQuant."""


@dataclass(frozen=True)
class Layout:
    """A checkpoint as its headers describe it.

    `files` maps each safetensors file, relative to `root`, to its header; `indexes` each shard index to its document;
    `tensors` each name to its file and its entry there. `left_out` are the folder's other weights, unread. Tensor names are
    those of the files, behind the folder's name in a diffusers folder ("unet/conv_in.weight").
    """

    root: Path
    files: Mapping[str, Header]
    indexes: Mapping[str, JsonFile]
    tensors: Mapping[str, tuple[str, TensorInfo]]
    left_out: tuple[str, ...]

    @property
    def is_folder(self) -> bool:
        return self.root.is_dir()

    @property
    def nbytes(self) -> int:
        return sum(header.size for header in self.files.values())

    def info(self, name: str) -> TensorInfo:
        return self.tensors[name][1]

    @property
    def path(self) -> Path:
        return self.root

    @property
    def read_files(self) -> tuple[Path, ...]:
        """The files that were read: weights, indexes, and the config where somebody asked for it."""
        documents = (*self.indexes.values(), *((self.config_file,) if self.config_file else ()))
        return (*(header.path for header in self.files.values()), *(document.path for document in documents))

    def require_unchanged(self) -> None:
        """Raises `InvalidFile` where one of the checkpoint's files was changed since it was read."""
        for header in self.files.values():
            header.require_unchanged()
        for index in self.indexes.values():
            index.require_unchanged()
        if self.config_file:
            self.config_file.require_unchanged()

    def links_out(self) -> tuple[Path, ...]:
        """The files that links lead to out of the folder that was named."""
        names = (*self.files, *self.indexes, "config.json") if self.is_folder else ()
        return tuple(self.root / name for name in names if leads_out(self.root, self.root / name))

    @cached_property
    def config_file(self) -> JsonFile | None:
        """The model's config.json, read when it is first asked for; None where there is none."""
        path = self.root / "config.json"
        return read_json_file(path) if self.is_folder and path.is_file() else None

    @property
    def config(self) -> Mapping[str, Any]:
        """What the model's config.json says, empty where there is none."""
        return self.config_file.document if self.config_file else {}

    @cached_property
    def folder_files(self) -> FolderFiles:
        """All that belongs to the model in its folder, and the links there that lead out of it."""
        return walk_model(self.root) if self.is_folder else FolderFiles((), ())

    def other_files(self) -> tuple[str, ...]:
        """Every file of the folder that is no weight, relative to `root`: configs, tokenizers, licences."""
        return tuple(name for name in self.folder_files.files if Path(name).suffix not in WEIGHT_SUFFIXES)

    def notes(self) -> tuple[str, ...]:
        """Warnings of files that no output takes over."""
        outside = self.folder_files.outside
        if not outside:
            return ()
        return (f"{self.root}: left out {first_few(outside)}, which links lead to out of the folder",)


def open_layout(path: Path) -> Layout:
    """Reads the headers of the checkpoint at `path`; raises `InvalidFile`, `InvalidConfig` or `Unsupported`."""
    path = decided_path(path)
    if path.is_dir():
        return _folder(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _folder(path.parent)
    if path.suffix in PICKLE_SUFFIXES:
        raise Unsupported(f"{path}: a pickle can run code when it is opened; save it as safetensors first")
    return layout_of_file(read_header(current_path(path)))


def layout_of_file(header: Header) -> Layout:
    """The checkpoint in one file whose header is known."""
    return Layout(header.path, {"": header}, {}, {name: ("", info) for name, info in header.tensors.items()}, ())


def require_weights(layout: Layout, instead: str) -> None:
    """Raises `InvalidFile` for a checkpoint without tensors, and `Unsupported` for a quantised one, saying what to do
    `instead`."""
    if not layout.tensors:
        raise InvalidFile(f"{layout.root}: has no tensors")
    marks = [name for name in layout.tensors if name.endswith(_QUANTISED)]
    said = layout.config.get("quantization_config")
    # MXFP4 packs the experts alone, into integers that no adapter is added to; all else is a weight as any other.
    partly = isinstance(said, dict) and said.get("quant_method") == "mxfp4"
    if marks or (said and not partly):
        met = f"{first_few(marks, 3)}" if marks else "quantization_config in config.json"
        raise Unsupported(f"{layout.root}: is quantised ({met}); {instead}")


def _folder(root: Path) -> Layout:
    if not (root / PIPELINE).is_file():
        return _model(root)
    merged = Layout(root, {}, {}, {}, ())
    # Each component is a checkpoint of its own, below its folder's name; others, such as a tokenizer's, have no weights.
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        if any(entry.suffix == ".safetensors" for entry in folder.iterdir()):
            merged = _join(merged, _model(folder), f"{folder.name}/")
    if not merged.files:
        raise InvalidFile(f"{root}: a diffusers folder without any safetensors file")
    return merged


def _join(whole: Layout, part: Layout, prefix: str) -> Layout:
    return replace(
        whole,
        files={**whole.files, **{prefix + name: header for name, header in part.files.items()}},
        indexes={**whole.indexes, **{prefix + name: index for name, index in part.indexes.items()}},
        tensors={
            **whole.tensors,
            **{prefix + name: (prefix + file, info) for name, (file, info) in part.tensors.items()},
        },
        left_out=(*whole.left_out, *(prefix + name for name in part.left_out)),
    )


def _model(root: Path) -> Layout:
    """The one model in a folder: by its usual name, else its index, else the only safetensors file there is."""
    names = sorted(entry.name for entry in root.iterdir() if entry.suffix in WEIGHT_SUFFIXES)
    indexes = sorted(entry.name for entry in root.iterdir() if entry.name.endswith(INDEX_SUFFIX))
    weights = [name for name in names if name.endswith(".safetensors")]
    single = next((name for name in SINGLE_NAMES if name in weights), None)
    if single is None and len(indexes) == 1:
        return _open_sharded(root, indexes[0], names)
    chosen = single or (weights[0] if len(weights) == 1 else None)
    if chosen is None:
        raise InvalidFile(f"{root}: {_no_choice(names, weights, indexes)}")
    header = read_header(current_path(root / chosen))
    tensors = {name: (chosen, info) for name, info in header.tensors.items()}
    return Layout(root, {chosen: header}, {}, tensors, tuple(name for name in names if name != chosen))


def _no_choice(names: list[str], weights: list[str], indexes: list[str]) -> str:
    if len(indexes) > 1:
        return f"holds several shard indexes ({first_few(indexes)}); name one of them"
    if weights:
        return f"holds several safetensors files and no index ({first_few(weights)}); name one of them"
    if names:
        return f"holds no safetensors file, only {first_few(names)}; save the model as safetensors first"
    return "holds no safetensors file"


def _open_sharded(root: Path, index_name: str, names: list[str]) -> Layout:
    document = read_index(root / index_name)
    index: Mapping[str, str] = document.document["weight_map"]
    shards = sorted(set(index.values()))
    missing = [shard for shard in shards if not (root / shard).exists()]
    if missing:
        raise InvalidFile(f"{root / index_name}: names {first_few(missing)}, which the folder does not hold")
    # Index and shards must agree in both directions: whoever reads by either then sees the same model.
    headers = {shard: read_header(current_path(root / shard)) for shard in shards}
    tensors: dict[str, tuple[str, TensorInfo]] = {}
    for shard, header in headers.items():
        for name, info in header.tensors.items():
            if index.get(name) != shard:
                raise InvalidConfig(f"{root / shard}: holds {name}, which {index_name} places in {index.get(name)}")
            tensors[name] = (shard, info)
    ghosts = [name for name in index if name not in tensors]
    if ghosts:
        raise InvalidConfig(f"{root / index_name}: lists {first_few(ghosts)}, which no shard holds")
    return Layout(root, headers, {index_name: document}, tensors, tuple(name for name in names if name not in headers))
