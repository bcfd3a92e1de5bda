"""Hashes: every one that people know a file by, in one read; and the two that kohya writes into an adapter. No torch.

AutoV1 is A1111's old hash, of 64 KiB from the first MiB on; AutoV2 the file's SHA-256, of which Civitai shows ten letters;
AutoV3 that of what follows the header, of which twelve are shown. sshs_model_hash and sshs_legacy_hash are AutoV3 and AutoV1
of the file as `safetensors.torch.save` would write it with the training's metadata alone (sd-scripts,
library/train_util.py, precalculate_safetensors_hashes).
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from loratool.errors import InvalidFile
from loratool.files.adapter_files import AdapterFile
from loratool.files.header import Header, TensorInfo, encode_header, identity, open_regular, read_header, stored_order

LEGACY_START: Final = 0x100000
"""Where AutoV1 begins in a file."""
LEGACY_BYTES: Final = 0x10000
"""How many bytes AutoV1 covers."""
LETTERS: Final = 12
"""How many letters of AutoV3 are shown, which are enough to find a file by."""
_BLOCK: Final = 8 << 20
HASH_LENGTHS: Final[Mapping[str, int]] = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}
"""kohya's metadata keys of its two hashes, and how many letters their values have."""


def short_hash(file: AdapterFile) -> str | None:
    """The first letters of an adapter's AutoV3, by which an output's history names the adapter; None for a pickle."""
    if file.is_pickle:
        return None
    return _data_hash(file.weights, file.header.data_start, file.identity)[:LETTERS]


@lru_cache(maxsize=64)
def _data_hash(path: Path, start: int, who: tuple[int, ...]) -> str:
    # The cache knows a file by its identity too, so that one that was changed is read again.
    descriptor = open_regular(path)
    try:
        digest = hashlib.sha256()
        for block in _blocks(descriptor, start):
            digest.update(block)
        if identity(descriptor) != who:
            raise InvalidFile(f"{path}: was changed while it was read")
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def hashes(infos: Mapping[str, TensorInfo], parts: Sequence[memoryview], metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's two hashes of the tensors `infos`, in the order of the file, whose bytes are `parts`."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    legacy, position = hashlib.sha256(), 0
    for part in (memoryview(_training_header(infos, metadata)), *parts):
        begin = max(0, LEGACY_START - position)
        legacy.update(part[begin : max(begin, LEGACY_START + LEGACY_BYTES - position)])
        position += len(part)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}


def legacy_hash(header: Header, metadata: Mapping[str, str]) -> str:
    """The sshs_legacy_hash that the file would have with other metadata; no more of the file is read than that takes."""
    descriptor = open_regular(header.path)
    try:
        return _legacy_of(descriptor, _canonical(header), metadata)
    finally:
        os.close(descriptor)


def header_or_none(file: Path) -> Header | None:
    """The header of a safetensors file; None for any other file, since a damaged download has hashes too."""
    try:
        return read_header(file)
    except InvalidFile:
        return None


def digest_file(descriptor: int, header: Header | None) -> dict[str, str]:
    """The hashes of an open file, read once: each on a thread of its own, all of one block before the next is read."""
    whole, data = hashlib.sha256(), hashlib.sha256()
    crc, modern = [0], _blake3()
    start, position = (header.data_start if header else 0), 0

    def add_crc(block: bytes) -> None:
        crc[0] = zlib.crc32(block, crc[0])

    # Threads gain time, since hashlib and zlib let go of Python's lock while they compute.
    works: list[Callable[[bytes], object]] = [whole.update, add_crc, *([modern.update] if modern else [])]
    with ThreadPoolExecutor(len(works) + 1) as pool:
        for block in _blocks(descriptor, 0):
            behind = memoryview(block)[max(0, start - position) :]
            running = [pool.submit(work, block) for work in works] + [pool.submit(data.update, behind)]
            # A hash must get its blocks in order, and no more than one block is to be in memory.
            for future in running:
                future.result()
            position += len(block)
    found = {"sha256": whole.hexdigest(), "autov3": data.hexdigest(), "crc32": f"{crc[0]:08x}"}
    return found | ({"blake3": modern.hexdigest()} if modern else {})


def _blocks(descriptor: int, start: int) -> Iterator[bytes]:
    while block := os.pread(descriptor, _BLOCK, start):
        yield block
        start += len(block)


def _blake3() -> Any:
    if find_spec("blake3") is None:
        return None
    from blake3 import blake3

    return blake3()


def kohya_hashes(descriptor: int, header: Header, autov3: str) -> dict[str, str]:
    """kohya's hashes of an open file whose AutoV3 is known; tensors are hashed in safetensors' order."""
    # In that order already, the bytes behind the header are what AutoV3 is of.
    ordered = _canonical(header)
    if list(ordered) != list(header.tensors):
        digest = hashlib.sha256()
        for info in ordered.values():
            for start in range(info.start, info.stop, _BLOCK):
                digest.update(os.pread(descriptor, min(_BLOCK, info.stop - start), start))
        autov3 = digest.hexdigest()
    return {"sshs_model_hash": autov3, "sshs_legacy_hash": _legacy_of(descriptor, ordered, header.metadata)}


def _legacy_of(descriptor: int, ordered: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str:
    # The file as kohya would write it, of which only what lies in AutoV1's range is read.
    moved, position = {}, 0
    for name, info in ordered.items():
        moved[name] = TensorInfo(name, info.dtype, info.shape, position, position + info.nbytes)
        position += info.nbytes
    raw = _training_header(moved, metadata)
    legacy = hashlib.sha256(raw[LEGACY_START : LEGACY_START + LEGACY_BYTES])
    for name, info in moved.items():
        begin = max(0, LEGACY_START - len(raw) - info.start)
        end = min(info.nbytes, LEGACY_START + LEGACY_BYTES - len(raw) - info.start)
        if begin < end:
            legacy.update(os.pread(descriptor, end - begin, ordered[name].start + begin))
    return legacy.hexdigest()[:8]


def _canonical(header: Header) -> dict[str, TensorInfo]:
    """The tensors of a header in the order in which safetensors writes them."""
    return dict(sorted(header.tensors.items(), key=lambda item: stored_order(item[1].dtype, item[0])))


def _training_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    # kohya hashes the file with the keys of its training alone, and with an empty map where it has none.
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    return encode_header(infos, training, always=True)
