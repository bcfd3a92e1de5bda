"""What a machine can do at most: how fast it copies and multiplies, measured where the work runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import common

SIDE = 4096
"""Of the matrices that are multiplied."""
GIBIBYTE = 1 << 30


def disk(folder: Path, nbytes: int = 2 * GIBIBYTE) -> float:
    """Bytes a second that `cp` and a sync take to copy a file that the page cache holds."""
    source, target = folder / "floor.bin", folder / "floor-copy.bin"
    with open(source, "wb") as file:
        block = torch.randint(0, 256, (1 << 24,), dtype=torch.uint8).numpy().tobytes()
        for _ in range(nbytes // len(block)):
            file.write(block)
    time.sleep(common.PAUSE_SECONDS)
    seconds = common.copy(source, target, sync=True)
    for path in (source, target):
        common.clear(path)
    return nbytes / seconds


def matmul(device: torch.device, columns: int = SIDE) -> float:
    """Operations a second of a float32 product, (4096, 4096) by (4096, columns)."""
    one = torch.randn(SIDE, SIDE, device=device)
    other = torch.randn(SIDE, columns, device=device)
    seconds = best(lambda: one @ other, device)
    return 2 * SIDE * SIDE * columns / seconds


def pcie(device: torch.device) -> tuple[float, float]:
    """Bytes a second to the device and back, from page-locked memory."""
    here = torch.empty(GIBIBYTE, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(GIBIBYTE, dtype=torch.uint8, device=device)
    to = best(lambda: there.copy_(here, non_blocking=True), device)
    back = best(lambda: here.copy_(there, non_blocking=True), device)
    return GIBIBYTE / to, GIBIBYTE / back


def memory(device: torch.device) -> float:
    """Bytes a second that the device copies in its own memory: read and written."""
    one = torch.empty(GIBIBYTE, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    return 2 * GIBIBYTE / best(lambda: other.copy_(one), device)


def best(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """The least seconds of a few calls, until the device is done with each."""
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def described(device: torch.device) -> str:
    """The device, and what was measured of it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else common.machine()
    rates = f"float32 products {matmul(device) / 1e12:.2f} TFLOP/s"
    if device.type != "cuda":
        return f"{name}: {rates}"
    to, back = pcie(device)
    return f"{name}: {rates}, PCIe {to / 1e9:.1f} and {back / 1e9:.1f} GB/s, its memory {memory(device) / 1e9:.0f} GB/s"
