"""Disks that fill up, break or say no at any step, and runs that are stopped there: the old output or the new, and inputs as
they were."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from loratool.files.in_place import complete_interrupted_change
from tests.conftest import FIXTURES, Run
from tests.hostile.test_battery import contents

pytestmark = [pytest.mark.slow]

STEPS = ("pwrite", "fsync", "rename", "replace", "mkdir", "posix_fallocate", "copy_file_range")
"""What of the system an output is made with."""
OPERATIONS = {
    "merge into a file": "merge sdxl.safetensors style.safetensors -o out --overwrite",
    "merge into shards": "merge llama llama-lora -o out --overwrite",
    "merge with an undo file": "merge llama llama-lora -o out --undo back --overwrite",
    "merge in place": "merge llama llama-lora --in-place",
    "unmerge": "unmerge merged --undo merged.undo -o out --overwrite",
    "swap in place": "swap merged --out llama-lora --in llama-lora:0.5 --in-place",
    "convert": "convert detail.safetensors --to diffusers -o out --overwrite",
    "convert to a folder": "convert llama-lora --to peft -o out --overwrite",
    "resize": "resize llama-lora --rank 2 -o out --overwrite",
    "extract": "extract llama llama-tuned --rank 2 -o out --overwrite",
    "combine": "combine llama-lora llama-lora -o out --overwrite",
    "edit": "edit llama-lora --scale *q_proj*=2 -o out --overwrite",
    "delta": "delta llama llama-tuned -o out --overwrite",
}
FOLDERS = {
    "merge into shards", "merge with an undo file", "unmerge", "convert to a folder", "resize", "extract", "combine", "edit",
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, invoke: Run) -> Path:
    """A folder with copies of the fixtures, and a merged model with its undo file."""
    for name in ("sdxl.safetensors", "style.safetensors", "detail.safetensors", "llama", "llama-lora", "llama-tuned"):
        source = FIXTURES / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    assert invoke("merge", "llama", "llama-lora", "-o", "merged", "--undo", "merged.undo", "-q").returncode == 0
    return tmp_path


def failing(monkeypatch: pytest.MonkeyPatch, after: int, number: int) -> None:
    """Has one step of the system fail, after so many that do not."""
    left = after

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(number, os.strerror(number))
            return function(*words, **named)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))


def old_output(place: Path, operation: str) -> None:
    """What an operation is to replace."""
    if operation in FOLDERS:
        shutil.copytree(place / "llama", place / "out")
    elif "in place" not in operation:
        (place / "out").write_bytes(b"old")


def steps_of(total: int) -> Iterator[int]:
    """The first steps, the last, and some between."""
    yield from sorted({*range(6), *range(6, total, max(total // 8, 1)), *range(total - 6, total)} & set(range(total)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EXDEV], ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_step_that_fails_is_an_error_and_the_old_output_stays(
    place: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch, operation: str, number: int
) -> None:
    words = OPERATIONS[operation].split()
    old_output(place, operation)
    before = contents(place)
    calls = count()
    with monkeypatch.context() as counting:
        for name in STEPS:
            function = getattr(os, name)
            counting.setattr(os, name, lambda *w, f=function, **n: (next(calls), f(*w, **n))[1])
        assert invoke(*words).returncode == 0
    total = next(calls)
    wanted = contents(place)
    for step in steps_of(total):
        restore(place, before)
        with monkeypatch.context() as patched:
            failing(patched, step, number)
            done = invoke(*words)
        after = contents(place)
        if done.returncode == 0:
            # Whatever is only quicker that way is done in another way.
            assert after == wanted, step
            continue
        assert done.returncode == 1, step
        assert done.stderr.splitlines()[-1].startswith("error: "), step
        assert "Traceback" not in done.stderr
        # Clones that were complete go on into their places when the folder is opened.
        for name in ("llama", "merged"):
            complete_interrupted_change(place / name)
        assert contents(place) in (before, wanted), (step, done.stderr)


def restore(place: Path, before: dict[str, object]) -> None:
    """The folder as it was."""
    for path in sorted(place.rglob("*"), reverse=True):
        if str(path.relative_to(place)) not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, state in before.items():
        path = place / name
        if isinstance(state, bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != state:
                path.unlink(missing_ok=True)
                path.write_bytes(state)
