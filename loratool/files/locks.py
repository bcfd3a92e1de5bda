"""Locks that let one run at a time change a name in a folder: on a file beside it, and let go by the system however the run
ends.

What is locked is the entry of a folder, whatever path led there: a lock lies in that folder and is called by a hash of the
entry's name. A run that changes several files, as in a sharded checkpoint, has the lock of each, so that whoever names the
folder, its index, its pipeline or the file itself meets the same lock. Temporaries carry the hash of a lock in their names,
and are a dead run's only if that lock can be taken: no number of a process is asked, which means nothing in another
container, on another host, or after a restart.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import time
import unicodedata
from pathlib import Path
from typing import Final

from loratool.errors import OutputError

TEMPORARY: Final = re.compile(r"\.loratool-([0-9a-f]{16})-[0-9a-f]{8}\.tmp")
"""The names of temporaries, with the hash of the lock that the run that writes there has."""
LOCK_TRIES: Final = 5
"""How often a lock is asked for before it is another run's: who tidies up has it for a moment."""
PAUSE: Final = 0.02
"""Seconds between two tries."""
_CLOSE_ON_EXEC: Final[int] = getattr(os, "O_CLOEXEC", 0)
# Neither through a link, which could lead anywhere, nor waiting for somebody at the other end of a pipe.
_PLAIN: Final[int] = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | _CLOSE_ON_EXEC


def entry_hash(name: str) -> str:
    """The hash of an entry's name, which may itself be as long as the file system allows."""
    # File systems of macOS and Windows take names that differ in case, or in how an accent is encoded, for one.
    alike = unicodedata.normalize("NFC", name).casefold()
    return hashlib.blake2b(alike.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _path_of_lock(folder: Path, hashed: str) -> Path:
    """The file of the lock on the entry of `folder` whose name has this hash."""
    return folder / f".loratool-{hashed}.lock"


class Lock:
    """A lock on the entry `name` of `folder`, from `take` to `release`; `target` is what messages call it.

    Always free where the system or the file system has no flock.
    """

    def __init__(self, folder: Path, name: str, target: Path) -> None:
        self.target, self.hash = target, entry_hash(name)
        self.folder = folder
        self.path = _path_of_lock(folder, self.hash)
        self.descriptor: int | None = None

    def take(self) -> None:
        """Takes the lock; raises `OutputError` where another run has it."""
        for _ in range(LOCK_TRIES):
            descriptor = _open_lock(self.path)
            # Another run may have removed the file between the two steps: then this lock is on one that nobody else finds.
            if _try_lock(descriptor) is not False and _is_same(descriptor, self.path):
                self.descriptor = descriptor
                return
            os.close(descriptor)
            time.sleep(PAUSE)
        raise OutputError(f"{self.target}: another run is writing it; wait for that, or choose another name")

    def release(self) -> None:
        """Removes the lock file and lets others go on."""
        if self.descriptor is not None:
            # While it is still locked: afterwards the name could be another run's lock already.
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = None

    def temporary(self) -> Path:
        """A new name in the lock's folder, which nobody takes for a dead run's as long as this lock is held."""
        return self.folder / f".loratool-{self.hash}-{secrets.token_hex(4)}.tmp"


def take_dead_lock(folder: Path, hashed: str) -> int | None:
    """Takes the lock of this hash where no living run has it, and returns its descriptor for `drop_lock`; None where a run
    has it, or nobody can tell."""
    # Tidying up is a favour: files of other users may refuse it.
    try:
        descriptor = _open_lock(path := _path_of_lock(folder, hashed))
    except (OSError, OutputError):
        return None
    if _try_lock(descriptor) and _is_same(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def drop_lock(folder: Path, hashed: str, descriptor: int) -> None:
    """Removes the file of a lock that `take_dead_lock` took, and lets others go on."""
    with contextlib.suppress(OSError):
        _path_of_lock(folder, hashed).unlink(missing_ok=True)
    os.close(descriptor)


def _open_lock(path: Path) -> int:
    """Opens the file of a lock, which is made where it is not there."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _PLAIN, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise OutputError(f"{path}: is no plain file, where a lock is to be; remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutputError(f"{path}: is no plain file, where a lock is to be; remove it")
    return descriptor


def _try_lock(descriptor: int) -> bool | None:
    """Whether the open file is locked now; False where another has it, None where nobody can tell."""
    try:
        import fcntl
    except ImportError:
        return None
    # Not POSIX's own record locks: those never exclude a second run in the same process.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems have no locks.
        return None
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
