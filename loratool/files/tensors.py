"""Reads tensors of safetensors files on demand, into memory of their own: a file that is cut meanwhile is an error, where a
memory map would make a signal of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, cast

import torch
from torch import Tensor

from loratool.errors import InvalidFile, Unsupported
from loratool.files.header import Header, TensorInfo, identity, open_regular, stored_dtype
from loratool.files.layout import Layout, open_layout

if TYPE_CHECKING:
    from typing_extensions import Buffer

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes that torch has, by safetensors' names of them."""
DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""The dtypes of floating-point numbers, which weights and factors have."""


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype called "float32", "float16" or "bfloat16"; None where none is asked for. Raises `UnknownName`."""
    stored = stored_dtype(name)
    return DTYPES[stored] if stored else None


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, to be read or written as bytes."""
    # As bytes, since numpy has no bfloat16; flattened, since torch cannot view a tensor without dimensions as bytes.
    return memoryview(cast("Buffer", tensor.flatten().view(torch.uint8).numpy()))


class TensorFile:
    """An open safetensors file, for a `with`: leaving checks that the file is still the one whose header was read."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.descriptor = open_regular(header.path)

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            # Not behind an error, which the check would hide.
            if kind is None:
                self._check()
        finally:
            os.close(self.descriptor)

    def read(self, info: TensorInfo, *, pinned: bool = False) -> Tensor:
        """Reads a tensor in its stored dtype; `pinned`, into memory that a GPU copies from. Raises `Unsupported` for a dtype
        that torch lacks."""
        if info.dtype not in DTYPES:
            raise Unsupported(f"{self.header.path}: {info.name} has dtype {info.dtype}, which torch cannot compute with")
        raw = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.read_into(tensor_bytes(raw), info.start)
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with the bytes at `offset` of the file; raises `InvalidFile` where it has become too short."""
        # One call may read less: on Linux 2 GiB at most.
        while buffer:
            count = os.preadv(self.descriptor, [buffer], offset)
            if count == 0:
                raise InvalidFile(f"{self.header.path}: was truncated while it was read")
            buffer, offset = buffer[count:], offset + count

    def _check(self) -> None:
        if identity(self.descriptor) != self.header.identity:
            raise InvalidFile(f"{self.header.path}: was changed while it was read")


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, each read when asked for: a file, a sharded folder or a diffusers folder.

    With `pinned`, `tensor` and `rows` read into memory that a GPU copies from while it computes.
    """

    def __init__(self, path: str | Path | Layout) -> None:
        self.layout: Layout = path if isinstance(path, Layout) else open_layout(Path(path))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.tensors)

    def __len__(self) -> int:
        return len(self.layout.tensors)

    def tensor(self, name: str, *, pinned: bool = False) -> Tensor:
        """A tensor in its stored dtype."""
        file, info = self.layout.tensors[name]
        with TensorFile(self.layout.files[file]) as opened:
            return opened.read(info, pinned=pinned)

    def rows(self, name: str, start: int, stop: int, *, pinned: bool = False) -> Tensor:
        """Rows `start` to `stop` of a tensor, without reading the others. A single number has no rows, and is read whole."""
        file, info = self.layout.tensors[name]
        if not info.shape:
            return self.tensor(name, pinned=pinned)
        # Tensors are stored row by row, so that consecutive rows are a range of bytes.
        step = info.nbytes // max(info.shape[0], 1)
        part = replace(
            info, shape=(stop - start, *info.shape[1:]), start=info.start + start * step, stop=info.start + stop * step
        )
        with TensorFile(self.layout.files[file]) as opened:
            return opened.read(part, pinned=pinned)

    def info(self, name: str) -> TensorInfo:
        """The dtype, shape and place of a tensor, which is not read."""
        return self.layout.info(name)
