"""Safetensors headers and shard indexes, checked before anything trusts them. No torch, and no tensor is read.

The format: an unsigned little-endian 64-bit length N, N bytes of JSON, then the tensors' bytes without a gap
(safetensors, README, section Format). The checks are those of safetensors' `tensor.rs`, and stricter on duplicate
keys, which the reference lets through: two readers of such a file can see two different models.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from loratool.errors import InvalidConfig, InvalidFile, LoratoolError, look_up
from loratool.files.strict_json import strict_json

BITS: Final[Mapping[str, int]] = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16,
    "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip
"""Bits in one element of each dtype that the format names, in the order in which safetensors writes them."""
_PLACES: Final = {dtype: place for place, dtype in enumerate(BITS)}
"""The place of each dtype in that order."""

STORED_DTYPES: Final[Mapping[str, str]] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The dtypes that the user may ask outputs to have, with safetensors' names of them."""


def stored_dtype(name: str | None) -> str | None:
    """safetensors' name of the dtype "float32", "float16" or "bfloat16"; None where no dtype is asked for. Raises
    `UnknownName`."""
    return None if name is None else look_up(STORED_DTYPES, name, "dtype")


STRUCTS: Final[Mapping[str, str]] = {
    "F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b",
    "U64": "Q", "U32": "I", "U16": "H", "U8": "B",
}  # fmt: skip
"""The struct module's letter for one element of each dtype that has a letter."""

ADAPTER_HEADER_BYTES: Final = 25_000_000
"""The hub's limit on a header too (huggingface_hub, SAFETENSORS_MAX_HEADER_LENGTH)."""
BASE_HEADER_BYTES: Final = 100_000_000
"""The limit of safetensors itself (MAX_HEADER_SIZE in its tensor.rs)."""
CONFIG_BYTES: Final = 100_000_000
MAX_ELEMENTS: Final = 2**63 - 1
"""The most elements of a tensor that torch, which counts them in an int64_t, can count."""
MAX_DIMENSIONS: Final = 32
MOST_EMPTY: Final = 2**24
"""The largest dimension of a tensor that another dimension, of 0, leaves without elements."""

