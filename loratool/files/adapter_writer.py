"""Writes adapters: tensors in safetensors' own order, metadata that is true of them, and PEFT's config beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from loratool.files.adapter_files import CONFIG_NAME, WEIGHTS
from loratool.files.hashes import HASH_LENGTHS, hashes
from loratool.files.header import TensorInfo, encode_header, stored_order
from loratool.files.output import Input, NewOutput
from loratool.files.tensors import DTYPE_NAMES, tensor_bytes
from loratool.files.writer import Writer


@dataclass(frozen=True, slots=True)
class AdapterContents:
    """What an adapter's file is to hold, and the `config` of a PEFT folder, None for a single file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = field(default=None)


def write_contents(
    contents: AdapterContents,
    inputs: Sequence[Input],
    out: Path,
    *,
    overwrite: bool,
    check: Callable[[Path], None] | None = None,
) -> int:
    """Writes an adapter to `out`, a file or a PEFT folder, and returns the bytes of the tensors' file.

    `check` is given the path of what was written before that takes its place, and raises where something is wrong.
    """
    infos, position = _lay_out(contents.tensors)
    parts = [tensor_bytes(contents.tensors[name].contiguous()) for name in infos]
    metadata = dict(contents.metadata)
    # Hashes before the header, which holds them: they cover the tensors and the training's metadata alone.
    metadata |= hashes(infos, parts, metadata)
    raw = encode_header(infos, metadata)
    nbytes, folder = len(raw) + position, contents.config is not None
    with NewOutput(out, folder=folder, overwrite=overwrite, nbytes=nbytes, inputs=inputs) as output:
        path = output.path(WEIGHTS[0] if folder else "")
        with Writer(path, nbytes) as writer:
            writer.write(raw, 0)
            for info, part in zip(infos.values(), parts, strict=True):
                writer.write(part, len(raw) + info.start)
        if contents.config is not None:
            output.path(CONFIG_NAME).write_text(_text(contents.config))
        if check:
            check(path.parent if folder else path)
        output.commit()
    return nbytes


def contents_size(contents: AdapterContents) -> int:
    """The bytes that `write_contents` would write of tensors of these shapes, with those of the config."""
    infos, position = _lay_out(contents.tensors)
    config = "" if contents.config is None else _text(contents.config)
    # Only their length counts, so that the tensors need not hold any numbers yet.
    metadata = dict(contents.metadata) | {key: "0" * length for key, length in HASH_LENGTHS.items()}
    return len(encode_header(infos, metadata)) + position + len(config.encode())


def _lay_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, TensorInfo], int]:
    """The place of each tensor behind the header, in safetensors' order, on which hashes depend; and the end of the last."""
    infos, position = {}, 0
    for name in sorted(tensors, key=lambda name: stored_order(DTYPE_NAMES[tensors[name].dtype], name)):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        infos[name] = TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), position, position + size)
        position += size
    return infos, position


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"
