"""`hash`: every hash that people know a file by, and whether the hashes in its own metadata are true. No torch."""

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
from loratool.files.paths import path_of

CLAIMS: Final[Mapping[str, tuple[str, str]]] = {
    "sshs_model_hash": ("sshs_model_hash", ""),
    "sshs_legacy_hash": ("sshs_legacy_hash", ""),
    "modelspec.hash_sha256": ("autov3", "0x"),
}
"""Metadata keys in which a file states its own hashes: which hash the value is, and the prefix before its digits."""


@dataclass(frozen=True, slots=True)
class Hashes:
    """The hashes of one file, in hexadecimal. `autov3` and kohya's two are None where the file is no safetensors file, and
    `blake3` where its library is missing. `claims` maps the metadata keys of `CLAIMS` to whether their values are true."""

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
        """AutoV3 as sites show it: its first letters, in capitals."""
        return self.autov3[:LETTERS].upper() if self.autov3 else None

    @property
    def true(self) -> bool:
        """Whether no hash in the file's own metadata is wrong; true of a file that states none."""
        return all(self.claims.values())


def hash_file(path: str | Path) -> Hashes:
    """Hashes the file at `path`, or the weights of the PEFT folder; raises `LoratoolError`."""
    file = locate(path_of(path))[0]
    return hashes_of(path, file, header_or_none(file))


def hashes_of(path: str | Path, file: Path, header: Header | None) -> Hashes:
    """The hashes of a file whose header was read already, reported under the name `path`; raises `InvalidFile`."""
    descriptor = open_regular(file)
    try:
        # One descriptor for all reads: every hash is of the same file, even where the name goes to another one meanwhile.
        before = identity(descriptor)
        if header and before != header.identity:
            raise InvalidFile(f"{file}: was changed while it was read")
        digests = digest_file(descriptor, header)
        # A1111's first hash: 64 KiB from the first MiB on, of which eight digits are shown; of AutoV2 they are ten.
        old = hashlib.sha256(os.pread(descriptor, LEGACY_BYTES, LEGACY_START)).hexdigest()[:8]
        kohyas = kohya_hashes(descriptor, header, digests["autov3"]) if header else {}
        # Written to in place while it was read: the hashes would be those of no state that the file ever had.
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
        # Without a header `digest_file` hashes the whole file, which is no AutoV3.
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
            # ModelSpec writes 0x before its digits, kohya does not; either case is taken.
            yield key, said.lower().removeprefix(prefix) == found[name]
