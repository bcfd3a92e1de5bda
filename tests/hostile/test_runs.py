"""What happens around a run: others that write the same output, signals, little memory, inputs that change meanwhile."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool import LoratoolError, WeightedAdapter, merge
from loratool.errors import OutputError
from loratool.files.locks import Lock
from loratool.files.output import NewOutput
from loratool.files.tensors import TensorFile
from loratool.files.transaction import sweep
from loratool.files.writer import Writer
from loratool.numbers.threads import threads_for
from tests.conftest import FIXTURES, Run
from tests.models import kohya, save

pytestmark = [pytest.mark.filterwarnings("ignore")]


def test_two_runs_never_write_one_output(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with NewOutput(target, folder=True, overwrite=True, nbytes=0, inputs=[]):
        with (
            pytest.raises(OutputError, match="out: another run is writing it"),
            NewOutput(target, folder=True, overwrite=True, nbytes=0, inputs=[]),
        ):
            pass
        with NewOutput(tmp_path / "other", folder=True, overwrite=True, nbytes=0, inputs=[]):
            pass
    assert not list(tmp_path.iterdir())
    with NewOutput(target, folder=False, overwrite=True, nbytes=0, inputs=[]):
        pass


def test_locks_of_runs_that_are_gone_are_swept_and_others_are_not(tmp_path: Path) -> None:
    held, gone = (Lock(tmp_path, name, tmp_path / name) for name in ("held", "gone"))
    held.take()
    gone.path.touch()
    living, dead = held.temporary(), gone.temporary()
    for path in (living, dead):
        path.mkdir()
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {held.path, living}
    held.release()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def big_merge(folder: Path, megabytes: int = 400) -> list[str]:
    """The words of a merge that takes a moment."""
    rows = megabytes * (1 << 20) // 2 // 1024 // 8
    tensors = {f"w{i}.weight": torch.zeros(rows, 1024, dtype=torch.bfloat16) for i in range(8)}
    save(folder / "base.safetensors", tensors)
    save(folder / "a.safetensors", kohya({f"lora_unet_w{i}": (rows, 1024) for i in range(8)}, 4, 2.0))
    return [sys.executable, "-m", "loratool", "merge", "base.safetensors", "a.safetensors", "-o", "out.safetensors"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_quietly_and_tidies_up(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = big_merge(tmp_path)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]:
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    # A merge that had gone on to its end would have left its output, and ended with 0.
    assert (process.returncode, errors) == (code, "")
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "a.safetensors"}


@pytest.mark.slow
def test_kills_leave_nothing_that_looks_like_an_output_and_the_next_run_sweeps(tmp_path: Path) -> None:
    command = big_merge(tmp_path, 100)
    base = (tmp_path / "base.safetensors").read_bytes()
    for number in range(40):
        process = subprocess.Popen([*command, "--overwrite"], cwd=tmp_path)
        # From the imports to the end, and over the writing of the output above all.
        time.sleep(1.2 + 0.04 * number)
        process.kill()
        process.wait()
        out = tmp_path / "out.safetensors"
        if out.exists():
            subprocess.run([sys.executable, "-m", "loratool", "inspect", out], check=True, capture_output=True)
    subprocess.run([*command, "--overwrite", "-q"], cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "a.safetensors", "out.safetensors"}
    assert (tmp_path / "base.safetensors").read_bytes() == base


@pytest.mark.slow
def test_kills_at_each_call_of_the_system_leave_the_old_or_the_new(tmp_path: Path) -> None:
    """Files and shards, new, replaced and in place; the run after them sweeps what they left."""
    command = [sys.executable, "-m", "tests.hostile.kills", str(tmp_path)]
    done = subprocess.run(command, cwd=FIXTURES.parent, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 200


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path) -> None:
    path.with_suffix(".new").write_bytes(b"\0" * path.stat().st_size)
    os.replace(path.with_suffix(".new"), path)


def written(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\x7f" * 64)


def test_an_input_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, replaced or written to at every read of it, and at every copy."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{i}.weight": torch.randn(64, 32, generator=generator) for i in range(8)}
    save(tmp_path / "base.safetensors", tensors | {"rest.weight": torch.randn(128, 64, generator=generator)})
    save(tmp_path / "a.safetensors", kohya({f"lora_unet_w{i}": (64, 32) for i in range(8)}, 2, 2.0))
    files = {name: (tmp_path / name).read_bytes() for name in ("base.safetensors", "a.safetensors")}
    errors = 0
    for harm, name in product((cut, replaced, written), files):
        for step in range(60):
            for other, raw in files.items():
                (tmp_path / other).write_bytes(raw)
            end = _harmed(tmp_path, monkeypatch, harm, name, step)
            assert end in ("whole", "after") or (name in end and "and an output" not in end)
            errors += name in end
            if end == "whole":
                break
        assert end == "whole"
    assert errors >= 100


def _harmed(folder: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None], name: str, step: int) -> str:
    """How a merge ends if a file is harmed before its n-th read: in an error, "whole" without that, or "after" its end."""
    left = step
    read, copy = TensorFile.read_into, Writer.copy

    def harming(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                harm(folder / name)
            return function(*words)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(TensorFile, "read_into", harming(read))
        patched.setattr(Writer, "copy", harming(copy))
        patched.setattr("loratool.numbers.threads.usable_cores", partial(int, 1))
        out = folder / "out.safetensors"
        out.unlink(missing_ok=True)
        try:
            merge(folder / "base.safetensors", [WeightedAdapter(folder / "a.safetensors")], out)
        except LoratoolError as error:
            return f"{error}{' and an output' if out.exists() else ''}"
    return "whole" if left >= 0 else "after"


@pytest.mark.parametrize("megabytes", [900, 1500, 2500, 4000, 8000])
def test_little_memory_is_an_error_that_says_so_or_enough(tmp_path: Path, megabytes: int) -> None:
    shutil.copy(FIXTURES / "sdxl.safetensors", tmp_path / "base.safetensors")
    shutil.copy(FIXTURES / "style.safetensors", tmp_path / "a.safetensors")
    limit = megabytes << 20
    command = [sys.executable, "-m", "loratool", "merge", "base.safetensors", "a.safetensors", "-o", "out.safetensors"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert "error: " in done.stderr
        assert not (tmp_path / "out.safetensors").exists()
    assert megabytes < 8000 or done.returncode == 0


def test_fewer_threads_work_where_there_is_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.numbers.threads.usable_cores", lambda: 16)
    assert [threads_for(limit) for limit in (0, 1, 2 << 30, 64 << 30)] == [16, 1, 4, 16]


def test_json_carries_errors_too(tmp_path: Path, invoke: Run) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 9)
    done = invoke("inspect", "bad.safetensors", "--json")
    assert done.returncode == 1
    assert "bad.safetensors" in json.loads(done.stdout)["error"]
    assert done.stderr.startswith("error: ")


def test_files_that_end_too_early_are_errors(tmp_path: Path) -> None:
    """What an output is copied from, and the output itself where it is read again."""
    (tmp_path / "short").write_bytes(b"1234")
    with Writer(tmp_path / "out", 16) as writer:
        with open(tmp_path / "short", "rb") as source, pytest.raises(OutputError, match="was truncated while it was copied"):
            writer.copy(source.fileno(), 0, 16, 0)
        os.truncate(tmp_path / "out", 8)
        with pytest.raises(OutputError, match="was truncated while it was written"):
            writer.read_into(memoryview(bytearray(16)), 0)


def test_a_file_system_that_cannot_preallocate_or_copy_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", refused)
    monkeypatch.setattr(os, "copy_file_range", refused)
    raw = bytes(range(256)) * 8
    (tmp_path / "source").write_bytes(raw)
    with Writer(tmp_path / "out", len(raw)) as writer, open(tmp_path / "source", "rb") as source:
        assert (tmp_path / "out").stat().st_size == len(raw)
        writer.copy(source.fileno(), 0, len(raw), 0)
    assert (tmp_path / "out").read_bytes() == raw


def test_what_is_not_called_as_a_temporary_is_anothers(tmp_path: Path) -> None:
    left = tmp_path / ".loratool-99999999999999999999-00000000.tmp"
    left.touch()
    with NewOutput(tmp_path / "out", folder=True, overwrite=False, nbytes=0, inputs=[]):
        pass
    assert left.exists()
