"""Outputs that appear complete or not at all: written beside their target, synced, renamed, tidied up on any error."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self, cast

from loratool.errors import OutputError
from loratool.files.locks import Lock, sweep_locks

TEMPORARY: Final = re.compile(r"\.loratool-(\d+)-[0-9a-f]{8}\.tmp")
COPY_BYTES: Final = 64 << 20
SYNC_FILE_RANGE_WRITE: Final = 2


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range(2), which Python's os module lacks."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return cast("Callable[[int, int, int, int], int]", function)


_sync_file_range: Final = _find_sync_file_range()


def check_target(target: Path, *, folder: bool, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Raises `OutputError` where `target` cannot or must not be written, before any work is done for it."""
    try:
        _check_target(target, folder=folder, overwrite=overwrite, inputs=inputs)
    except (OSError, ValueError) as error:
        raise OutputError(f"{target}: {getattr(error, 'strerror', None) or error}") from error


def temporary_in(folder: Path) -> Path:
    """A new name in `folder`, which a later run sweeps away if this one dies."""
    return folder / f".loratool-{os.getpid()}-{secrets.token_hex(4)}.tmp"


class Input(Protocol):
    """What an output is made of: a file, or several, that must still be what they were when the output takes its place."""

    @property
    def path(self) -> Path:
        """What the user named."""
        ...

    def require_unchanged(self) -> None:
        """Raises `InvalidFile` where one of the files was replaced or written to."""
        ...


class Output:
    """A file or folder to be. Write below `temporary`; `commit` puts it in place, and leaving without it removes it.

    Raises `OutputError` at once where `target` cannot or must not be written.
    """

    def __init__(self, target: Path, *, folder: bool, overwrite: bool, nbytes: int, inputs: Iterable[Input]) -> None:
        self.target = target
        self.folder = folder
        self.inputs = tuple(inputs)
        check_target(target, folder=folder, overwrite=overwrite, inputs=[each.path for each in self.inputs])
        parent = target.parent
        sweep(parent)
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise OutputError(f"{target}: needs {nbytes} bytes, the disk has {free} free")
        self.temporary = temporary_in(parent)
        self._lock = Lock(target)

    def __enter__(self) -> Self:
        try:
            self._lock.take()
            if self.folder:
                self.temporary.mkdir()
        except OSError as error:
            self._lock.release()
            raise OutputError(f"{self.target}: {error.strerror}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        remove(self.temporary)
        self._lock.release()
        if isinstance(error, OSError):
            raise OutputError(f"{self.target}: {error.strerror or error}") from error

    def path(self, relative: str) -> Path:
        """Where to write the file called `relative` in a folder, or the file itself ("")."""
        path = self.temporary / relative if relative else self.temporary
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self) -> None:
        """Syncs everything written and renames it to the target; an old output is there, whole, until then.

        Raises `InvalidFile` where an input is no longer what it was.
        """
        for each in self.inputs:
            each.require_unchanged()
        try:
            for path in (self.temporary, *self.temporary.rglob("*")):
                sync(path)
            self._rename()
            sync(self.target.parent)
        except OSError as error:
            raise OutputError(f"{self.target}: {error.strerror}") from error

    def _rename(self) -> None:
        if not self.folder:
            os.replace(self.temporary, self.target)
            return
        if not self.target.exists():
            os.rename(self.temporary, self.target)
            return
        # A folder cannot be replaced in one step: the old one steps aside, and back should the rename fail.
        # Its name there is one that no sweep takes, so that even a crash between the two renames loses nothing.
        aside = self.target.with_name(f"{self.target.name}.old-{secrets.token_hex(4)}")
        os.rename(self.target, aside)
        try:
            os.rename(self.temporary, self.target)
        except OSError:
            os.rename(aside, self.target)
            raise
        remove(aside)


class Writer:
    """One output file, written at any offset from several threads: a new one, of which `nbytes` are preallocated, or with
    None one that is there."""

    def __init__(self, path: Path, nbytes: int | None) -> None:
        self.path = path
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
        while view:
            count = os.pwrite(self.descriptor, view, offset)
            view, offset = view[count:], offset + count

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with what was written at `offset`."""
        while buffer:
            count = os.preadv(self.descriptor, [buffer], offset)
            if count == 0:
                raise OutputError(f"{self.path}: was truncated while it was written")
            buffer, offset = buffer[count:], offset + count

    def start_writeback(self, offset: int, count: int) -> None:
        """Has the kernel begin to write this range to the disk, so that the sync at the end finds little left to do."""
        if _sync_file_range is not None:
            _sync_file_range(self.descriptor, offset, count, SYNC_FILE_RANGE_WRITE)

    def copy(self, source: int, start: int, count: int, offset: int) -> None:
        """Copies `count` bytes at `start` of the descriptor `source` to `offset`, in the kernel where it can."""
        while count:
            done = _copy_some(source, self.descriptor, min(count, COPY_BYTES), start, offset)
            if done == 0:
                raise OutputError(f"{self.path}: an input was truncated while it was copied")
            self.start_writeback(offset, done)
            start, offset, count = start + done, offset + done, count - done


def copy_file(source: Path, target: Path) -> None:
    """Copies a whole file's bytes, and its permission bits as the umask allows."""
    with open(source, "rb") as reading, Writer(target, 0) as writer:
        writer.copy(reading.fileno(), 0, os.fstat(reading.fileno()).st_size, 0)


def _copy_some(source: int, target: int, count: int, start: int, offset: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, start, offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
    return os.pwrite(target, os.pread(source, min(count, 1 << 20), start), offset)


def _allocate(descriptor: int, nbytes: int) -> None:
    """Takes the disk space at once, so that a full disk is met before the work and not at its end."""
    if not nbytes:
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, nbytes)


def _check_target(target: Path, *, folder: bool, overwrite: bool, inputs: Iterable[Path]) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the folder {target.parent} does not exist")
    for path in inputs:
        _check_apart(target, path, folder=folder)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputError(f"{target}: exists; pass --overwrite to replace it")
    if target.is_symlink() or not (target.is_dir() if folder else target.is_file()):
        raise OutputError(f"{target}: exists and is not a plain {'folder' if folder else 'file'}; choose another name")
    if folder and not _holds_a_model(target):
        raise OutputError(f"{target}: holds files but no model; --overwrite would delete them, so choose another name")
    if not os.access(target, os.W_OK):
        raise OutputError(f"{target}: is read-only")


def _check_apart(target: Path, path: Path, *, folder: bool) -> None:
    """Whether an input is safe from the output, by whatever name either goes."""
    if target.exists() and path.exists() and os.path.samefile(target, path):
        raise OutputError(f"{target}: is an input of this very run; choose another name")
    if folder and path.exists() and target.resolve() in path.resolve().parents:
        raise OutputError(f"{target}: holds the input {path}; choose another name")


def _holds_a_model(folder: Path) -> bool:
    """Whether a folder is empty or one that loratool, or save_pretrained, may have written."""
    names = [entry.name for entry in folder.iterdir()]
    return not names or any(name in ("config.json", "model_index.json") or name.endswith(".safetensors") for name in names)


def sweep(parent: Path) -> None:
    """Removes what runs that were killed left behind; a living process's temporaries stay."""
    sweep_locks(parent)
    for entry in parent.iterdir():
        found = TEMPORARY.fullmatch(entry.name)
        if found and not _alive(int(found[1])):
            remove(entry)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def remove(path: Path) -> None:
    """Removes a file or folder, where it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Has what was written to a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
