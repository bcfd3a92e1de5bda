"""Where numbers are computed: on the CPU, or on GPUs that a few threads keep busy.

A GPU need not wait where a few threads feed it, each with a stream and page-locked memory of its own: while one thread reads
from the disk, another's numbers travel and a third's are computed or written. More threads would gain nothing, since each
has CUDA's handles and workspaces for itself. Nothing here depends on CUDA: the same code runs on the CPU, where all numbers
are in place already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Final, TypeVar

import torch
from torch import Tensor

from loratool.errors import LoratoolError
from loratool.numbers.faults import Fault, fault_of, first_line
from loratool.numbers.threads import map_on_threads

CPU: Final = torch.device("cpu")
MOST_LANES: Final = 3
"""Threads that feed one GPU at most: one reads, one computes, one writes."""
MOST_AT_ONCE: Final = 192 << 20
"""Bytes of matrices of one shape that a GPU is given at a time at most; a CPU gains nothing by batches and takes one by one.
Even few products on matrices of this size take longer than the calls that start them."""
CUDA: Final = "cuda"

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(slots=True)
class _Lane:
    """One thread's way to a device: the stream to work on, where the device has streams."""

    device: torch.device
    stream: torch.cuda.Stream | None = None


@dataclass(slots=True)
class DevicePool:
    """The devices that the threads of a verb compute on by turns, and what happened to them.

    `staged` says whether numbers have to travel; a test may say so of the CPU, to run the code that a GPU would. `strict`
    says that a device that breaks in the middle ends the work, and not only its own part in it. `why` says in words how the
    devices were chosen, `notes` what the user should know of that.
    """

    devices: tuple[torch.device, ...]
    staged: bool = False
    strict: bool = True
    why: str = ""
    notes: tuple[str, ...] = ()
    lanes: int = MOST_LANES
    at_once: int = MOST_AT_ONCE
    moved: list[str] = field(default_factory=list)
    broken: dict[torch.device, str] = field(default_factory=dict)
    _turns: Iterator[int] = field(default_factory=count)
    _mine: threading.local = field(default_factory=threading.local)

    @property
    def threads(self) -> int | None:
        """How many threads are to work at once: a few for each device, or for the CPU as many as there are cores, None."""
        return self.lanes * len(self.devices) if self.staged else None

    @property
    def device(self) -> torch.device:
        """The calling thread's device: threads take turns."""
        return self._lane().device

    def run_batch(
        self, what: str, items: Sequence[Work], compute: Callable[[Sequence[Work], torch.device], list[Result]]
    ) -> list[Result]:
        """Runs `compute` on this thread's device: on half of the items at a time where memory runs out, and on the CPU as
        the last resort, which `warnings` tells.

        Raises `LoratoolError` where a device that was asked for by name breaks.
        """
        device = self.device
        if device in self.broken:
            return compute(items, CPU)
        try:
            with self._stream():
                return compute(items, device)
        except RuntimeError as error:
            fault = fault_of(error)
            if fault is None or not self.staged:
                raise
            said = first_line(error)
        # Outside the handler, since the exception's traceback keeps the tensors of the failed attempt alive.
        if fault is Fault.BROKEN:
            if self.strict:
                raise LoratoolError(f"{device} broke in the middle of {what} ({said}); `device='cpu'` does without")
            self.broken.setdefault(device, f"{device} broke at {what} ({said}): the rest was done on the CPU")
            return compute(items, CPU)
        _free_memory(device)
        if len(items) > 1:
            half = len(items) // 2
            return self.run_batch(what, items[:half], compute) + self.run_batch(what, items[half:], compute)
        self.moved.append(what)
        return compute(items, CPU)

    def run_one(self, what: str, compute: Callable[[torch.device], Result]) -> Result:
        """Runs `compute` on this thread's device, or on the CPU where memory runs out."""
        (found,) = self.run_batch(what, [None], lambda _, device: [compute(device)])
        return found

    def batches(
        self, items: Iterable[Work], alike: Callable[[Work], Hashable], nbytes: Callable[[Work], int]
    ) -> list[list[Work]]:
        """Items that are `alike` together, as many as a device is given at once by the bytes of each; one by one and in
        their order for the CPU, which gains nothing by batches."""
        if not self.staged:
            return [[item] for item in items]
        groups: dict[Hashable, list[Work]] = {}
        for item in items:
            groups.setdefault(alike(item), []).append(item)
        done = []
        for group in groups.values():
            size = max(1, self.at_once // max(nbytes(group[0]), 1))
            done += [group[start : start + size] for start in range(0, len(group), size)]
        return done

    def map_alike(
        self,
        items: Iterable[Work],
        compute: Callable[[Sequence[Work], torch.device], list[Result]],
        *,
        title: Callable[[Work], str],
        alike: Callable[[Work], Hashable],
        nbytes: Callable[[Work], int],
    ) -> dict[Work, Result]:
        """The result of `compute` for each item, in the order of the items, computed by threads in `batches`; an item's
        title names it in warnings."""
        numbered = dict.fromkeys(items)
        batches = self.batches(numbered, alike, nbytes)
        pieces = (partial(self.run_batch, title(batch[0]), batch, compute) for batch in batches)
        found: dict[Work, Result] = {}
        for batch, results in zip(batches, map_on_threads(pieces, threads=self.threads), strict=True):
            found |= zip(batch, results, strict=True)
        return {item: found[item] for item in numbered}

    def warnings(self) -> Iterator[str]:
        """Warnings for a report: devices that do not work, broke, or whose memory ran out."""
        yield from self.notes
        yield from self.broken.values()
        if self.moved:
            number, first = len(self.moved), self.moved[0]
            yield f"{self.title} ran out of memory: {number} pieces of work were done on the CPU, the first is {first}"

    @property
    def title(self) -> str:
        """The devices in words."""
        return ", ".join(map(str, self.devices))

    def _lane(self) -> _Lane:
        if not hasattr(self._mine, "lane"):
            self._mine.lane = _Lane(self.devices[next(self._turns) % len(self.devices)])
        lane: _Lane = self._mine.lane
        return lane

    def _stream(self) -> torch.cuda.StreamContext | nullcontext[None]:
        lane = self._lane()
        if lane.device.type != CUDA:
            return nullcontext()
        # Made at its first use, where an error of the device is looked after.
        if lane.stream is None:
            lane.stream = torch.cuda.Stream(lane.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(lane.stream)


def _free_memory(device: torch.device) -> None:
    """Gives back what torch keeps of a device's memory for later, where the device has such a store."""
    if device.type == CUDA:
        torch.cuda.empty_cache()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, copied without waiting from page-locked memory; the very tensor where it is there already."""
    return tensor.to(device, non_blocking=tensor.is_pinned()) if tensor.device != device else tensor


def pins_memory(device: torch.device) -> bool:
    """Whether host memory is to be page-locked, so that copies to the device overlap with computing."""
    return device.type == CUDA


def to_float64(tensor: Tensor) -> Tensor:
    """`tensor` in float64, on its device where that has float64; on the CPU for Apple's GPUs, which have none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
