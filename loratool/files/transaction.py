"""Several new files or folders that take their places together or not at all, whatever stops the run in between.

Each new one lies beside its place, whole and synced, under a temporary name. Where one call of the system cannot put them
all in place, a journal is written first that names them: from then on the change is decided. A run that fails takes back
what it did; of one that is killed, the next run that writes there finishes the rest, and whoever reads before that reads
the new one where it lies (`decided_path`). An old file or folder is exchanged with the new one in one step where the
system can, and steps aside where it cannot.

A journal lies beside the last of the places. Beside each other place lies a note that says where the journal is. Either may
come from a stranger, as part of a folder: nothing is moved between folders, only between a temporary's name and its
place's, and in another folder only where the note there names the journal.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from loratool.errors import OutputError
from loratool.files.locks import TEMPORARY, drop_lock, entry_hash, take_dead_lock

JOURNAL: Final = re.compile(r"\.loratool-([0-9a-f]{16})\.journal")
"""The names of journals, with the hash of the lock that their run has."""
_MOST_BYTES: Final = 1 << 20
"""A journal has a few lines: what is larger is none."""
_EXCHANGE: Final = 2
"""Linux's flag that has two names trade places (RENAME_EXCHANGE, include/uapi/linux/fs.h)."""
_HERE: Final = -100
"""Linux's descriptor of the current folder (AT_FDCWD, include/uapi/linux/fcntl.h)."""
CANNOT: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY})
"""The numbers by which file systems say that they have no such call."""


def _find_renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """Linux's renameat2(2), which Python's os module lacks; None on other systems."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return cast("Callable[[int, bytes, int, bytes, int], int]", function)


_renameat2: Final = _find_renameat2()


def exchange(one: Path, other: Path) -> bool:
    """Has two names trade places in one step; False where the system cannot. Raises `OSError`."""
    if _renameat2 is None:
        return False
    if _renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one))


def sync(path: Path) -> None:
    """Waits until what was written to the file or folder at `path` is on the disk; warns where the file system cannot."""
    # A folder can be opened for reading only, and Linux syncs either through such a descriptor.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Mounts of object stores answer so: the output is right, and only a power cut might take it.
        if error.errno not in CANNOT:
            raise
        logging.getLogger("loratool").warning(
            "%s: the file system cannot sync (%s), so a power cut soon after this run may lose the output",
            path.parent,
            error.strerror,
        )
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes the file or folder at `path`, if there is one; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Step:
    """A new file or folder, `temporary`, that takes its `place` in the same folder; `inode` tells where it is by now. The
    old one goes to `temporary`, or to `aside` where two names cannot trade places."""

    temporary: Path
    place: Path
    aside: Path
    inode: int

    @property
    def is_done(self) -> bool:
        return _inode(self.place) == self.inode

    @property
    def is_possible(self) -> bool:
        return _inode(self.temporary) == self.inode

    @property
    def is_single(self) -> bool:
        """Whether one call of any system does the step."""
        return not os.path.lexists(self.place) or self.temporary.is_file()

    def do(self, *, keep: bool) -> None:
        """Puts the new one in its place; where `keep`, so that the old one can be put back."""
        old = os.path.lexists(self.place)
        if not old or (self.temporary.is_file() and not keep):
            os.replace(self.temporary, self.place)
        elif not exchange(self.temporary, self.place):
            os.rename(self.place, self.aside)
            os.rename(self.temporary, self.place)
        sync(self.place.parent)

    def take_back(self) -> None:
        """Puts what was there back, if the step was done or half done; what is new goes to `temporary` again."""
        if self.is_done:
            if _inode(self.temporary) is not None:
                exchange(self.temporary, self.place)
            else:
                os.rename(self.place, self.temporary)
        if _inode(self.place) is None and _inode(self.aside) is not None:
            os.rename(self.aside, self.place)
        sync(self.place.parent)


def step_to(temporary: Path, place: Path, aside: Path) -> Step:
    """The step of a new file or folder that is there, under its temporary name."""
    return Step(temporary, place, aside, temporary.lstat().st_ino)


class Transaction:
    """The steps of one change, in order; the journal is that of the last one's place."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.journals = tuple(dict.fromkeys(_journal_of(step.place) for step in steps[::-1]))

    def run(self) -> None:
        """Does all steps, or none: raises what stopped it once everything is as it was. What cannot be taken back stays in
        the journal, and the next run that writes there finishes it."""
        if len(self.steps) == 1 and self.steps[0].is_single:
            self.steps[0].do(keep=False)
            return
        try:
            self._write_journals()
            for step in self.steps:
                step.do(keep=True)
            self._remove_journals()
        # An interruption too: half of a change is worse than none.
        except BaseException:
            for step in reversed(self.steps):
                step.take_back()
            self._remove_journals()
            raise

    @property
    def is_pending(self) -> bool:
        """Whether the change is decided and not done: its temporaries are needed by whoever finishes it."""
        return os.path.lexists(self.journals[0])

    def finish(self) -> None:
        """Does the steps that a killed run left; a change of which something is gone is given up."""
        if all(step.is_done or step.is_possible for step in self.steps):
            for step in self.steps:
                if not step.is_done:
                    step.do(keep=True)
        self._remove_journals()

    def _write_journals(self) -> None:
        main, *notes = self.journals
        # Notes first: without its journal a note means nothing.
        for note in notes:
            _write_json(note, {"of": os.path.relpath(os.path.realpath(main), os.path.realpath(note.parent))})
        folder = os.path.realpath(main.parent)
        rows: list[list[str | int]] = []
        for step in self.steps:
            where = os.path.relpath(os.path.realpath(step.place.parent), folder)
            rows.append([where, step.temporary.name, step.place.name, step.aside.name, step.inode])
        _write_json(main, {"steps": rows})

    def _remove_journals(self) -> None:
        # The journal first: while it is there, the change goes on.
        for path in self.journals:
            if os.path.lexists(path):
                path.unlink()
                sync(path.parent)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a journal or a note, wholly or not at all."""
    found = JOURNAL.fullmatch(path.name)
    assert found
    beside = path.with_name(f".loratool-{found[1]}-{os.urandom(4).hex()}.tmp")
    try:
        beside.write_text(json.dumps(document))
        sync(beside)
        os.rename(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _journal_of(place: Path) -> Path:
    return place.parent / f".loratool-{entry_hash(place.name)}.journal"


def _read_json(path: Path) -> dict[str, Any]:
    """A journal or a note; empty for what is neither."""
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and not path.is_symlink() and path.stat().st_size < _MOST_BYTES:
            document = json.loads(path.read_bytes())
            return document if isinstance(document, dict) else {}
    return {}


def _read_transaction(path: Path) -> Transaction | None:
    """The change that the journal, or the note, at `path` is of; None where there is none, or none that may be finished."""
    document = _read_json(path)
    if isinstance(document.get("of"), str):
        path = Path(os.path.normpath(path.parent / document["of"]))
        document = _read_json(path) if JOURNAL.fullmatch(path.name) else {}
    rows = document.get("steps")
    if not isinstance(rows, list) or not 0 < len(rows) < 8:
        return None
    steps = [step for row in rows if (step := _read_step(path, row))]
    return Transaction(steps) if len(steps) == len(rows) and _journal_of(steps[-1].place).name == path.name else None


def _read_step(journal: Path, row: object) -> Step | None:
    """A row of a journal, whose every word may be a stranger's."""
    if not isinstance(row, list) or len(row) != 5 or not all(isinstance(word, str) for word in row[:4]):
        return None
    where, temporary, place, aside, inode = row
    plain = TEMPORARY.fullmatch(temporary) and TEMPORARY.fullmatch(aside) and Path(place).name == place
    if not plain or type(inode) is not int or "\0" in where + place:
        return None
    folder = journal.parent if where == "." else Path(os.path.normpath(journal.parent / where))
    step = Step(folder / temporary, folder / place, folder / aside, inode)
    note = _journal_of(step.place)
    if note.name == journal.name and folder == journal.parent:
        return step
    # Of another place, only where the note there agrees.
    said = _read_json(note).get("of")
    agrees = isinstance(said, str) and os.path.realpath(folder / said) == os.path.realpath(journal)
    return step if agrees else None


