"""Outputs that appear complete or not at all: written beside their target, synced, renamed, tidied up on any error."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Protocol, Self

from loratool.errors import InvalidFile, OutputError, first_few
from loratool.files.locks import TEMPORARY, Lock
from loratool.files.transaction import Step, Transaction, remove, step_to, sweep, sync
from loratool.files.walk import foreign_files, restrict_mode

LINKS_OUT: Final = (
    "is a link that leads out of the folder, whose maker may not be whom the file belongs to; name the file itself, or copy "
    "the folder with `cp -rL`"
)
"""What to do about weights that lie elsewhere."""


class Input(Protocol):
    """What an output is made of: a file, or several, that must not have changed when the output takes its place."""

    @property
    def path(self) -> Path:
        """The path that the user named, of a file or of the folder with all files."""
        ...

    @property
    def read_files(self) -> Sequence[Path]:
        """The files that were read."""
        ...

    def require_unchanged(self) -> None:
        """Raises `InvalidFile` where one of the files was replaced or written to."""
        ...

    def links_out(self) -> Sequence[Path]:
        """The files that links lead to from the folder that was named, out of that folder."""
        ...


def require_target(
    target: Path, *, folder: bool, overwrite: bool, inputs: Iterable[Input | Path], written: Collection[str] = ()
) -> None:
    """Raises `OutputError` where `target` cannot or must not be written, before any work is done for it.

    `inputs` are what it is made of, or the paths of that, and `written` the files of the folder that is to be written.
    """
    try:
        _require_target(target, folder=folder, overwrite=overwrite, inputs=inputs, written=written)
    # Python raises ValueError for names that no file can have: with a NUL byte, or that cannot be encoded.
    except (OSError, ValueError) as error:
        raise OutputError(f"{target}: {getattr(error, 'strerror', None) or error}") from error


class Destination(ABC):
    """An output on its way: write below `temporary`; `commit` puts that in place, and leaving without `commit` removes it.

    `place` is the file or the folder that the output becomes, `inputs` are what the output is made of, and `in_place` says
    that the output is the input itself, of which only what changes is written.
    """

    in_place: ClassVar[bool]

    def __init__(self, place: Path, inputs: Iterable[Input], *, folder: bool, beside: Path, name: str) -> None:
        self.place, self.inputs, self.folder = place, tuple(inputs), folder
        for each in self.inputs:
            for path in each.links_out():
                raise InvalidFile(f"{path}: {LINKS_OUT}")
        # What a killed run left there may be an input by now, under the name that it still has.
        read = (part for each in self.inputs for path in each.read_files for part in path.parts)
        sweep(beside, {found[1] for part in read if (found := TEMPORARY.fullmatch(part))})
        self._lock = Lock(beside, name, place)
        self.temporary = self._lock.temporary()
        self._locks = ExitStack()
        self._pending = False

    def __enter__(self) -> Self:
        try:
            for lock in (self._lock, *(Lock(path.parent, path.name, path) for path in self._changed_files())):
                lock.take()
                self._locks.callback(lock.release)
            if self.folder:
                self.temporary.mkdir()
            self._prepare()
        # Python leaves only what was entered: a failure here has to tidy up by itself, an interruption too.
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # What a journal names is needed by the run that will finish the change.
        if not self._pending:
            remove(self.temporary)
        self._locks.close()
        if isinstance(error, OSError):
            raise OutputError(f"{self.place}: {error.strerror or error}") from error

    def path(self, relative: str) -> Path:
        """The path to write the output's file `relative` to, or the whole output where that is one file ("")."""
        path = self.temporary / relative if relative else self.temporary
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def scratch(self) -> Path:
        """Another name beside the output for files that the run needs and removes, or that a later one sweeps away."""
        return self._lock.temporary()

    def commit(self) -> None:
        """Syncs everything written and puts it in its place; until then the older output is there, whole.

        Raises `InvalidFile` where an input was changed since it was read, and `OutputError` where the disk refuses.
        """
        commit_together([self])

    def settle(self) -> None:
        """Grants what is granted for all inputs, and waits until all that was written is on the disk."""
        sources = [path for each in self.inputs for path in each.read_files]
        # Bytes before names: file systems may put a rename on the disk before the data of the renamed file.
        for path in (self.temporary, *self.temporary.rglob("*")):
            if not self.in_place:
                restrict_mode(path, sources)
            sync(path)

    @property
    def goal(self) -> Path:
        """The name that `temporary` takes."""
        return self.place

    def step(self) -> Step:
        """The step that puts what is below `temporary` in its place."""
        return step_to(self.temporary, self.goal, self.scratch())

    def keep_pending(self) -> None:
        """Leaves what was written to the run that will finish the change."""
        self._pending = True

    @abstractmethod
    def _changed_files(self) -> Iterable[Path]:
        """The files, beside the place itself, that the output replaces."""

    @abstractmethod
    def _prepare(self) -> None:
        """Makes what has to be there before anything is written."""

    @abstractmethod
    def complete(self) -> None:
        """Does what is left once the output is in its place."""


