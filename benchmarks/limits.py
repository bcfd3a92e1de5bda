"""What strangers' files and failing disks can cost: `python -m benchmarks.limits [--folder DIR]`.

Each file of the tests' battery, and a header beyond what an adapter may have, goes through `inspect` and `merge` in a fork
of this process, whose seconds and peak memory the kernel tells. Then merges of bases of two sizes: memory for each byte of
base, and the most that their disk held, measured while they ran.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import loratool.verbs.merge.merge  # noqa: F401 (forks have it already)
from benchmarks import common
from loratool.cli import cli
from tests.hostile.cases import CASES, base_tensors, packed, stored

VERBS = {"inspect": "inspect -- {0}", "merge": "merge -o out -- base.safetensors {0}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put some 8 GB; default: a temporary folder")
    arguments = parser.parse_args()
    print(common.machine())
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="loratool-bench-") as name:
        folder = Path(name)
        hostile(folder)
        merging(folder)


def hostile(folder: Path) -> None:
    """Prints the longest and the largest run over the battery, and that of a header of 26 MB."""
    (folder / "base.safetensors").write_bytes(stored(base_tensors()))
    before = os.getcwd()
    os.chdir(folder)
    runs = []
    for case in CASES:
        path = folder / case.file
        case.write(path)
        small = not path.is_file() or path.stat().st_size < 200_000
        if small:
            runs += [(*forked(words.format(case.file)), f"{verb}, {case.name}") for verb, words in VERBS.items()]
        common.clear(path)
        common.clear(folder / "out")
    print(f"{len(runs)} runs with files under 200 kB, without the imports' two seconds:")
    for title, index, unit in (("longest", 0, 1.0), ("largest", 1, 1e6)):
        worst = max(runs, key=lambda run: run[index])
        print(f"  {title}: {worst[index] / unit:.3g} {'s' if index == 0 else 'MB'} ({worst[2]})")
    header = b'{"__metadata__":{"a":"' + b"x" * 26_000_000 + b'"}}'
    (folder / "large.safetensors").write_bytes(packed(header, b""))
    seconds, peak = forked("merge -o out -- base.safetensors large.safetensors")
    print(f"an adapter's header of 26 MB: {seconds:.2f} s, {peak / 1e6:.0f} MB")
    os.chdir(before)


def forked(line: str) -> tuple[float, int]:
    """Seconds and peak memory of a command in a fork, which has what this process imported."""
    child = os.fork()
    started = time.perf_counter()
    if child == 0:
        nowhere = io.StringIO()
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), contextlib.suppress(BaseException):
            cli(line.split())
        os._exit(0)
    _, _, usage = os.wait4(child, 0)
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def merging(folder: Path) -> None:
    """Prints how memory grows with the base, and what the disk has to hold while an output is made."""
    figures = []
    for layers in (6, 22):
        base = common.llama(folder / f"base{layers}", layers=layers)
        adapter, out = common.peft_adapter(folder / f"adapter{layers}", base), folder / "out"
        report, most = watched(folder, partial(common.loratool, "merge", base, adapter, "-o", out))
        size = sum(path.stat().st_size for path in base.iterdir())
        written = sum(path.stat().st_size for path in out.iterdir())
        figures.append((size, report["peak_bytes"]))
        print(
            f"merge into {size / 1e9:.2f} GB: peak {report['peak_bytes'] / 1e6:.0f} MB in all; "
            f"the disk held {most / written:.3f} × the output at most"
        )
        common.clear(out)
    (one, less), (two, more) = figures
    print(f"slope: {(more - less) / (two - one):.4f} byte for each byte of base, the adapter's own growth included")


def watched(folder: Path, work: Callable[[], dict[str, float]]) -> tuple[dict[str, float], int]:
    """What `work` returns, and the most bytes beyond those of before that the folder's files took meanwhile."""
    before, most, done = taken(folder), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, taken(folder) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        report = work()
    finally:
        done.set()
        watcher.join()
    return report, max(most, taken(folder) - before)


def taken(folder: Path) -> int:
    """Bytes on the disk that the files below a folder take."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total


if __name__ == "__main__":
    main()
