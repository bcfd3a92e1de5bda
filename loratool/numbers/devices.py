"""Where numbers are computed: on the CPU, or on GPUs that several threads keep busy.

A GPU need not wait where several threads feed it, each with a stream and page-locked memory of its own: while one thread
reads from the disk, another's numbers travel, a third's are computed and a fourth's are written. Nothing here depends on
CUDA: the same code runs on the CPU, where all numbers are in place already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Final, TypeVar

import torch
from torch import Tensor

from loratool.errors import LoratoolError

CPU: Final = torch.device("cpu")
AT_ONCE: Final = 1 << 30
"""Bytes of matrices of one shape that a GPU is given at a time; a CPU gains nothing by batches and takes one by one."""

Work = TypeVar("Work")
Result = TypeVar("Result")


def devices_named(name: str) -> tuple[torch.device, ...]:
    """The devices to compute on: "auto" is all of CUDA's or else the CPU, "cuda" all of CUDA's, "cuda:1" one of CUDA's.

    Raises `LoratoolError` for an unknown name and for a device that is not there.
    """
    cuda = tuple(torch.device("cuda", number) for number in range(torch.cuda.device_count()))
    mps = (torch.device("mps"),) if torch.backends.mps.is_available() else ()
    if name == "auto":
        return cuda or (CPU,)
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdecimal())):
        raise LoratoolError(f"`device={name!r}`: expected auto, cpu, cuda, cuda:N or mps")
    there = {"cpu": (CPU,), "cuda": cuda, "mps": mps}[kind]
    chosen = there[int(number) : int(number) + 1] if number else there
    if not chosen:
        seen = f"{len(cuda)} CUDA devices and {'an' if mps else 'no'} MPS device"
        raise LoratoolError(f"`device={name!r}`: this torch, {torch.__version__}, sees {seen}; `device='cpu'` does without")
    return chosen


class DevicePool(threading.local):
    """Each thread's way to a device: the device, by turns, the stream to work on, and what to do when memory runs out.

    `staged` says whether numbers have to travel; a test may say so of the CPU, to run the code that a GPU would.
    """

    # `threading.local` calls this again in every thread that uses the pool, with the same arguments: `turns` and `moved` are
    # shared by all threads, while the device and the stream are the thread's own.
    def __init__(self, devices: Sequence[torch.device], turns: Iterator[int], moved: list[str], *, staged: bool) -> None:
        self.devices = devices
        self.staged = staged
        self.moved = moved
        self.device = devices[next(turns) % len(devices)]
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def pins_memory(self) -> bool:
        """Whether host memory is to be page-locked, so that copies to the device overlap with computing."""
        return self.device.type == "cuda"

    def run_batch(
        self, what: str, items: Sequence[Work], compute: Callable[[Sequence[Work], torch.device], list[Result]]
    ) -> list[Result]:
        """Runs `compute` on this thread's device, halving the batch when memory runs out, and on the CPU as the last resort
        (recorded in `warnings`)."""
        try:
            with self._stream():
                return compute(items, self.device)
        except torch.OutOfMemoryError:
            if self.device == CPU and not self.staged:
                raise
        # Outside the handler, since the exception's traceback keeps the tensors of the failed attempt alive.
        if self.pins_memory:
            torch.cuda.empty_cache()
        if len(items) > 1:
            half = len(items) // 2
            return self.run_batch(what, items[:half], compute) + self.run_batch(what, items[half:], compute)
        self.moved.append(what)
        return compute(items, CPU)

    def run_one(self, what: str, compute: Callable[[torch.device], Result]) -> Result:
        """Runs `compute` on this thread's device, or on the CPU where memory runs out."""
        (found,) = self.run_batch(what, [None], lambda _, device: [compute(device)])
        return found

    def warnings(self) -> Iterator[str]:
        """The warning for a report where a device's memory ran out, if any did."""
        if self.moved:
            count, first = len(self.moved), self.moved[0]
            yield f"{self.title} ran out of memory: {count} pieces of work were done on the CPU, the first is {first}"

    @property
    def title(self) -> str:
        """The devices in words."""
        return ", ".join(map(str, self.devices))

    def _stream(self) -> torch.cuda.StreamContext | nullcontext[None]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()


def open_devices(name: str = "cpu", *, doubles: bool = False, staged: bool = False) -> DevicePool:
    """The pool of the devices called `name`; the CPU instead of Apple's GPU for work that needs `doubles`, float64. Raises
    `LoratoolError` where the devices are not there."""
    devices = devices_named(name)
    if doubles and devices[0].type == "mps":
        devices = (CPU,)
    return DevicePool(devices, count(), [], staged=staged or devices[0] != CPU)


@contextmanager
def exact_products() -> Iterator[None]:
    """Has float32 products computed in float32 within the context: the calling program may have allowed TF32, whose ten bits
    of mantissa would then bound every result."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, copied without waiting from page-locked memory; the very tensor where it is there already."""
    return tensor.to(device, non_blocking=tensor.is_pinned()) if tensor.device != device else tensor


def to_float64(tensor: Tensor) -> Tensor:
    """`tensor` in float64, on its device where that has float64; on the CPU for Apple's GPUs, which have none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
