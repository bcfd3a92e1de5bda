"""Writes one output file, at any offset from several threads, with copies made in the kernel where it can; and safetensors
files whose tensors are known only as they come, with the header written at last."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, cast

from loratool.errors import LoratoolError, OutputError
from loratool.files.header import TensorInfo, encode_header

COPY_BYTES: Final = 64 << 20
"""The most that one call copies, so that writeback of a piece starts while the next is copied."""
SYNC_FILE_RANGE_WRITE: Final = 2
"""Linux's flag to start writeback without waiting for it (include/uapi/linux/fs.h)."""
ENTRY_BYTES: Final = 160
"""Room in a header for the entry of one tensor, beside its name."""


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range(2), which Python's os module lacks; None on other systems."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):
        return None
    # ctypes would pass plain numbers as C ints, and cut offsets from 2 GiB on.
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return cast("Callable[[int, int, int, int], int]", function)


_sync_file_range: Final = _find_sync_file_range()


class Writer:
    """One output file, written at any offset from several threads: a new file, of which `nbytes` are preallocated, or with
    None an existing file."""

    def __init__(self, path: Path, nbytes: int | None) -> None:
        self.path = path
        # O_EXCL: a new file must not be somebody else's, nor a link to it.
        new = 0 if nbytes is None else os.O_CREAT | os.O_EXCL
        self.descriptor = os.open(path, os.O_RDWR | new | getattr(os, "O_CLOEXEC", 0), 0o666)
        _allocate(self.descriptor, nbytes or 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self.descriptor)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Writes all of `data` at `offset`."""
        view = memoryview(data)
        # One call may write less: on Linux 2 GiB at most.
        while view:
            count = os.pwrite(self.descriptor, view, offset)
            view, offset = view[count:], offset + count

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with the bytes at `offset`; raises `OutputError` where the file has become too short."""
        while buffer:
            count = os.preadv(self.descriptor, [buffer], offset)
            if count == 0:
                raise OutputError(f"{self.path}: was truncated while it was written")
            buffer, offset = buffer[count:], offset + count

    def start_writeback(self, offset: int, count: int) -> None:
        """Has the kernel begin to write this range to the disk, so that the sync at the end finds little left to do."""
        if _sync_file_range is not None:
            # A hint whose result does not matter: the sync at the end writes everything, or raises.
            _sync_file_range(self.descriptor, offset, count, SYNC_FILE_RANGE_WRITE)

    def copy(self, source: int, start: int, count: int, offset: int) -> None:
        """Copies `count` bytes at `start` of the descriptor `source` to `offset`; raises `OutputError` at its early end."""
        while count:
            done = _copy_some(source, self.descriptor, min(count, COPY_BYTES), start, offset)
            if done == 0:
                raise OutputError(f"{self.path}: an input was truncated while it was copied")
            self.start_writeback(offset, done)
            start, offset, count = start + done, offset + done, count - done


def copy_file(source: Path, target: Path) -> None:
    """Copies the bytes of `source` to a new file `target`, which others may read no more than they may read `source`."""
    with open(source, "rb") as reading, Writer(target, 0) as writer:
        granted = os.fstat(reading.fileno()).st_mode | 0o600
        os.chmod(target, os.fstat(writer.descriptor).st_mode & granted & 0o777)
        writer.copy(reading.fileno(), 0, os.fstat(reading.fileno()).st_size, 0)


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """A tensor to be written: its name, dtype and shape for the header, and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: bytes | memoryview


class SafetensorsAppender:
    """A safetensors file that grows tensor by tensor, with `room` bytes kept for the header that is written at last."""

    def __init__(self, writer: Writer, room: int) -> None:
        self._writer, self._room, self._end = writer, room, room
        self._infos: dict[str, TensorInfo] = {}
        self._lock, self._next = threading.Lock(), 0
        self._waiting: dict[int, Sequence[TensorBytes]] = {}

    def append(self, entry: TensorBytes) -> None:
        """Writes a tensor behind the others; raises `LoratoolError` where the file has a tensor of that name."""
        self._enter(entry.name, entry.dtype, entry.shape, len(entry.raw))
        self._writer.write(entry.raw, self._end - len(entry.raw))

    def copy(self, name: str, descriptor: int, nbytes: int) -> None:
        """Copies the first `nbytes` of an open file, as a tensor of bytes."""
        self._enter(name, "U8", (nbytes,), nbytes)
        self._writer.copy(descriptor, 0, nbytes, self._end - nbytes)

    def in_turn(self, number: int, entries: Sequence[TensorBytes]) -> None:
        """Appends the entries of this `number` as soon as those of all lower numbers are there, from whatever thread and in
        whatever order they come: equal runs write equal bytes."""
        # Whoever brings the next number also writes all that waited for it, alone, since each moves the file's end.
        with self._lock:
            self._waiting[number] = entries
            while self._next in self._waiting:
                for entry in self._waiting.pop(self._next):
                    self.append(entry)
                self._next += 1

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Writes the header into the room kept for it, and returns the size of the file."""
        # Padded to the whole room, since the format allows no gap between the header and the first tensor.
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


def _copy_some(source: int, target: int, count: int, start: int, offset: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, start, offset)
        except OSError as error:
            # Linux before 5.3 copies only within one file system, and some file systems refuse altogether.
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
    # Through memory, 1 MiB at a time, so that a copy of gigabytes takes no room.
    return os.pwrite(target, os.pread(source, min(count, 1 << 20), start), offset)


def _allocate(descriptor: int, nbytes: int) -> None:
    """Reserves disk space for `nbytes` at once, so that a full disk is met before the work and not at its end."""
    if not nbytes:
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # The file gets its size all the same, as by posix_fallocate.
        os.ftruncate(descriptor, nbytes)
