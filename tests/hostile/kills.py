"""Merges that are killed at a chosen call of the system: `python -m tests.hostile.kills FOLDER` prints how many there were.

This process has imported everything and computed nothing, so that each merge is a fork of it, which takes no two seconds to
start. The fork kills itself at its n-th call, as a power cut or the kernel would: nothing is tidied up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loratool import WeightedAdapter, merge
from loratool.files.in_place import complete_interrupted_change
from tests.conftest import FIXTURES
from tests.hostile.test_battery import contents

CALLS = ("pwrite", "preadv", "fsync", "rename", "replace", "mkdir", "posix_fallocate", "copy_file_range", "unlink")
State = dict[str, object]
MERGES: dict[str, tuple[str, str, str | None]] = {
    "into shards": ("llama", "llama-lora", "out"),
    "into a file": ("sdxl.safetensors", "style.safetensors", "out"),
    "in place": ("llama", "llama-lora", None),
}


MOST = 90
"""Kills of one merge: at its first calls, at its last, and at some between."""


def done_in_fork(action: Callable[[], object], deadly: int) -> int:
    """Does `action` in a fork that kills itself before its `deadly` call; returns when it is gone, with how many there were
    if it came to its end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as told:
            calls = int(told.read() or 0)
        os.waitpid(child, 0)
        return calls
    left = deadly

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*words, **named)

        return call

    for name in CALLS:
        setattr(os, name, guarded(getattr(os, name)))
    with contextlib.suppress(BaseException):
        action()
    os.write(writing, str(deadly - left).encode())
    os._exit(0)


def killed(folder: Path, title: str, *, old: bool) -> int:
    """Kills one merge at each of its calls; `old` says whether there is an output already. How many kills it took."""
    base, adapter, out = MERGES[title]
    for name in (base, adapter):
        source = FIXTURES / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    if old and out:
        (shutil.copytree if (folder / base).is_dir() else shutil.copy)(folder / base, folder / out)
    before = contents(folder)

    def action() -> None:
        merge(folder / base, [WeightedAdapter(folder / adapter)], folder / out if out else None, overwrite=True)

    total = done_in_fork(action, sys.maxsize)
    wanted = contents(folder)
    for step in (steps := steps_of(total)):
        put_back(folder, before)
        done_in_fork(action, step)
        check(folder, base, before, wanted)
    put_back(folder, before)
    done_in_fork(action, sys.maxsize)
    assert contents(folder) == wanted, f"{title}: the next good run leaves something else"
    shutil.rmtree(folder)
    folder.mkdir()
    return len(steps)


def steps_of(total: int) -> list[int]:
    between = range(MOST // 3, total - MOST // 3, max(1, 3 * total // MOST))
    return sorted({*range(MOST // 3), *between, *range(total - MOST // 3, total)} & set(range(total)))


def check(folder: Path, base: str, before: State, wanted: State) -> None:
    """Raises where a merge left anything that is neither old nor new."""
    if (folder / base).is_dir():
        complete_interrupted_change(folder / base)
    found = contents(folder)
    told = {name: raw for name, raw in found.items() if not temporary(name) and ".old-" not in name}
    aside = {name for name in found if ".old-" in name}
    gone = {name: raw for name, raw in before.items() if name.partition("/")[0] != "out"}
    # Between its two renames a folder that is replaced lies aside, whole, and nothing has its name.
    assert told in (before, wanted) or (told == gone and aside), sorted(told)


def temporary(name: str) -> bool:
    return any(part.startswith(".loratool-") for part in name.split("/"))


def put_back(folder: Path, before: State) -> None:
    """The folder as it was, but for temporaries, which the run that follows is to sweep."""
    for path in sorted(folder.rglob("*"), reverse=True):
        name = str(path.relative_to(folder))
        if name not in before and not temporary(name):
            path.rmdir() if path.is_dir() else path.unlink()
    for name, raw in before.items():
        path = folder / name
        if isinstance(raw, bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)


def main() -> None:
    folder = Path(sys.argv[1])
    total = 0
    for title in MERGES:
        for old in (False, True) if MERGES[title][2] else (False,):
            total += killed(folder, title, old=old)
    print(total)


if __name__ == "__main__":
    main()
