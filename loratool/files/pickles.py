"""Reads old adapters saved as pickles: where the user allows it, by torch's restricted loader in a process of its own.

A pickle can run code, inflate to any size, or claim 2⁴⁰ elements in a kilobyte. So: torch's `weights_only`, a limit on
the child's memory and time, the zip's sizes checked before and the tensors' storage after, and safetensors between us.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from loratool.errors import InvalidFile
from loratool.files import pickle_child
from loratool.files.header import ADAPTER_HEADER_BYTES, Header, open_regular, read_header

SECONDS: Final = 60
"""The most time that reading a pickle may take."""
SPARE_BYTES: Final = 6 << 30
"""Address space for importing torch, and for copies of the tensors."""


@contextmanager
def open_pickle(path: Path) -> Iterator[Header]:
    """Gives the header of a temporary safetensors file with the tensors of the pickle at `path`; raises `InvalidFile`."""
    # No FIFO or device is handed to the child.
    os.close(open_regular(path))
    _require_zip(path)
    with tempfile.TemporaryDirectory(prefix="loratool-") as folder:
        converted = Path(folder, "converted.safetensors")
        _convert_in_child(path, converted)
        yield read_header(converted, ADAPTER_HEADER_BYTES)


def _require_zip(path: Path) -> None:
    """Raises `InvalidFile` for an archive that inflates: torch stores members as they are, never larger than the file."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise InvalidFile(f"{path}: a broken zip archive: {error}") from error
    if inflated > path.stat().st_size:
        raise InvalidFile(f"{path}: its members would inflate to {inflated} bytes; torch does not write such files")


def _convert_in_child(path: Path, converted: Path) -> None:
    # A fresh interpreter, not a fork: its limits are its own, and a crash there ends nothing here.
    limits = [str(SPARE_BYTES + 4 * path.stat().st_size), str(SECONDS)]
    # Isolated and elsewhere: `python -m`, or a path of imports that begins with the current folder, would run a torch.py
    # that lies beside a stranger's adapter.
    files = [os.path.abspath(path), os.path.abspath(converted)]
    command = [sys.executable, "-I", os.path.abspath(pickle_child.__file__), *files, *limits, *_package_folders()]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, cwd=converted.parent)
    except subprocess.TimeoutExpired as error:
        raise InvalidFile(f"{path}: reading this pickle took over {SECONDS} seconds") from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise InvalidFile(f"{path}: cannot be read as a pickle of tensors ({reason or f'exit {done.returncode}'})")


def _package_folders() -> list[str]:
    """The folders that this process has torch and safetensors from, which may be in nobody's default path."""
    found = [find_spec(name) for name in ("torch", "safetensors")]
    return list(dict.fromkeys(str(Path(spec.origin).parents[1].absolute()) for spec in found if spec and spec.origin))
