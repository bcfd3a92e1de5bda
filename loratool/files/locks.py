"""Locks that let one run at a time write an output: on a file beside it, and let go by the system however the run ends."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Final

from loratool.errors import OutputError

LOCK: Final = re.compile(r"\.loratool-[0-9a-f]{16}\.lock")
"""The names of lock files."""


class Lock:
    """A lock on the output `target`, from `take` to `release`; always free where the system has no flock (Windows)."""

    def __init__(self, target: Path) -> None:
        self.target = target
        # A hash of the name, which may itself be as long as the file system allows.
        self.path = target.parent / f".loratool-{hashlib.blake2b(os.fsencode(target.name), digest_size=8).hexdigest()}.lock"
        self.descriptor: int | None = None

    def take(self) -> None:
        """Takes the lock; raises `OutputError` where another run has it."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
            if not _try_lock(descriptor):
                os.close(descriptor)
                raise OutputError(f"{self.target}: another run is writing it; wait for that, or choose another name")
            if _same(descriptor, self.path):
                self.descriptor = descriptor
                return
            # Another run removed the file between the two steps: this lock is on a file that nobody else will find.
            os.close(descriptor)

    def release(self) -> None:
        """Removes the lock file and lets others go on."""
        if self.descriptor is not None:
            # While it is still locked: afterwards the name could be another run's lock already.
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = None


def sweep_locks(folder: Path) -> None:
    """Removes the lock files in `folder` of runs that are gone, which are those that can be locked."""
    for entry in folder.iterdir():
        if not LOCK.fullmatch(entry.name) or entry.is_symlink():
            continue
        # Tidying up is a favour: files of other users may refuse it.
        with contextlib.suppress(OSError):
            descriptor = os.open(entry, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            try:
                if _try_lock(descriptor) and _same(descriptor, entry):
                    entry.unlink()
            finally:
                os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    # Not POSIX's own record locks: those never exclude a second run in the same process.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems have no locks.
        return True
    return True


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
