"""Hashes against those who define them: safetensors' own writer, as kohya calls it, hashlib, zlib and blake3."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path

import blake3
import pytest
import safetensors.torch
import torch

from loratool.files.adapter_files import open_adapter
from loratool.files.hashes import LETTERS, legacy_hash, short_hash
from loratool.files.header import read_header
from loratool.verbs.hash import hash_file
from tests.conftest import FIXTURES, Run
from tests.models import kohya, save

DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
]


def data_of(raw: bytes) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 + length :]


def kohyas(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """What sd-scripts computes: of the bytes that safetensors makes of the tensors and the training's metadata."""
    raw = safetensors.torch.save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    return hashlib.sha256(data_of(raw)).hexdigest(), hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]


def mixed(rows: int) -> dict[str, torch.Tensor]:
    """Tensors whose order by name is not their order by dtype."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{place:02}.{dtype}": torch.randint(0, 2, (rows, 64), generator=generator).to(getattr(torch, dtype))
        for place, dtype in enumerate(DTYPES)
    }


@pytest.mark.parametrize("metadata", [{}, {"ss_network_dim": "4", "other": "x"}, {"ss_a": "é" * 50}, {"other": "x"}])
@pytest.mark.parametrize("rows", [2, 700], ids=["small", "of some MB"])
def test_they_are_those_that_others_compute(tmp_path: Path, rows: int, metadata: dict[str, str]) -> None:
    tensors, path = mixed(rows), tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, metadata or None)
    raw = path.read_bytes()
    found = hash_file(path)
    assert found.sha256 == hashlib.sha256(raw).hexdigest()
    assert found.autov2 == found.sha256[:10]
    assert found.autov1 == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    assert found.autov3 == hashlib.sha256(data_of(raw)).hexdigest()
    assert found.blake3 == blake3.blake3(raw).hexdigest()
    assert found.crc32 == f"{zlib.crc32(raw):08x}"
    assert (found.sshs_model_hash, found.sshs_legacy_hash) == kohyas(tensors, metadata)
    assert short_hash(open_adapter(path)) == (found.autov3 or "")[:LETTERS]
    assert legacy_hash(read_header(path), {"ss_x": "y"}) == kohyas(tensors, {"ss_x": "y"})[1]


def test_kohyas_hash_is_of_the_order_that_safetensors_writes(tmp_path: Path) -> None:
    """A file in another order has another AutoV3, and the same hash by kohya's rule."""
    one, two = torch.arange(4.0), torch.arange(6, dtype=torch.int64)
    header = {
        "z": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "a": {"dtype": "I64", "shape": [6], "data_offsets": [16, 64]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + one.numpy().tobytes() + two.numpy().tobytes())
    found = hash_file(path)
    assert (found.sshs_model_hash, found.sshs_legacy_hash) == kohyas({"z": one, "a": two}, {})
    assert found.sshs_model_hash != found.autov3


@pytest.mark.parametrize(
    "line",
    [
        "convert {style} --to diffusers -o out",
        "resize {style} --rank 2 -o out",
        "resize {style} --rank 2 --dtype bfloat16 -o out",
        "combine {style}:0.5 {style} -o out",
        "edit {style} --scale *=2 -o out",
        "convert {lora} --to peft -o out",
        "extract {llama} {tuned} --rank 2 -o out",
    ],
)
def test_what_we_write_says_true_hashes_of_itself(tmp_path: Path, invoke: Run, line: str) -> None:
    names = {"style": "style.safetensors", "lora": "llama-lora", "llama": "llama", "tuned": "llama-tuned"}
    words = line.format(**{key: FIXTURES / name for key, name in names.items()}).split()
    assert invoke(*words).returncode == 0
    found = hash_file(tmp_path / "out")
    assert found.claims == {"sshs_model_hash": True, "sshs_legacy_hash": True}
    file = tmp_path / "out"
    file = file / "adapter_model.safetensors" if file.is_dir() else file
    tensors, metadata = safetensors.torch.load_file(file), read_header(file).metadata
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == kohyas(tensors, dict(metadata))


def test_check_finds_what_is_wrong(tmp_path: Path, invoke: Run) -> None:
    tensors = dict(kohya({"lora_unet_q": (8, 8)}, 2, 1.0))
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"sshs_model_hash": "0" * 64})
    done = invoke("hash", "--check", "a.safetensors")
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    right = {"modelspec.hash_sha256": "0x" + hashlib.sha256(data_of((tmp_path / "a.safetensors").read_bytes())).hexdigest()}
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", right)
    done = invoke("hash", "--check", "--json", "b.safetensors")
    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["claims"] == {"modelspec.hash_sha256": True}
    save(tmp_path / "c.safetensors", tensors)
    assert "says nothing of its own hashes" in invoke("hash", "--check", "c.safetensors").stderr


def test_any_file_has_the_hashes_of_a_file(tmp_path: Path, invoke: Run) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"anything")
    found = json.loads(invoke("hash", "--json", "model.ckpt").stdout)[0]
    assert found["sha256"] == hashlib.sha256(b"anything").hexdigest()
    assert found["autov3"] is None
    assert "not a safetensors file" in invoke("hash", "model.ckpt").stdout
    done = invoke("hash", "missing.safetensors")
    assert (done.returncode, "missing.safetensors: No such file" in done.stderr) == (1, True)


def test_a_history_is_a_chain(tmp_path: Path, invoke: Run) -> None:
    for line in (
        f"resize {FIXTURES / 'style.safetensors'} --rank 2 -o a.safetensors",
        "edit a.safetensors --scale *=2 -o b.safetensors",
        "convert b.safetensors --to diffusers -o c.safetensors",
    ):
        assert invoke(*line.split()).returncode == 0
    history = json.loads(invoke("inspect", "--json", "c.safetensors").stdout)["history"]
    assert [step["command"] for step in history] == ["convert", "edit", "resize"]
    assert [step["adapters"][0]["name"] for step in history] == ["b.safetensors", "a.safetensors", "style.safetensors"]
    assert [step["adapters"][0]["autov3"] for step in history] == [
        short_hash(open_adapter(tmp_path / "b.safetensors")),
        short_hash(open_adapter(tmp_path / "a.safetensors")),
        short_hash(open_adapter(FIXTURES / "style.safetensors")),
    ]
    assert float(history[2]["error"]) > 0
    assert "history" in invoke("inspect", "c.safetensors").stdout