def decided_path(path: Path) -> Path:
    """Where the file or folder at `path` lies: elsewhere only while a change is decided that a killed run did not finish."""
    found = _read_transaction(_journal_of(path)) if path.name else None
    for step in found.steps if found else ():
        same = step.place.name == path.name and os.path.realpath(step.place.parent) == os.path.realpath(path.parent)
        if same and not step.is_done and step.is_possible:
            return step.temporary
    return path


def sweep(folder: Path, spared: Container[str] = ()) -> None:
    """Finishes in `folder` the changes of runs that were killed, and removes their locks and temporaries. Those of a run
    that lives stay, and so do all of which nobody can tell, and those of the hashes `spared`."""
    for hashed in sorted({found for found in _hashes(folder) if found not in spared}):
        lock = take_dead_lock(folder, hashed)
        if lock is None:
            continue
        try:
            if _finish(folder, hashed):
                for entry in folder.iterdir():
                    found = TEMPORARY.fullmatch(entry.name)
                    if found and found[1] == hashed:
                        remove(entry)
        finally:
            drop_lock(folder, hashed, lock)


def _hashes(folder: Path) -> Iterator[str]:
    """The hashes of whatever a dead run may have left in a folder."""
    patterns = (re.compile(r"\.loratool-([0-9a-f]{16})\.lock"), TEMPORARY, JOURNAL)
    for entry in folder.iterdir():
        for pattern in patterns:
            if found := pattern.fullmatch(entry.name):
                yield found[1]


def _finish(folder: Path, hashed: str) -> bool:
    """Finishes the change whose journal or note has this hash, if any; False where a living run has it."""
    path = folder / f".loratool-{hashed}.journal"
    if not os.path.lexists(path):
        return True
    found = _read_transaction(path)
    main = found.journals[0] if found else path
    if found is None:
        # A note without its journal, or nothing of ours.
        if "of" in _read_json(path):
            path.unlink()
        return True
    apart = os.path.realpath(main) != os.path.realpath(path)
    lock, name = None, JOURNAL.fullmatch(main.name)
    if apart and name and (lock := take_dead_lock(main.parent, name[1])) is None:
        return False
    try:
        found.finish()
    except OSError as error:
        raise OutputError(
            f"{main}: a run was stopped that writes {', '.join(step.place.name for step in found.steps)}, and cannot be "
            f"finished: {error.strerror}"
        ) from error
    finally:
        if lock is not None and name:
            drop_lock(main.parent, name[1], lock)
    return True
