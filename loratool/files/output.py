"""Outputs that appear complete or not at all: written beside their target, synced, renamed, tidied up on any error."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Protocol, Self

from loratool.errors import OutputError
from loratool.files.locks import Lock, sweep_locks

TEMPORARY: Final = re.compile(r"\.loratool-(\d+)-[0-9a-f]{8}\.tmp")
"""The names that `temporary_in` gives, with the number of the process that writes there."""


def require_target(target: Path, *, folder: bool, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Raises `OutputError` where `target` cannot or must not be written, before any work is done for it."""
    try:
        _require_target(target, folder=folder, overwrite=overwrite, inputs=inputs)
    # Python raises ValueError for names that no file can have: with a NUL byte, or that cannot be encoded.
    except (OSError, ValueError) as error:
        raise OutputError(f"{target}: {getattr(error, 'strerror', None) or error}") from error


def temporary_in(folder: Path) -> Path:
    """A new name in `folder`, with this process's number, so that a later run sweeps the file away if this run dies."""
    return folder / f".loratool-{os.getpid()}-{secrets.token_hex(4)}.tmp"


class Input(Protocol):
    """What an output is made of: a file, or several, that must not have changed when the output takes its place."""

    @property
    def path(self) -> Path:
        """The path that the user named."""
        ...

    def require_unchanged(self) -> None:
        """Raises `InvalidFile` where one of the files was replaced or written to."""
        ...


class Destination(ABC):
    """An output on its way: write below `temporary`; `commit` puts that in place, and leaving without `commit` removes it.

    `place` is the file or the folder that the output becomes, `inputs` are what the output is made of, and `in_place` says
    that the output is the input itself, of which only what changes is written.
    """

    in_place: ClassVar[bool]

    def __init__(self, place: Path, inputs: Iterable[Input], *, folder: bool, beside: Path) -> None:
        self.place, self.inputs, self.folder = place, tuple(inputs), folder
        sweep(beside)
        self.temporary = temporary_in(beside)
        self._lock = Lock(place)

    def __enter__(self) -> Self:
        try:
            self._lock.take()
            if self.folder:
                self.temporary.mkdir()
            self._prepare()
        # Python leaves only what was entered: a failure here has to tidy up by itself, an interruption too.
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        remove(self.temporary)
        self._lock.release()
        if isinstance(error, OSError):
            raise OutputError(f"{self.place}: {error.strerror or error}") from error

    def path(self, relative: str) -> Path:
        """The path to write the output's file `relative` to, or the whole output where that is one file ("")."""
        path = self.temporary / relative if relative else self.temporary
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self) -> None:
        """Syncs everything written and puts it in its place; until then the older output is there, whole.

        Raises `InvalidFile` where an input was changed since it was read, and `OutputError` where the disk refuses.
        """
        # Inputs first: what was computed from a file that changed meanwhile must never appear.
        for each in self.inputs:
            each.require_unchanged()
        try:
            # Bytes before names: file systems may put a rename on the disk before the data of the renamed file.
            for path in (self.temporary, *self.temporary.rglob("*")):
                sync(path)
            self._take_place()
        except OSError as error:
            raise OutputError(f"{self.place}: {error.strerror}") from error

    @abstractmethod
    def _prepare(self) -> None:
        """Makes what has to be there before anything is written."""

    @abstractmethod
    def _take_place(self) -> None:
        """Moves what is below `temporary` to `place`, and syncs the folder that holds the name."""


class NewOutput(Destination):
    """A new file or folder, or one that replaces an older one.

    Raises `OutputError` at once where `target` cannot or must not be written, or the disk has not `nbytes` free.
    """

    in_place: ClassVar[bool] = False

    def __init__(self, target: Path, *, folder: bool, overwrite: bool, nbytes: int, inputs: Iterable[Input]) -> None:
        inputs = tuple(inputs)
        # Before the sweep, which lists the parent and so relies on its being there.
        require_target(target, folder=folder, overwrite=overwrite, inputs=[each.path for each in inputs])
        super().__init__(target, inputs, folder=folder, beside=target.parent)
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise OutputError(f"{target}: needs {nbytes} bytes, the disk has {free} free")

    def _prepare(self) -> None:
        pass

    def _take_place(self) -> None:
        self._rename()
        # By POSIX a new name outlives a crash only once the folder that holds it is synced.
        sync(self.place.parent)

    def _rename(self) -> None:
        if not self.folder:
            os.replace(self.temporary, self.place)
            return
        if not self.place.exists():
            os.rename(self.temporary, self.place)
            return
        # POSIX replaces only an empty folder in one step: the old one steps aside, and back should the rename fail.
        # Its name there is one that no sweep takes, so that even a crash between the two renames loses nothing.
        aside = self.place.with_name(f"{self.place.name}.old-{secrets.token_hex(4)}")
        os.rename(self.place, aside)
        try:
            os.rename(self.temporary, self.place)
        except OSError:
            os.rename(aside, self.place)
            raise
        remove(aside)


def _require_target(target: Path, *, folder: bool, overwrite: bool, inputs: Iterable[Path]) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the folder {target.parent} does not exist")
    # Inputs before `overwrite`: passing that would not help where the target is an input.
    for path in inputs:
        _require_apart(target, path, folder=folder)
    # `exists` would follow a dangling link and find nothing in the way.
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputError(f"{target}: exists; pass `overwrite=True` to replace it")
    if target.is_symlink() or not (target.is_dir() if folder else target.is_file()):
        raise OutputError(f"{target}: exists and is not a plain {'folder' if folder else 'file'}; choose another name")
    if folder and not _holds_a_model(target):
        raise OutputError(f"{target}: holds files but no model; `overwrite=True` would delete them, so choose another name")
    if not os.access(target, os.W_OK):
        raise OutputError(f"{target}: is read-only")


def _require_apart(target: Path, path: Path, *, folder: bool) -> None:
    """Raises `OutputError` where writing `target` would replace the input at `path`, by whatever name either goes."""
    # By device and inode: two names, hard links and letters of either case can be one file.
    if target.exists() and path.exists() and os.path.samefile(target, path):
        raise OutputError(f"{target}: is an input of this very run; choose another name")
    if folder and path.exists() and target.resolve() in path.resolve().parents:
        raise OutputError(f"{target}: holds the input {path}; choose another name")


def _holds_a_model(folder: Path) -> bool:
    """Whether `folder` may be deleted: empty, or with files such as loratool or save_pretrained write."""
    names = [entry.name for entry in folder.iterdir()]
    return not names or any(name in ("config.json", "model_index.json") or name.endswith(".safetensors") for name in names)


def sweep(parent: Path) -> None:
    """Removes the locks and temporaries in `parent` of runs that were killed; those of a living process stay."""
    sweep_locks(parent)
    for entry in parent.iterdir():
        found = TEMPORARY.fullmatch(entry.name)
        if found and not _alive(int(found[1])):
            remove(entry)


def _alive(pid: int) -> bool:
    # By POSIX signal 0 is never sent, and only tells whether it could be.
    try:
        os.kill(pid, 0)
    # No process has a number that is too large for one.
    except (ProcessLookupError, OverflowError):
        return False
    # EPERM: there is such a process, of another user.
    except OSError:
        return True
    return True


def remove(path: Path) -> None:
    """Removes the file or folder at `path`, if there is one; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until what was written to the file or folder at `path` is on the disk."""
    # A folder can be opened for reading only, and Linux syncs either through such a descriptor.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
