"""Paths as people write them. No torch."""

from __future__ import annotations

import os
from pathlib import Path


def path_of(written: str | Path) -> Path:
    """The path that was written, with ~ and ~USER as the shell has them: not for a file that is called so, nor where
    there is no such user."""
    path = Path(written)
    if not str(path).startswith("~") or os.path.lexists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError:
        return path
