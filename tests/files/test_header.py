"""Headers: what the reference refuses we refuse, what it accepts we read alike, and duplicates are an error."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from loratool.errors import InvalidConfig, InvalidFile
from loratool.files.header import TensorInfo, encode_header, parse_header, read_header, read_index, read_scalars
from loratool.files.strict_json import strict_json
from tests.conftest import examples

ONE = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def file_of(header: str | bytes, data: bytes = b"\0" * 8) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**changes: object) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


def test_reads_names_shapes_and_absolute_offsets(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(ONE))

    header = read_header(path)

    assert header.tensors == {"a": TensorInfo("a", "F32", (2,), 8 + len(ONE), 16 + len(ONE))}
    assert header.size == len(file_of(ONE))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "too few"),
        (b"\1" * 7, "too few"),
        (struct.pack("<Q", 0) + b"\0" * 8, "zeros"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "past the end"),
        (struct.pack("<Q", 99_000_000) + b"{}", "past the end"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"GGUF\3\0\0\0\0\0\0\0", "GGUF"),
        (b"PK\x03\x04" + b"\0" * 30, "zip"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\3", "gzip"),
        (b"\0" * 4096, "zeros"),
        (file_of("[]", b""), "not a JSON object"),
        (file_of("null", b""), "not a JSON object"),
        (file_of('{"a":', b""), "not JSON"),
        (file_of(b'{"\xff":1}', b""), "UTF-8"),
        (file_of(" " + ONE), "not a JSON object"),
        (file_of('{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "UTF-8"),
        (file_of(ONE[:-1] + "," + ONE[1:]), "duplicate"),
        (file_of(ONE[:-1] + ',"\\u0061":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "duplicate"),
        (file_of('{"__metadata__":{"a":"1","a":"2"}}', b""), "duplicate"),
        (file_of('{"__metadata__":{"a":1}}', b""), "strings"),
        (file_of("{" + '"a":{' * 5000 + "}" * 5001, b""), "deeply"),
        (file_of(entry(dtype="F33")), "dtype"),
        (file_of(entry(shape=[-2])), "shape"),
        (file_of(entry(shape=[2.0])), "shape"),
        (file_of(entry(shape=[True, 2])), "shape"),
        (file_of(entry(shape=[2**32, 2**32])), "overflow"),
        (file_of(entry(shape=[2**63 + 2, 2])), "overflow"),
        (file_of(entry(shape=[1] * 10_000)), "shape"),
        (file_of(entry(shape=[3])), "needs 12 bytes"),
        (file_of(entry(data_offsets=[8, 0])), "offsets"),
        (file_of(entry(data_offsets=[1, 9])), "hole"),
        (file_of(entry(), b"\0" * 9), "follow"),
        (file_of(entry(), b"\0" * 7), "truncated"),
        (file_of('{"a":{"dtype":"F32","shape":[' + "1" * 5000 + '],"data_offsets":[0,8]}}'), "digits"),
        (file_of('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "NaN"),
        (file_of('{"a":{"dtype":"F32","shape":[2]}}'), "expected dtype, shape and data_offsets"),
    ],
)  # fmt: skip
def test_refuses_what_is_broken_and_says_why(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)

    with pytest.raises(InvalidFile, match=said) as error:
        read_header(path)

    assert str(path) in str(error.value)


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(file_of("{" + " " * 1000 + "}", b""))

    with pytest.raises(InvalidFile, match="limit"):
        read_header(path, limit=100)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A FIFO without a writer blocks whoever opens it in the ordinary way."""
    import os

    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/null"), tmp_path):
        with pytest.raises(InvalidFile):
            read_header(path)


def test_encode_is_the_inverse_of_parse() -> None:
    tensors = {"b": TensorInfo("b", "F16", (2, 2), 0, 8), "a": TensorInfo("a", "I64", (), 8, 16)}

    raw = encode_header(tensors, {"k": "v"})[8:]
    parsed, metadata = parse_header(raw, 8 + len(raw) + 16)

    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in parsed.values()] == [("b", "F16", (2, 2), 8), ("a", "I64", (), 8)]
    assert metadata == {"k": "v"}
    assert len(raw) % 8 == 0


fragments = st.sampled_from(
    ['"', "{", "}", "[", "]", ",", ":", "0", "8", "9" * 25, "-", ".", "e", "F16", "\\u0061", " ", "null", "\x00"]
)


@given(st.integers(0, len(ONE)), st.integers(0, 4), fragments, st.integers(0, 16))
@settings(max_examples=examples(400), deadline=None)
def test_never_accepts_what_the_reference_refuses(position: int, cut: int, inserted: str, size: int) -> None:
    raw = (ONE[:position] + inserted + ONE[position + cut :]).encode()
    content = struct.pack("<Q", len(raw)) + raw + b"\0" * size
    try:
        parse_header(raw, len(content))
    except InvalidFile:
        return
    try:
        deserialize(content)
    except SafetensorError as error:
        pytest.fail(f"the reference refuses {raw!r}: {error}")


@pytest.mark.parametrize(
    ("dtype", "raw", "value"),
    [
        ("F32", struct.pack("<f", 0.5), 0.5),
        ("F16", struct.pack("<e", -2.0), -2.0),
        ("BF16", struct.pack("<f", 1.5)[2:], 1.5),
        ("F64", struct.pack("<d", 3.0), 3.0),
        ("I64", struct.pack("<q", 16), 16.0),
        ("F8_E4M3", bytes([0b0_1011_000]), 16.0),
        ("F8_E4M3", bytes([0b1_0000_001]), -(2.0**-9)),
        ("F8_E5M2", bytes([0b0_10011_00]), 16.0),
    ],
)
def test_scalars_of_every_dtype_are_read_without_torch(tmp_path: Path, dtype: str, raw: bytes, value: float) -> None:
    path = tmp_path / "alpha.safetensors"
    path.write_bytes(file_of(json.dumps({"a": {"dtype": dtype, "shape": [], "data_offsets": [0, len(raw)]}}), raw))
    header = read_header(path)

    assert dict(read_scalars(header, header.tensors.values())) == {"a": value}


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a\\b.safetensors", "", ".", "x.bin", "a/b.safetensors", 7]
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, shard: object) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": shard}}))

    with pytest.raises(InvalidConfig, match="weight_map"):
        read_index(path)


def test_strict_json_refuses_what_two_readers_would_read_differently() -> None:
    for text in (b'{"a":1,"a":2}', b'{"x":{"a":1,"\\u0061":2}}', b"[Infinity]", b"\xff"):
        with pytest.raises(InvalidConfig):
            strict_json(text)


def test_a_file_that_changes_while_its_header_is_read_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    read = os.pread

    def rewritten(descriptor: int, count: int, offset: int) -> bytes:
        found = read(descriptor, count, offset)
        if offset:
            path.write_bytes((3).to_bytes(8, "little") + b"{} ")
        return found

    monkeypatch.setattr(os, "pread", rewritten)
    header = read_header(path)
    with pytest.raises(InvalidFile, match="was changed while it was read"):
        header.require_unchanged()


def test_a_number_beyond_all_floats_is_no_json() -> None:
    with pytest.raises(InvalidConfig, match="has the number 1e999, which is too large"):
        strict_json(b'{"a": 1e999}')
