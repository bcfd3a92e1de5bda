"""Files of a checkpoint that are changed in place: their clones are, and take their places together or not at all.

A clone shares its blocks with the original where the file system can (btrfs, XFS), so that only what is written to it takes
room and time; elsewhere it is a copy. What is complete is renamed to `READY_FOLDER` inside the checkpoint's folder, and from
then on belongs there: whoever finds it, after a crash, moves it in. No torch.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Final

from loratool.errors import OutputError
from loratool.files.output import Destination, Input, sync
from loratool.files.writer import copy_file

READY_FOLDER: Final = ".loratool-ready"
"""The folder, inside a checkpoint's, of files that are to replace those of the same name."""
FICLONE: Final = 0x40049409
"""Linux's ioctl that makes one file share all blocks of another (include/uapi/linux/fs.h)."""


class InPlaceOutput(Destination):
    """Files of the checkpoint at `root`, a file or a folder, that are changed: their clones are written to, and replace them
    together. Raises `OutputError` where the checkpoint cannot or must not be changed.
    """

    in_place: ClassVar[bool] = True

    def __init__(self, root: Path, files: Iterable[str], inputs: Iterable[Input]) -> None:
        self.files = tuple(files)
        for file in self.files:
            _check_plain(root / file if file else root)
        folder = root.is_dir()
        super().__init__(root, inputs, folder=folder, beside=root if folder else root.parent)

    def _prepare(self) -> None:
        for file in self.files:
            self._clone(file)

    def _take_place(self) -> None:
        """In one step where it is one file, and in steps that are taken up again where it is several."""
        if self.folder:
            os.rename(self.temporary, self.place / READY_FOLDER)
            sync(self.place)
            complete_interrupted_change(self.place)
        else:
            os.replace(self.temporary, self.place)
            sync(self.place.parent)

    def _clone(self, file: str) -> None:
        source, target = self.place / file if file else self.place, self.path(file)
        status = source.stat()
        if not _share_extents(source, target):
            free = shutil.disk_usage(target.parent).free
            if free < status.st_size:
                raise OutputError(f"{self.place}: needs {status.st_size} bytes for a copy, the disk has {free} free")
            copy_file(source, target)
        os.chmod(target, stat.S_IMODE(status.st_mode))


def complete_interrupted_change(root: Path) -> None:
    """Moves into the checkpoint's folder what a change of it in place left complete; does nothing where there is none.

    Raises `OutputError` where that cannot be done. Several processes may do it at once.
    """
    ready = root / READY_FOLDER
    if not _is_folder(ready):
        return
    try:
        for path in sorted(_files(ready)):
            target = root / path.relative_to(ready)
            # What a stranger's folder says is followed into that folder alone.
            if not all(_is_folder(parent) for parent in target.parents if parent != root and root in parent.parents):
                raise OutputError(f"{path}: has no place in {root}; remove {ready}")
            _move(path, target)
        sync(root)
        shutil.rmtree(ready, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"{root}: a change in place was interrupted and cannot be finished ({error.strerror}); {ready} holds its rest"
        ) from error


def _move(path: Path, target: Path) -> None:
    try:
        os.replace(path, target)
    except FileNotFoundError:
        # Somebody else was faster.
        if os.path.lexists(path):
            raise
    sync(target.parent)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if stat.S_ISREG(path.lstat().st_mode):
            yield path


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _check_plain(path: Path) -> None:
    """Whether a file may be replaced: links are not, since what they point to belongs to others too."""
    if path.is_symlink():
        raise OutputError(
            f"{path}: is a symbolic link, and what it points to may be in use elsewhere; write a copy with `out=`"
        )
    if not path.is_file():
        raise OutputError(f"{path}: is not a plain file")
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path}: is read-only; write a copy with `out=`")


def _share_extents(source: Path, target: Path) -> bool:
    """Makes `target` share all blocks of `source`; False, and no file, where the file system cannot."""
    try:
        import fcntl
    except ImportError:
        return False
    with open(source, "rb") as reading:
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            fcntl.ioctl(descriptor, FICLONE, reading.fileno())
        except OSError as error:
            target.unlink()
            if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
                raise
            return False
        else:
            return True
        finally:
            os.close(descriptor)
