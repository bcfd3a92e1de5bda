"""`hash`: every hash that people know a file by, and whether what it says of itself is true. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratool.errors import InvalidFile
from loratool.files.adapter_files import locate
from loratool.files.hashes import LEGACY_BYTES, LEGACY_START, LETTERS, digest_file, header_or_none, kohya_hashes
from loratool.files.header import Header, identity, open_regular

CLAIMS: Final[Mapping[str, tuple[str, str]]] = {
    "sshs_model_hash": ("sshs_model_hash", ""),
    "sshs_legacy_hash": ("sshs_legacy_hash", ""),
    "modelspec.hash_sha256": ("autov3", "0x"),
}
"""What a file may say of its own hashes: which hash it is, and what stands before it."""


@dataclass(frozen=True, slots=True)
class Hashes:
    """The hashes of one file, in hexadecimal. `autov3` and kohya's are None of what is no safetensors file, and `blake3`
    without its library. `claims` maps what the file says of its own hashes to whether that is true."""

    path: str
    size: int
    autov1: str
    autov2: str
    autov3: str | None
    sha256: str
    blake3: str | None
    crc32: str
    sshs_model_hash: str | None
    sshs_legacy_hash: str | None
    claims: Mapping[str, bool]

    @property
    def letters(self) -> str | None:
        """AutoV3 as it is shown."""
        return self.autov3[:LETTERS].upper() if self.autov3 else None

    @property
    def true(self) -> bool:
        """Whether nothing that the file says of its hashes is wrong."""
        return all(self.claims.values())


def hash_file(path: str | Path) -> Hashes:
    """Hashes the file at `path`, or the weights of the PEFT folder; raises `LoratoolError`."""
    file = locate(Path(path).expanduser())[0]
    return hashes_of(path, file, header_or_none(file))


def hashes_of(path: str | Path, file: Path, header: Header | None) -> Hashes:
    """The hashes of a file whose header is known, under the name `path`; raises `InvalidFile`."""
    descriptor = open_regular(file)
    try:
        before = identity(descriptor)
        if header and before != header.identity:
            raise InvalidFile(f"{file}: was changed while it was read")
        digests = digest_file(descriptor, header)
        old = hashlib.sha256(os.pread(descriptor, LEGACY_BYTES, LEGACY_START)).hexdigest()[:8]
        kohyas = kohya_hashes(descriptor, header, digests["autov3"]) if header else {}
        if identity(descriptor) != before:
            raise InvalidFile(f"{file}: was changed while it was read")
        size = os.fstat(descriptor).st_size
    except OSError as error:
        raise InvalidFile(f"{file}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    found = {"autov3": digests["autov3"], **kohyas}
    return Hashes(
        path=str(path),
        size=size,
        autov1=old,
        autov2=digests["sha256"][:10],
        autov3=digests["autov3"] if header else None,
        sha256=digests["sha256"],
        blake3=digests.get("blake3"),
        crc32=digests["crc32"],
        sshs_model_hash=kohyas.get("sshs_model_hash"),
        sshs_legacy_hash=kohyas.get("sshs_legacy_hash"),
        claims=dict(_claims(header, found)) if header else {},
    )


def _claims(header: Header, found: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    for key, (name, prefix) in CLAIMS.items():
        if said := header.metadata.get(key):
            yield key, said.lower().removeprefix(prefix) == found[name]
