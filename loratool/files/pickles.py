"""Reads old adapters saved as pickles: where the user allows it, by torch's restricted loader in a process of its own.

A pickle can run code, inflate to any size, or claim 2⁴⁰ elements in a kilobyte. So: torch's `weights_only`, a limit on
the child's memory and time, the zip's sizes checked before and the tensors' storage after, and safetensors between us.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loratool.errors import InvalidFile
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
    command = [sys.executable, "-m", "loratool.files.pickles", os.fspath(path), os.fspath(converted)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise InvalidFile(f"{path}: reading this pickle took over {SECONDS} seconds") from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise InvalidFile(f"{path}: cannot be read as a pickle of tensors ({reason or f'exit {done.returncode}'})")


def convert(source: str, target: str) -> None:
    """Turns a pickle into a safetensors file, in the child; exits with a one-line reason where the pickle is not tensors."""
    # Limits before torch is imported and the pickle opened.
    size = os.stat(source).st_size
    limit = SPARE_BYTES + 4 * size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    import torch
    from safetensors.torch import save_file

    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile pickle provokes ends here, in the child
        sys.exit(f"{type(error).__name__}; torch's restricted loader refuses it")
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        sys.exit("it does not hold a dictionary of tensors")
    # An expanded tensor claims elements that it does not store, and would be written out in full.
    if sum(tensor.numel() * tensor.element_size() for tensor in loaded.values()) > size:
        sys.exit("its tensors claim more bytes than the file has")
    save_file({str(name): tensor.contiguous() for name, tensor in loaded.items()}, target)


if __name__ == "__main__":
    convert(*sys.argv[1:])
