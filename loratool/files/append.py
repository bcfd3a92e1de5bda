"""A safetensors file whose tensors are known only as they come: they are written one after the other, and the header at
last, into room that was kept for it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratool.errors import LoratoolError
from loratool.files.header import TensorInfo, encode_header
from loratool.files.output import Writer

ENTRY_BYTES = 160
"""Room in a header for what it says of one tensor, beside its name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written, as its header and its bytes have it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: bytes | memoryview


class Appending:
    """A file that `writer` writes, with `room` bytes for its header."""

    def __init__(self, writer: Writer, room: int) -> None:
        self._writer, self._room, self._end = writer, room, room
        self._infos: dict[str, TensorInfo] = {}
        self._lock, self._next = threading.Lock(), 0
        self._waiting: dict[int, Sequence[Entry]] = {}

    def append(self, entry: Entry) -> None:
        """Writes a tensor behind the others; raises `LoratoolError` where there is one of its name."""
        self._enter(entry.name, entry.dtype, entry.shape, len(entry.raw))
        self._writer.write(entry.raw, self._end - len(entry.raw))

    def copy(self, name: str, descriptor: int, nbytes: int) -> None:
        """Copies the first bytes of an open file, as a tensor of that many."""
        self._enter(name, "U8", (nbytes,), nbytes)
        self._writer.copy(descriptor, 0, nbytes, self._end - nbytes)

    def in_turn(self, number: int, entries: Sequence[Entry]) -> None:
        """Appends what has this number as soon as all before it are there, from whatever thread and in whatever order they
        come: equal runs write equal bytes."""
        with self._lock:
            self._waiting[number] = entries
            while self._next in self._waiting:
                for entry in self._waiting.pop(self._next):
                    self.append(entry)
                self._next += 1

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Writes the header, and returns the size of the file."""
        raw = encode_header(self._infos, metadata, self._room)
        if len(raw) != self._room:
            raise AssertionError(f"the header takes {len(raw)} bytes, {self._room} were kept for it")
        self._writer.write(raw, 0)
        return self._end

    def _enter(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        if name in self._infos:
            raise LoratoolError(f"{name} would be written twice")
        self._infos[name] = TensorInfo(name, dtype, shape, self._end, self._end + nbytes)
        self._end += nbytes