MAGICS: Final = (
    (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`, or download it again"),
    (b"GGUF", "a GGUF file, not safetensors"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes: a pickle, not safetensors"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"<", "HTML or XML, probably an error page saved in place of the file: download it again"),
    (b"\x80", "a Python pickle, not safetensors"),
)  # fmt: skip
"""How other files begin that are met under a safetensors file's name, and what to say of each."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The entry of one tensor in a header; `start` and `stop` are byte offsets from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """One safetensors file as its header describes it, with the file's identity when it was read."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int
    identity: tuple[int, ...]

    @property
    def read_files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self.path,)

    def require_unchanged(self) -> None:
        """Raises `InvalidFile` where the file is no longer the one whose header was read."""
        require_unchanged(self.path, self.identity)

    def links_out(self) -> tuple[Path, ...]:
        """None: a file that was named is the one that was meant."""
        return ()


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file; never blocks on a FIFO or opens a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise InvalidFile(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    # The open file is asked, not the path, which may lead to another file by now.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidFile(f"{path}: not a regular file")
    return descriptor


def identity(descriptor: int) -> tuple[int, ...]:
    """The device, inode, size and times of the last changes of an open file and of its inode, which tell when it is replaced
    or written to: the second time is none that a program can put back."""
    return _identity(os.fstat(descriptor))


def require_unchanged(path: Path, known: tuple[int, ...]) -> None:
    """Raises `InvalidFile` unless the file at `path` still has its `known` identity."""
    try:
        found = _identity(os.stat(path))
    # No identity is empty: a file that is gone has changed.
    except OSError:
        found = ()
    if found != known:
        raise InvalidFile(f"{path}: was changed while it was read")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_header(path: Path, limit: int = BASE_HEADER_BYTES) -> Header:
    """Reads and checks the header of the file at `path`, which may take `limit` bytes; raises `InvalidFile`."""
    descriptor = open_regular(path)
    try:
        # What is written to the file from here on makes another file of it.
        who, size = identity(descriptor), os.fstat(descriptor).st_size
        # The length is checked before it is believed: a hostile one would take 2⁶⁴ bytes of memory.
        length = _header_length(path, os.pread(descriptor, 8, 0), size, limit)
        raw = os.pread(descriptor, length, 8)
    except LoratoolError as error:
        raise _seems_to_be(path, os.pread(descriptor, 64, 0)) or error from None
    except OSError as error:
        raise InvalidFile(f"{path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    try:
        tensors, metadata = parse_header(raw, size)
    except InvalidFile as error:
        raise InvalidFile(f"{path}: {error}") from error.__cause__
    return Header(path, tensors, metadata, 8 + length, size, who)


def parse_header(raw: bytes, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors, in the order of their bytes, and the metadata of a file of `size` bytes whose header is `raw`.

    Pure: it reads nothing but its arguments. Raises `InvalidFile` for whatever safetensors refuses, and for duplicates.
    """
    try:
        entries = strict_json(raw)
    except InvalidConfig as error:
        raise InvalidFile(f"header {error}") from error
    # The format wants the brace as the very first byte, where JSON would allow blanks before it.
    if not isinstance(entries, dict) or raw[:1] != b"{":
        raise InvalidFile("header is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    # The reference's parser takes null for no metadata.
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidFile("__metadata__ is not a map from strings to strings")
    begin = 8 + len(raw)
    found = [_tensor(name, entry, begin) for name, entry in entries.items()]
    # By `stop` too: an empty tensor comes before the tensor that begins where it lies.
    found.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_tiling(found, begin, size)
    return {tensor.name: tensor for tensor in found}, metadata


def tensors_size(raw: bytes) -> int:
    """How many bytes of tensors follow the JSON of a header, by that JSON alone; 0 where it is no header's."""
    try:
        entries = strict_json(raw)
        return max((int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (LoratoolError, AttributeError, LookupError, TypeError, ValueError):
        return 0


def stored_order(dtype: str, name: str) -> tuple[int, str]:
    """A key that sorts tensors as safetensors writes them: by dtype, then by name (`serialize` in its tensor.rs)."""
    # Rust compares names as UTF-8 bytes, which gives the order of code points that Python has.
    return _PLACES[dtype], name


def encode_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], length: int = 0, *, always: bool = False
) -> bytes:
    """The length prefix and the JSON of a header, padded with spaces to a multiple of 8 bytes and to `length`.

    Empty metadata is left out, unless an empty map is to be written `always`. Offsets are taken relative to the first
    tensor, so that the caller may place `tensors` at any base offset.
    """
    base = min((tensor.start for tensor in tensors.values()), default=0)
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata or always else {}
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        offsets = [tensor.start - base, tensor.stop - base]
        document[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    # No blanks, no escapes, as serde_json writes for the reference: kohya's legacy hash depends on a header's length.
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    padded = max(length - 8, -(-len(text) // 8) * 8)
    return padded.to_bytes(8, "little") + text.ljust(padded)


def read_scalars(header: Header, infos: Iterable[TensorInfo]) -> Iterator[tuple[str, float | None]]:
    """The name and value of each tensor that should hold one number, as an alpha does; no value where it does not."""
    descriptor = open_regular(header.path)
    try:
        for info in infos:
            single = info.numel == 1 and (info.dtype in STRUCTS or info.dtype in ("BF16", "F8_E4M3", "F8_E5M2"))
            yield info.name, _decode(info.dtype, os.pread(descriptor, info.nbytes, info.start)) if single else None
    finally:
        os.close(descriptor)


def _decode(dtype: str, raw: bytes) -> float:
    """The value of one little-endian number; dtypes without a letter in struct are widened to a dtype that has a letter."""
    # bfloat16 is the upper half of float32, and E5M2 that of float16; the upper half comes last in little-endian bytes.
    if dtype == "BF16":
        dtype, raw = "F32", b"\0\0" + raw
    if dtype == "F8_E5M2":
        dtype, raw = "F16", b"\0" + raw
    if dtype == "F8_E4M3":
        return _decode_e4m3(raw[0])
    return float(struct.unpack("<" + STRUCTS[dtype], raw)[0])


def _decode_e4m3(byte: int) -> float:
    """The value of a sign, 4 bits of exponent with bias 7 and 3 of mantissa; all ones is NaN (Micikevicius et al. 2022,
    arXiv:2209.05433)."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    # (8 + m) / 8 · 2^(e − 7), and for the exponent 0, which is subnormal, m / 8 · 2⁻⁶.
    magnitude = math.ldexp(mantissa + 8, exponent - 10) if exponent else math.ldexp(mantissa, -9)
    return -magnitude if byte & 128 else magnitude


@dataclass(frozen=True, slots=True)
class JsonFile:
    """A JSON file that holds one object: the object, the file's bytes, and its identity when it was read."""

    path: Path
    document: dict[str, Any]
    raw: bytes
    identity: tuple[int, ...]

    def require_unchanged(self) -> None:
        """Raises `InvalidFile` where the file is no longer the one that was read."""
        require_unchanged(self.path, self.identity)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; raises as `read_json_file`."""
    return read_json_file(path).document


def read_json_file(path: Path) -> JsonFile:
    """Reads a JSON file that holds one object, as strictly as `strict_json`; raises `InvalidConfig` naming the file."""
    descriptor = open_regular(path)
    try:
        who = identity(descriptor)
        if os.fstat(descriptor).st_size > CONFIG_BYTES:
            raise InvalidConfig(f"{path}: larger than {CONFIG_BYTES} bytes")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            raw = file.read()
        document = strict_json(raw)
    except InvalidConfig as error:
        raise InvalidConfig(f"{path}: {error}") from error
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if not isinstance(document, dict):
        raise InvalidConfig(f"{path}: expected a JSON object, found {type(document).__name__}")
    return JsonFile(path, document, raw, who)


def read_index(path: Path) -> JsonFile:
    """Reads a shard index, whose weight_map sends each tensor to a file in the same folder; raises `InvalidConfig`.

    Names are checked as text only: a hub cache's snapshot holds symlinks that lead out of its folder, and rightly.
    """
    index = read_json_file(path)
    weight_map = index.document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidConfig(f"{path}: has no weight_map")
    for name, shard in weight_map.items():
        if not _plain_shard_name(shard):
            raise InvalidConfig(f"{path}: weight_map sends {name} to {shard!r}, not a .safetensors file of this folder")
    return index


def _plain_shard_name(shard: object) -> bool:
    # No separator of POSIX or Windows, no NUL, and no drive or stream of Windows.
    return isinstance(shard, str) and shard.endswith(".safetensors") and not any(mark in shard for mark in "/\\\0:")


def _header_length(path: Path, prefix: bytes, size: int, limit: int) -> int:
    if size < 8:
        raise InvalidFile(f"{path}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix, "little")
    # The shortest JSON object is "{}".
    if length < 2:
        raise InvalidFile(f"{path}: the header's length is {length}: not a safetensors file")
    if length > size - 8:
        raise InvalidFile(f"{path}: the header's length, {length}, is past the end of the file ({size} bytes): truncated?")
    if length > limit:
        raise InvalidFile(f"{path}: the header's length, {length}, is over the limit of {limit} bytes")
    return length


def _seems_to_be(path: Path, beginning: bytes) -> InvalidFile | None:
    """The error that names another type of file by its first bytes; None where they tell nothing.

    Asked only once the header was refused: a valid file's length prefix can look like any magic number.
    """
    if beginning and not beginning.strip(b"\0"):
        return InvalidFile(f"{path}: begins with zeros: an unfinished download?")
    for magic, meaning in MAGICS:
        if beginning.lstrip().startswith(magic):
            return InvalidFile(f"{path}: this is {meaning}")
    return None


def _tensor(name: str, entry: object, begin: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InvalidFile(f"tensor {name!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InvalidFile(f"tensor {name!r}: unknown dtype {dtype!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise InvalidFile(f"tensor {name!r}: shape is not a list of at most {MAX_DIMENSIONS} non-negative integers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise InvalidFile(f"tensor {name!r}: data_offsets are not two integers in order")
    elements = _count_elements(name, shape)
    # Elements of 4 or 6 bits share bytes, and the reference refuses tensors that end inside a byte.
    bits = elements * BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        found = offsets[1] - offsets[0]
        raise InvalidFile(f"tensor {name!r}: shape {shape} of {dtype} needs {bits / 8:g} bytes, its offsets give {found}")
    return TensorInfo(name, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _count_elements(name: str, shape: list[int]) -> int:
    """The number of elements of a shape; raises `InvalidFile` for more than anything can count."""
    # Each dimension by itself too: beside a 0 the product would hide one that nothing can count.
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements > MAX_ELEMENTS or dimension > MAX_ELEMENTS:
            raise InvalidFile(f"tensor {name!r}: shape {shape} overflows")
    # Rows are gone through one block after the other, and those without bytes cost a file nothing.
    if not elements and max(shape) > MOST_EMPTY:
        raise InvalidFile(f"tensor {name!r}: has no elements and a dimension of {max(shape)}; at most {MOST_EMPTY} are read")
    return elements


def _check_tiling(tensors: list[TensorInfo], begin: int, size: int) -> None:
    # The format allows no holes, lest a file be one of another type as well (safetensors, README, section Format).
    position = begin
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise InvalidFile(f"tensor {tensor.name!r} {what} (begins at {tensor.start}, expected {position})")
        position = tensor.stop
    if position > size:
        raise InvalidFile(f"truncated: its tensors end at byte {position}, the file has {size}")
    if position < size:
        raise InvalidFile(f"{size - position} bytes follow the last tensor")


def _naturals(value: object) -> bool:
    # `isinstance` would let true and false pass, which are integers to Python.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
