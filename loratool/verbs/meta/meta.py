"""`meta`: the metadata of a file, changed without touching a byte of its tensors. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from loratool.errors import InvalidFile, LoratoolError, OutputError, error_in_file
from loratool.files.adapter_files import adapter_file, locate
from loratool.files.hashes import HASH_LENGTHS, legacy_hash
from loratool.files.header import ADAPTER_HEADER_BYTES, Header, encode_header, identity, open_regular, read_header
from loratool.files.history import HISTORY_KEY
from loratool.files.in_place import current_path, finish_change_in_place
from loratool.files.output import Input, NewOutput
from loratool.files.paths import path_of
from loratool.files.walk import walk_model
from loratool.files.writer import Writer, copy_file
from loratool.formats import modelspec
from loratool.formats.peft import PEFT_METADATA_KEY
from loratool.text import is_encodable
from loratool.verbs.hash import hashes_of
from loratool.verbs.meta.private import without_private
from loratool.verbs.reports import Report

NEEDED: Final = frozenset({PEFT_METADATA_KEY, "format", "software"})
"""Keys without which readers make something else of a file: diffusers keeps alphas in `lora_adapter_metadata`, transformers
asks for `format`, and ai-toolkit's name in `software` tells a difference from a factor."""
_OWN: Final = frozenset({*HASH_LENGTHS, HISTORY_KEY, "modelspec.hash_sha256"})
"""Keys whose values are true of one file alone, and are not copied to another: hashes, and the history."""


@dataclass(frozen=True, slots=True)
class MetaReport(Report):
    """What became of a file's metadata: the keys that were added, changed and removed."""

    out: str
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, or of a PEFT folder's weights; raises `LoratoolError`."""
    return dict(_header(path).metadata)


def _header(path: str | Path, *, changed: bool = False) -> Header:
    """The header of a safetensors file, or of a PEFT folder's weights, which are about to be `changed` in place."""
    weights, _ = locate(path_of(path))
    if changed:
        finish_change_in_place(weights)
    return read_header(current_path(weights))


def set_metadata(
    path: str | Path, values: Mapping[str, str], out: str | Path | None = None, *, overwrite: bool = False
) -> MetaReport:
    """Sets `values` in the metadata of the file at `path`, or of a copy `out`; those of `modelspec.*` must follow their
    specification.

    Raises `LoratoolError`, and changes nothing, where a value is not allowed, or a hash is not the file's.
    """
    for key, value in values.items():
        # Bytes of a command line that are no UTF-8 are lone surrogates in Python.
        if not is_encodable(key + value):
            raise LoratoolError(f"{key}: is not UTF-8, which metadata is stored in")
    with error_in_file(path):
        modelspec.require_allowed(values)
        header = _header(path, changed=out is None)
        # The one value that can be checked against the file: it is AutoV3, the hash of all that follows the header.
        if claimed := values.get("modelspec.hash_sha256"):
            true = f"0x{hashes_of(path, header.path, header).autov3}"
            if true != claimed:
                raise LoratoolError(f"modelspec.hash_sha256: the file's is {true}")
    return _write_change(path, header, {**header.metadata, **values}, out, overwrite=overwrite)


def delete_metadata(
    path: str | Path, globs: Sequence[str], out: str | Path | None = None, *, overwrite: bool = False
) -> MetaReport:
    """Deletes the keys that `globs` match; raises `LoratoolError` for a glob that matches no key, and for keys that readers
    need."""
    header = _header(path, changed=out is None)
    before = header.metadata
    gone = _matching_keys(path, before, globs)
    # `format` may go: transformers refuses a file without it, but nobody reads other numbers.
    needed = sorted(gone & NEEDED - {"format"})
    if needed:
        raise LoratoolError(
            f"{path}: without {needed[0]} the adapter would be read as another; convert it to kohya's format first"
        )
    kept = {key: value for key, value in before.items() if key not in gone}
    return _write_change(path, header, kept, out, overwrite=overwrite)


