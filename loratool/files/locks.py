"""One run at a time writes an output: a lock on a file beside it, which the system lets go of however the run ends."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Final

from loratool.errors import OutputError

LOCK: Final = re.compile(r"\.loratool-[0-9a-f]{16}\.lock")


class Lock:
    """A lock on the output `target`, from `take` to `release`. Where the system has no locks (Windows) it is always free."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.parent / f".loratool-{hashlib.blake2b(os.fsencode(target.name), digest_size=8).hexdigest()}.lock"
        self.descriptor: int | None = None

    def take(self) -> None:
        """Raises `OutputError` where another run has it."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
            if not _try_lock(descriptor):
                os.close(descriptor)
                raise OutputError(f"{self.target}: another run is writing it; wait for that, or choose another name")
            if _same(descriptor, self.path):
                self.descriptor = descriptor
                return
            # It was released, and its file removed, between the two steps.
            os.close(descriptor)

    def release(self) -> None:
        """Removes the file and lets others go on."""
        if self.descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = None


def sweep_locks(folder: Path) -> None:
    """Removes the lock files of runs that are gone."""
    for entry in folder.iterdir():
        if not LOCK.fullmatch(entry.name) or entry.is_symlink():
            continue
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
