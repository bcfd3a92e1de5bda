"""Resizing, combining and comparing SDXL-shaped adapters of rank 128.

`python -m benchmarks.resize [--folder DIR] [--rounds N] [--only PART]`. Whole processes, starting Python and importing torch
included. The floor of each is a process that imports torch, reads the same bytes and writes as many as the output has,
synced like ours. The SVD of the products is that of one module of each shape, counted as often as the shape occurs; ours, of
the same modules in the same threads, are counted in the same way.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from benchmarks import common
from loratool.adapter.adapter import Change
from loratool.adapter.load import load
from loratool.numbers.factor import Storage, recompress
from loratool.numbers.ranks import Rule

RANK, LOWER = 128, 32
FLOOR = """
import os, sys, torch
*sources, out, size = sys.argv[1:]
left = int(size)
with open(out, "wb") as target:
    for source in sources:
        data = torch.empty(os.path.getsize(source), dtype=torch.uint8).numpy()
        with open(source, "rb") as file:
            file.readinto(data)
        left -= target.write(memoryview(data)[:left])
    while left > 0:
        left -= target.write(memoryview(data)[:left])
    target.flush()
    os.fsync(target.fileno())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put some 8 GB; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(PARTS), help="one part of it")
    arguments = parser.parse_args()
    print(common.machine())
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="loratool-bench-") as name:
        adapters = [common.sdxl_lora(Path(name, f"{letter}.safetensors"), RANK) for letter in "abc"]
        for part in [arguments.only] if arguments.only else PARTS:
            PARTS[part](adapters, arguments.rounds)


def resize_part(adapters: list[Path], rounds: int) -> None:
    against_floor(f"resize to rank {LOWER}", adapters[:1], ["--rank", str(LOWER)], rounds, verb="resize")


def combine_part(adapters: list[Path], rounds: int) -> None:
    weighed = [f"{path}:{strength}" for path, strength in zip(adapters, (0.7, 0.4, -0.3), strict=True)]
    against_floor("combine three, exactly", adapters, [], rounds, verb="combine", words=weighed)
    lower = ["--rank", str(LOWER)]
    against_floor(f"combine three to rank {LOWER}", adapters, lower, rounds, verb="combine", words=weighed)


def compare_part(adapters: list[Path], rounds: int) -> None:
    """Comparing writes nothing."""
    for paths in (adapters[:2], adapters):
        command = [sys.executable, "-m", "loratool", "compare", *map(str, paths), "--arch", "sdxl", "-q"]
        taken = common.in_turns(
            {"compare": lambda command=command: common.timed(lambda: subprocess.run(command, check=False))},  # type: ignore[misc]
            rounds,
            lambda: None,
        )
        print(f"compare {len(paths)} of rank {RANK}: {taken['compare']:.2f} s")


def against_floor(
    title: str, sources: list[Path], options: list[str], rounds: int, *, verb: str, words: list[str] | None = None
) -> None:
    """Prints our time as a ratio to that of reading and writing the same bytes."""
    out = sources[0].parent / "out.safetensors"
    common.clear(out)
    inputs = words or [str(path) for path in sources]
    common.loratool(verb, *inputs, "-o", out, *options)
    size = out.stat().st_size
    floor = [sys.executable, "-c", FLOOR, *map(str, sources), str(out), str(size)]

    def ours() -> float:
        return float(common.loratool(verb, *inputs, "-o", out, *options)["whole"])

    taken = common.in_turns(
        {"floor": lambda: common.timed(lambda: subprocess.run(floor, check=True)), "ours": ours},
        rounds,
        lambda: common.clear(out),
    )
    peak = common.peak_of(verb, *inputs, "-o", out, "--overwrite", *options)
    common.clear(out)
    total = sum(path.stat().st_size for path in sources)
    ratio = taken["ours"] / taken["floor"]
    print(
        f"{title}: {total / 1e9:.2f} GB to {size / 1e9:.2f} GB, {taken['ours']:.2f} s = {ratio:.2f} × importing torch, "
        f"reading and writing the same bytes ({taken['floor']:.2f} s); peak memory {peak / 1e9:.2f} GB"
    )


def svd_part(adapters: list[Path], rounds: int) -> None:
    """Prints how much longer the SVD of all products takes, from one of each shape that is at least a hundredth of all."""
    changes = load(adapters[0]).changes
    shapes = Counter(map(_matrix, changes))
    common_ones = [shape for shape, count in shapes.items() if count * 100 >= len(changes)]
    slow = fast = 0.0
    for shape in common_ones:
        delta = next(change.delta for change in changes if _matrix(change) == shape)
        factors = delta.factors()
        assert factors
        up, down = factors
        product = up @ down
        started = time.perf_counter()
        torch.linalg.svd(product, full_matrices=False)
        slow += shapes[shape] * (time.perf_counter() - started)
        run = partial(recompress, up, down, Rule("rank", LOWER), Storage(torch.float16))
        run()
        started = time.perf_counter()
        for _ in range(10 * rounds):
            run()
        fast += shapes[shape] * (time.perf_counter() - started) / (10 * rounds)
    print(
        f"SVD of the products of {sum(shapes[shape] for shape in common_ones)} modules: {slow:.0f} s, "
        f"ours of the factors {fast:.2f} s: {slow / fast:.0f} ×"
    )


def _matrix(change: Change) -> tuple[int, int]:
    """The shape of a weight as a matrix."""
    return change.delta.shape[0], math.prod(change.delta.shape[1:])


PARTS = {"resize": resize_part, "combine": combine_part, "compare": compare_part, "svd": svd_part}


if __name__ == "__main__":
    main()