def copy_metadata(
    source: str | Path,
    path: str | Path,
    globs: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> MetaReport:
    """Adds the metadata of `source`, or the keys of it that `globs` match, to that of `path`; hashes, histories and the keys
    that readers need stay each file's own."""
    source_header = _header(source)
    theirs = source_header.metadata
    chosen = _matching_keys(source, theirs, globs) if globs else theirs.keys()
    copied = {key: theirs[key] for key in theirs if key in chosen and key not in _OWN | NEEDED}
    header = _header(path, changed=out is None)
    metadata = {**header.metadata, **copied}
    return _write_change(path, header, metadata, out, overwrite=overwrite, others=[source_header])


def strip_metadata(
    path: str | Path, out: str | Path | None = None, *, private: bool = False, overwrite: bool = False
) -> MetaReport:
    """Removes all metadata but what readers need; or, with `private`, only paths and the names of datasets and users."""
    header = _header(path, changed=out is None)
    before = header.metadata
    kept = without_private(before) if private else {key: value for key, value in before.items() if key in NEEDED}
    return _write_change(path, header, kept, out, overwrite=overwrite)


def _matching_keys(path: str | Path, metadata: Mapping[str, str], globs: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for glob in globs:
        mine = {key for key in metadata if fnmatchcase(key, glob)}
        if not mine:
            raise LoratoolError(f"{path}: has no metadata called {glob}; meta show lists what there is")
        found |= mine
    return found


def _write_change(
    path: str | Path,
    header: Header,
    metadata: dict[str, str],
    out: str | Path | None,
    *,
    overwrite: bool,
    others: Sequence[Header] = (),
) -> MetaReport:
    """Writes the file at `path`, or a copy `out` of it, with this metadata, in which kohya's legacy hash is made true."""
    path = path_of(path)
    target = path_of(out) if out else None
    before = header.metadata
    # kohya's legacy hash covers the 64 KiB behind the first MiB, which a header of another length moves; sshs_model_hash is
    # of the tensors alone and stays true.
    if "sshs_legacy_hash" in metadata:
        metadata["sshs_legacy_hash"] = legacy_hash(header, metadata)
    raw = encode_header(header.tensors, metadata)
    # A header that is longer than the limit already may stay so long, or become shorter.
    if len(raw) > max(ADAPTER_HEADER_BYTES, header.data_start):
        raise LoratoolError(f"{path}: metadata of {len(raw)} bytes is more than readers allow ({ADAPTER_HEADER_BYTES})")
    # In place, a change that changes nothing leaves the file alone; a copy is written all the same.
    if target is None and metadata != before:
        _replace(header, header.path, raw, overwrite=True, inputs=others, itself=header)
    elif target is not None and path.is_dir():
        _copy_folder(path, header, raw, target, overwrite=overwrite, others=others)
    elif target is not None:
        _replace(header, target, raw, overwrite=overwrite, inputs=[header, *others])
    return MetaReport(
        out=str(target or path),
        added=tuple(sorted(metadata.keys() - before.keys())),
        changed=tuple(sorted(key for key in metadata.keys() & before.keys() if metadata[key] != before[key])),
        removed=tuple(sorted(before.keys() - metadata.keys())),
        warnings=tuple(modelspec.warnings_of(metadata)),
    )


def _replace(
    header: Header, target: Path, raw: bytes, *, overwrite: bool, inputs: Sequence[Input], itself: Header | None = None
) -> None:
    """Writes the file with the header `raw` to `target`, which may be the file `itself`."""
    nbytes = len(raw) + header.size - header.data_start
    output = NewOutput(target, folder=False, overwrite=overwrite, nbytes=nbytes, inputs=inputs, itself=itself)
    with output:
        _write(header, output.path(""), raw)
        # A new file has the permissions of the process, not those of the file whose place it takes.
        shutil.copymode(header.path, output.path(""))
        output.commit()


def _copy_folder(path: Path, header: Header, raw: bytes, target: Path, *, overwrite: bool, others: Sequence[Header]) -> None:
    """Copies a PEFT folder, whose weights get the header `raw`."""
    inputs: list[Input] = [adapter_file(path, header, header.identity), *others]
    nbytes = header.size + len(raw)
    beside = [name for name in walk_model(path).files if name != header.path.name]
    with NewOutput(target, folder=True, overwrite=overwrite, nbytes=nbytes, inputs=inputs, written=beside) as output:
        for name in beside:
            copy_file(path / name, output.path(name))
        _write(header, output.path(header.path.name), raw)
        output.commit()


def _write(header: Header, path: Path, raw: bytes) -> None:
    """Writes to `path` the header `raw` and behind it the bytes of the tensors, which the kernel copies in their order."""
    source = open_regular(header.path)
    try:
        with Writer(path, len(raw) + header.size - header.data_start) as writer:
            writer.write(raw, 0)
            writer.copy(source, header.data_start, header.size - header.data_start, len(raw))
        if identity(source) != header.identity:
            raise InvalidFile(f"{header.path}: was changed while it was read")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error
    finally:
        os.close(source)
