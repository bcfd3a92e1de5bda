"""Changes a checkpoint in place: clones of its files are written to, and take the files' places together or not at all.

A clone shares its blocks with the original where the file system can (btrfs, XFS), so that only what is written to it takes
room and time; elsewhere a clone is a copy. Once all clones are complete, their folder is renamed to `READY_FOLDER` inside
the checkpoint's, and the change is decided: whoever reads the checkpoint then, after a crash, reads the files in that folder
(`current_path`), and whoever changes it next moves them in first. Reading changes nothing. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Final

from loratool.errors import OutputError
from loratool.files.output import Destination, Input
from loratool.files.transaction import sweep, sync
from loratool.files.writer import copy_file

READY_FOLDER: Final = ".loratool-ready"
"""The name of the folder, inside a checkpoint's, whose files are to replace those of the same name."""
FICLONE: Final = 0x40049409
"""Linux's ioctl that makes one file share all blocks of another (include/uapi/linux/fs.h)."""


class InPlaceOutput(Destination):
    """The `files` of the checkpoint at `root`, a folder or a file (""), that are changed: clones of them are written to,
    and replace them together. Raises `OutputError` where the checkpoint cannot or must not be changed.
    """

    in_place: ClassVar[bool] = True

    def __init__(self, root: Path, files: Iterable[str], inputs: Iterable[Input]) -> None:
        self.files = tuple(files)
        for file in self.files:
            _require_plain(root / file if file else root)
        folder = root.is_dir()
        # Clones lie on the file system of their originals: blocks are shared, and a rename moves files, within one only.
        beside, name = (root, READY_FOLDER) if folder else (root.parent, root.name)
        super().__init__(root, inputs, folder=folder, beside=beside, name=name)

    @property
    def goal(self) -> Path:
        """The name that decides: of several files, that of the folder that they are moved in from."""
        return self.place / READY_FOLDER if self.folder else self.place

    def complete(self) -> None:
        """Moves several files in, in steps that a later run takes up again after a crash."""
        if self.folder:
            complete_interrupted_change(self.place)

    def _changed_files(self) -> Iterable[Path]:
        # Whoever changes a file by its own name, or by that of the folder above, has to have the same lock.
        return [self.place / file for file in self.files if file]

    def _prepare(self) -> None:
        for file in self.files:
            self._clone(file)

    def _clone(self, file: str) -> None:
        source, target = self.place / file if file else self.place, self.path(file)
        status = source.stat()
        if not _share_extents(source, target):
            # Only a copy takes room of its own.
            free = shutil.disk_usage(target.parent).free
            if free < status.st_size:
                raise OutputError(f"{self.place}: needs {status.st_size} bytes for a copy, the disk has {free} free")
            copy_file(source, target)
        # The clone replaces its original, whose permissions and owner must not change with its bytes. Only root may give a
        # file away; whoever else changes another's file in place owns the new one.
        os.chmod(target, stat.S_IMODE(status.st_mode))
        if hasattr(os, "chown") and (status.st_uid, status.st_gid) != (target.stat().st_uid, target.stat().st_gid):
            with contextlib.suppress(PermissionError):
                os.chown(target, status.st_uid, status.st_gid)


def current_path(path: Path) -> Path:
    """Where the file of a checkpoint lies by now: in `READY_FOLDER`, of its folder or of the pipeline above, while a change
    in place is decided that a killed run did not finish."""
    for root in (path.parent, path.parent.parent):
        ready = root / READY_FOLDER / path.relative_to(root)
        folders = [parent for parent in ready.parents if root in parent.parents]
        if path.name and _is_plain(ready) and all(_is_folder(parent) for parent in folders):
            return ready
    return path


def finish_change_in_place(path: Path) -> None:
    """Finishes what a killed run left of a change in place of the checkpoint at `path`: a folder, its index, one of its
    files, or a component of it. Raises `OutputError`."""
    for root in (path, path.parent, path.parent.parent):
        if _is_folder(root):
            sweep(root)
            complete_interrupted_change(root)


def complete_interrupted_change(root: Path) -> None:
    """Moves what an interrupted change in place left complete, in `READY_FOLDER`, into the checkpoint's folder `root`.

    Does nothing without such a folder. Raises `OutputError` where a file cannot be moved, or where the folder holds anything
    else than weights that `root` has. Several processes may call this at once.
    """
    ready = root / READY_FOLDER
    if not _is_folder(ready):
        return
    try:
        moves = [(path, root / path.relative_to(ready)) for path in sorted(_files(ready))]
        # The folder may come from a stranger: a link in it must not lead a file to a place outside the checkpoint, and a
        # change in place replaces weights alone.
        for path, target in moves:
            inner = [parent for parent in target.parents if parent != root and root in parent.parents]
            if path.suffix != ".safetensors" or not all(map(_is_folder, inner)) or not _is_plain(target):
                raise OutputError(f"{path}: has no place in {root}, as what a change in place left has; remove {ready}")
        for path, target in moves:
            _move(path, target)
        # Moves reach the disk before the folder that would repeat them goes; another process may be removing it too.
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
        # Another process moved it first; but if it is still there, what is missing is the folder it goes to.
        if os.path.lexists(path):
            raise
    sync(target.parent)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        # Not `is_file`, which follows links: loratool puts none there.
        if stat.S_ISREG(path.lstat().st_mode):
            yield path


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _require_plain(path: Path) -> None:
    """Raises `OutputError` unless `path` is a writable plain file; a link's target may be in use elsewhere."""
    if path.is_symlink():
        raise OutputError(
            f"{path}: is a symbolic link, and what it points to may be in use elsewhere; write a copy with `out=`"
        )
    if not path.is_file():
        raise OutputError(f"{path}: is not a plain file")
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path}: is read-only; write a copy with `out=`")


def _share_extents(source: Path, target: Path) -> bool:
    """Makes a new file `target` that shares all blocks of `source`; False, and no file, where the file system cannot."""
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
            # A full or failing disk would fail a copy too; file systems refuse with many other numbers.
            if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
                raise
            return False
        else:
            return True
        finally:
            os.close(descriptor)
