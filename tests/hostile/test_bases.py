"""Bases as they come: indexes that lie, shards that are not there or not theirs, quantised weights; and outputs that must
not be written. One message, the file in it, and nothing left behind."""
# ruff: noqa: E501  a table has a row for each case

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FIXTURES, Run
from tests.hostile.test_battery import contents

pytestmark = [pytest.mark.filterwarnings("ignore")]

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
Harm = Callable[[Path], None]


def index(**entries: Any) -> Harm:
    """Has the index say something else of some tensors (None: nothing)."""

    def harm(base: Path) -> None:
        document = json.loads((base / INDEX).read_text())
        for name, shard in entries.items():
            key = name.replace("__", ".")
            if shard is None:
                del document["weight_map"][key]
            else:
                document["weight_map"][key] = shard
        (base / INDEX).write_text(json.dumps(document))

    return harm


def text(value: str) -> Harm:
    return lambda base: (base / INDEX).write_text(value) and None


def shard(change: Callable[[Path], object]) -> Harm:
    return lambda base: change(base / SHARDS[0]) and None


def tensors(**changes: Any) -> Harm:
    """Puts other tensors into the first shard, and into the index."""

    def harm(base: Path) -> None:
        found = load_file(base / SHARDS[0])
        added = {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file(found | added, base / SHARDS[0])
        index(**dict.fromkeys(changes, SHARDS[0]))(base)

    return harm


def spoiled(path: Path, name: str) -> None:
    found = load_file(path)
    found[name][0, 0] = float("nan")
    save_file(found, path)


def linked(base: Path) -> None:
    """As the hub's cache has it: every file a link to a blob elsewhere."""
    blobs = base.parent / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for path in list(base.iterdir()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(blob)


Q = "model__layers__0__self_attn__q_proj__weight"
BAD: dict[str, Harm] = {
    **{
        f"index names {value!r}": index(**{Q: value})
        for value in (
            "../x.safetensors", "/etc/passwd", "..\\x.safetensors", "", ".", "..", "sub/x.safetensors", "x\0.safetensors", 5, None,
            "x.bin", "/dev/zero", "missing.safetensors", ["a"], {"a": 1}, "config.json", "x" * 300 + ".safetensors",
        )
    },
    "a tensor that no shard holds": index(ghost__weight=SHARDS[0]),
    "a key in the wrong shard": index(model__norm__weight=SHARDS[0]),
    "index is no JSON": text("{"),
    "index is a list": text("[]"),
    "index without a map": text("{}"),
    "index with duplicates": text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
    "index of brackets": text("[" * 100_000),
    "an empty map": text('{"weight_map": {}}'),
    "a missing shard": shard(os.unlink),
    "a truncated shard": shard(lambda path: os.truncate(path, path.stat().st_size - 7)),
    "an empty shard": shard(lambda path: os.truncate(path, 0)),
    "a shard that is a FIFO": shard(lambda path: (path.unlink(), os.mkfifo(path))),
    "a shard that is a folder": shard(lambda path: (path.unlink(), path.mkdir())),
    "a shard that is a loop": shard(lambda path: (path.unlink(), path.symlink_to(path.name))),
    "a shard that is a device": shard(lambda path: (path.unlink(), path.symlink_to("/dev/zero"))),
    "a shard with a huge header": shard(lambda path: path.write_bytes(struct.pack("<Q", 2**63))),
    "GPTQ": tensors(**{Q.replace("weight", "qweight"): torch.zeros(2, 2, dtype=torch.int32)}),
    "bitsandbytes": tensors(**{Q + "__absmax": torch.zeros(2)}),
    "scaled fp8": tensors(**{Q + "_scale": torch.zeros(2)}),
    "int8 weights": tensors(**{Q: torch.zeros(16, 16, dtype=torch.int8)}),
    "boolean weights": tensors(**{Q: torch.zeros(16, 16, dtype=torch.bool)}),
    "a weight of another shape": tensors(**{Q: torch.zeros(16, 15)}),
    "a weight of another rank": tensors(**{Q: torch.zeros(16)}),
    "NaN in a weight that changes": tensors(**{Q: torch.full((16, 16), float("nan"))}),
    "config is no JSON": lambda base: (base / "config.json").write_text("{") and None,
    "config is a list": lambda base: (base / "config.json").write_text("[]") and None,
    "config says it is quantised": lambda base: (base / "config.json").write_text('{"quantization_config": {"bits": 4}}') and None,
    "no weights at all": lambda base: [path.unlink() for path in base.glob("model*")] and None,
    "two names that are one when flattened": tensors(model__layers__0__self_attn_q_proj__weight=torch.zeros(16, 16)),
}  # fmt: skip
GOOD: dict[str, Harm] = {
    "as it is": lambda base: None,
    "links, as in the hub's cache": linked,
    "a stale shard beside the others": lambda base: shutil.copy(base / SHARDS[0], base / "old.safetensors") and None,
    "NaN in a weight that stays": shard(lambda path: spoiled(path, "model.embed_tokens.weight")),
    "an odd file": lambda base: (base / "x\ny \x1b[31m.txt").write_text("hello") and None,
    "without a config": lambda base: (base / "config.json").unlink(),
    "metadata in the index": lambda base: None,
}


@pytest.mark.parametrize("name", [*BAD, *GOOD])
def test_a_base_ends_rightly(tmp_path: Path, invoke: Run, name: str) -> None:
    shutil.copytree(FIXTURES / "llama", tmp_path / "base")
    shutil.copytree(FIXTURES / "llama-lora", tmp_path / "adapter")
    (BAD | GOOD)[name](tmp_path / "base")
    before = contents(tmp_path)

    done = invoke("merge", "base", "adapter", "-o", "out")

    after = contents(tmp_path)
    if name in GOOD:
        assert done.returncode == 0, done.stderr
        assert {key for key in after if not key.startswith("out")} == before.keys()
        return
    assert done.returncode == 1, done.stdout
    assert after == before
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "base" in done.stderr


def outputs(folder: Path) -> dict[str, tuple[str, str]]:
    """Names of outputs that must not be written, and why."""
    (folder / "folder").mkdir()
    (folder / "folder" / "mine.txt").write_text("mine")
    (folder / "file").write_text("mine")
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to(folder / "base.safetensors")
    os.link(folder / "base.safetensors", folder / "hard")
    (folder / "dangling").symlink_to(folder / "nowhere")
    return {
        "missing/out": "does not exist",
        "folder": "not a plain file",
        "file": "pass --overwrite",
        "fifo": "not a plain file",
        "link": "is an input",
        "hard": "is an input",
        "base.safetensors": "is an input",
        "adapter.safetensors": "is an input",
        "./base.safetensors": "is an input",
        "folder/../base.safetensors": "is an input",
        "dangling": "not a plain file",
        "/dev/null": "not a plain file",
        "x" * 300: "name too long",
    }


def test_outputs_that_must_not_be_written_are_not(tmp_path: Path, invoke: Run) -> None:
    shutil.copy(FIXTURES / "sdxl.safetensors", tmp_path / "base.safetensors")
    shutil.copy(FIXTURES / "style.safetensors", tmp_path / "adapter.safetensors")
    names = outputs(tmp_path)
    before = contents(tmp_path)
    for name, why in names.items():
        overwrite = [] if name == "file" else ["--overwrite"]
        done = invoke("merge", "base.safetensors", "adapter.safetensors", "-o", name, *overwrite)
        assert done.returncode in (1, 2), name
        assert why in done.stderr.lower() or done.returncode == 2, (name, done.stderr)
        assert contents(tmp_path) == before, name


def test_a_name_as_long_as_the_system_takes_is_written(tmp_path: Path, invoke: Run) -> None:
    name = "x" * 243 + ".safetensors"
    shutil.copy(FIXTURES / "sdxl.safetensors", tmp_path / "base.safetensors")
    done = invoke("merge", "base.safetensors", FIXTURES / "style.safetensors", "-o", name)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name).exists()