def commit_together(outputs: Sequence[Destination]) -> None:
    """Puts several outputs in their places together or not at all; raises as `Destination.commit`."""
    # Inputs first: what was computed from a file that changed meanwhile must never appear.
    for output in outputs:
        for each in output.inputs:
            each.require_unchanged()
    try:
        for output in outputs:
            output.settle()
        # What is new before what is replaced: until the last step there is nothing that only seems to belong together.
        ordered = sorted(outputs, key=lambda output: os.path.lexists(output.goal))
        change = Transaction([output.step() for output in ordered])
        try:
            change.run()
        finally:
            if change.is_pending:
                for output in outputs:
                    output.keep_pending()
        for output in outputs:
            output.complete()
    except OSError as error:
        raise OutputError(f"{outputs[-1].place}: {error.strerror}") from error


class NewOutput(Destination):
    """A new file or folder, or one that replaces an older one, or with `itself` the very input that it is made of.

    Raises `OutputError` at once where `target` cannot or must not be written, or the disk has not `nbytes` free. `written`
    are the files of a folder that is to be written.
    """

    in_place: ClassVar[bool] = False

    def __init__(
        self,
        target: Path,
        *,
        folder: bool,
        overwrite: bool,
        nbytes: int,
        inputs: Iterable[Input],
        written: Collection[str] = (),
        itself: Input | None = None,
    ) -> None:
        inputs = tuple(inputs)
        # Before the sweep, which lists the parent and so relies on its being there.
        require_target(target, folder=folder, overwrite=overwrite, inputs=inputs, written=written)
        everything = (*inputs, itself) if itself else inputs
        super().__init__(target, everything, folder=folder, beside=target.parent, name=target.name)
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise OutputError(f"{target}: needs {nbytes} bytes, the disk has {free} free")

    def _changed_files(self) -> Iterable[Path]:
        """The weights in an old folder, which another run may be changing in place."""
        return sorted(self.place.rglob("*.safetensors")) if self.folder and self.place.is_dir() else []

    def _prepare(self) -> None:
        pass

    def complete(self) -> None:
        """Nothing is left to be done."""


def _require_target(
    target: Path, *, folder: bool, overwrite: bool, inputs: Iterable[Input | Path], written: Collection[str]
) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the folder {target.parent} does not exist")
    # Inputs before `overwrite`: passing that would not help where the target is an input.
    for each in inputs:
        root, read = (each, ()) if isinstance(each, Path) else (each.path, each.read_files)
        for path in (root, *read):
            _require_apart(target, path, root, folder=folder)
    # `exists` would follow a dangling link and find nothing in the way.
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputError(f"{target}: exists; pass `overwrite=True` to replace it")
    _require_replaceable(target, folder=folder, written=written)


def _require_replaceable(target: Path, *, folder: bool, written: Collection[str]) -> None:
    """Raises `OutputError` where what is at `target` is not of the sort that is to be written, or holds anything beside."""
    if target.is_symlink() or not (target.is_dir() if folder else target.is_file()):
        raise OutputError(f"{target}: exists and is not a plain {'folder' if folder else 'file'}; choose another name")
    if not os.access(target, os.W_OK):
        raise OutputError(f"{target}: is read-only")
    if folder and (foreign := foreign_files(target, written)):
        raise OutputError(
            f"{target}: `overwrite=True` would delete {first_few(foreign)}, which belongs to no model; move that away, or "
            "choose another name"
        )


def _require_apart(target: Path, path: Path, root: Path, *, folder: bool) -> None:
    """Raises `OutputError` where writing `target` would replace the input at `path`, by whatever name either goes, or
    another file in the folder `root` of that input."""
    if not path.exists():
        return
    # By device and inode: two names, hard links and letters of either case can be one file.
    if target.exists() and os.path.samefile(target, path):
        raise OutputError(f"{target}: is an input of this very run; choose another name")
    if folder and target.resolve() in path.resolve().parents:
        raise OutputError(f"{target}: holds the input {path}; choose another name")
    if os.path.lexists(target) and root.is_dir() and root.resolve() in target.parent.resolve().joinpath("x").parents:
        raise OutputError(f"{target}: lies in the input {root}; choose another name")
