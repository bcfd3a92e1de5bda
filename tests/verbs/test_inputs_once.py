"""An input is parsed once in a verb, and one that is replaced in the middle of it is an error that says so."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from loratool.errors import LoratoolError
from loratool.files import header, tensors
from tests.conftest import FIXTURES, Run

VERBS = {
    "resize": "resize ADAPTER --rank 1 -o out",
    "convert": "convert ADAPTER --to peft-file -o out.safetensors",
    "convert to a folder": "convert ADAPTER --to peft -o out",
    "convert, to LoRA": "convert ADAPTER --to-lora --base BASE --rank 2 -o out",
    "edit": "edit ADAPTER --scale *=0.5 -o out",
    "merge": "merge BASE ADAPTER:0.5 -o out --undo undo.safetensors",
    "swap": "swap BASE --out ADAPTER --in ADAPTER:0.5 -o out",
    "unmerge": "unmerge BASE ADAPTER -o out",
    "combine": "combine ADAPTER ADAPTER:0.5 --base BASE -o out",
    "compare": "compare ADAPTER ADAPTER",
    "compare to": "compare BASE --to BASE+ADAPTER:0.5",
    "delta": "delta ADAPTER --base BASE",
    "delta, written": "delta ADAPTER -o out.safetensors",
    "check": "check ADAPTER --for peft --base BASE",
    "check and fix": "check ADAPTER --for vllm --fix -o out",
    "report": "report ADAPTER -o out.html --base BASE",
    "inspect": "inspect ADAPTER --values --plot",
    "hash": "hash ADAPTER",
    "meta": "meta set ADAPTER a=b -o out",
}


def words(line: str) -> list[str]:
    return line.replace("ADAPTER", "adapter").replace("BASE", "base").split()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES / "llama-lora", tmp_path / "adapter")
    shutil.copytree(FIXTURES / "llama", tmp_path / "base")
    return tmp_path


@contextmanager
def parses() -> Iterator[Counter[str]]:
    """How often each file is parsed, as a header or as JSON, on any thread."""
    found: Counter[str] = Counter()
    parsers = {header.read_header.__code__, header.read_json_file.__code__}

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in parsers:
            found[str(frame.f_locals["path"])] += 1

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", VERBS.values(), ids=VERBS)
def test_each_input_is_parsed_once(files: Path, invoke: Run, line: str) -> None:
    with parses() as found:
        invoke(*words(line))
    mentions = max(line.count("ADAPTER"), 1)
    inputs = {path: times for path, times in found.items() if Path(path).parts[0] in ("adapter", "base")}
    assert inputs
    for path, times in inputs.items():
        assert times <= (mentions if path.startswith("adapter") else line.count("BASE")), path


def replaced_after_reading(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[[], bool]:
    """Has `path` replaced by another file of the same bytes once it was read; returns whether that came to be."""
    leave, happened = tensors.TensorFile.__exit__, []

    def replacing(self: tensors.TensorFile, *raised: Any) -> None:
        leave(self, *raised)
        if not happened and self.header.path.name == path.name and self.header.path.parent.name == path.parent.name:
            happened.append(True)
            copy = path.with_suffix(".new")
            shutil.copy(path, copy)
            os.replace(copy, path)

    monkeypatch.setattr(tensors.TensorFile, "__exit__", replacing)
    return lambda: bool(happened)


READERS = {name: line for name, line in VERBS.items() if name not in ("hash", "meta")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", READERS.values(), ids=READERS)
def test_an_input_that_is_replaced_is_an_error(files: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    happened = replaced_after_reading(monkeypatch, files / "adapter" / "adapter_model.safetensors")
    before = {path.name for path in files.iterdir()}

    done = invoke(*words(line))

    assert happened()
    assert done.returncode == 1, done.stdout
    assert "was changed while it was read" in done.stderr
    assert {path.name for path in files.iterdir()} == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", [line for name, line in READERS.items() if name != "inspect"])
def test_a_config_that_is_replaced_is_an_error(files: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    leave, config = tensors.TensorFile.__exit__, files / "adapter" / "adapter_config.json"

    def rewriting(self: tensors.TensorFile, *raised: Any) -> None:
        leave(self, *raised)
        os.utime(config, ns=(1, 1))

    monkeypatch.setattr(tensors.TensorFile, "__exit__", rewriting)
    done = invoke(*words(line))
    assert (done.returncode, "adapter_config.json: was changed while it was read" in done.stderr) == (1, True)


def test_a_base_that_is_replaced_is_an_error(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratool import extract, merge
    from loratool.numbers.ranks import Rule

    shutil.copytree(FIXTURES / "llama-tuned", files / "tuned")
    shard = files / "base" / "model-00001-of-00002.safetensors"
    for run in (
        lambda: merge(files / "base", [files / "adapter"], files / "out"),
        lambda: extract(files / "base", files / "tuned", files / "out", Rule("rank", 2)),
    ):
        with monkeypatch.context() as patch:
            happened = replaced_after_reading(patch, shard)
            with pytest.raises(LoratoolError, match="was changed while it was read"):
                run()
            assert happened()
        assert not (files / "out").exists()
