"""Where numbers are computed: on the CPU, or on GPUs that a few threads keep busy.

A GPU need not wait where a few threads feed it, each with a stream and page-locked memory of its own: while one thread reads
from the disk, another's numbers travel and a third's are computed or written. More threads would gain nothing, since each
has CUDA's handles and workspaces for itself. Nothing here depends on CUDA: the same code runs on the CPU, where all numbers
are in place already.
"""

from __future__ import annotations

import threading
import warnings
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
from loratool.numbers.threads import map_on_threads, memory_limit_of_addresses, usable_cores
from loratool.numbers.workload import CONTEXT_SECONDS, Workload

CPU: Final = torch.device("cpu")
MOST_LANES: Final = 3
"""Threads that feed one GPU at most: one reads, one computes, one writes."""
LANE_BYTES: Final = 1 << 30
"""Bytes of a GPU that are free for each thread that feeds it, or there are fewer threads."""
MOST_AT_ONCE: Final = 192 << 20
"""Bytes of matrices of one shape that a GPU is given at a time at most; a CPU gains nothing by batches and takes one by one.
Even few products on matrices of this size take longer than the calls that start them."""
WORKING_SETS: Final = 4
"""The memory that work on matrices takes, as a multiple of the matrices themselves."""
CUDA: Final = "cuda"

Work = TypeVar("Work")
Result = TypeVar("Result")


def devices_named(name: str) -> tuple[torch.device, ...]:
    """The devices that a name stands for: "auto" is all of CUDA's or else the CPU, "cuda" all of CUDA's, "cuda:1" one of
    CUDA's; nobody has asked yet whether they work.

    Raises `LoratoolError` for an unknown name and for a device that is not there.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", CUDA, "mps") or (number and not (kind == CUDA and number.isdecimal())):
        raise LoratoolError(f"`device={name!r}`: expected auto, cpu, cuda, cuda:N or mps")
    cuda = tuple(torch.device(CUDA, index) for index in range(cuda_count()))
    if kind == "auto":
        return cuda or (CPU,)
    mps = (torch.device("mps"),) if torch.backends.mps.is_available() else ()
    there = {"cpu": (CPU,), CUDA: cuda, "mps": mps}[kind]
    chosen = there[int(number) : int(number) + 1] if number else there
    if not chosen:
        seen = f"{len(cuda)} CUDA devices and {'an' if mps else 'no'} MPS device"
        why = why_no_cuda() if has_cuda() else "it is built without CUDA; pytorch.org has builds with it"
        more = f" ({why})" if why and kind == CUDA and not cuda else ""
        raise LoratoolError(
            f"`device={name!r}`: this torch, {torch.__version__}, sees {seen}{more}; `device='cpu'` does without"
        )
    return chosen


def has_cuda() -> bool:
    """Whether this torch is built for CUDA, or for ROCm, which answers to its name."""
    return bool(torch.version.cuda or torch.version.hip)


def cuda_count() -> int:
    """How many devices of CUDA torch sees; 0 where CUDA does not start, of which `why_no_cuda` has the reason."""
    # Where the driver is too old for this torch, asking is a warning and the answer 0.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.device_count()


def why_no_cuda() -> str | None:
    """Why CUDA does not start on a machine that has a GPU; None where there is no GPU, or no driver for one."""
    if not has_cuda():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            said = first_line(error)
            return None if any(words in said for words in ("Found no NVIDIA driver", "No CUDA GPUs are available")) else said
    return None


def trouble_with(device: torch.device) -> str | None:
    """Why a device cannot be computed on ("does not work …"); None where it works, and its libraries are loaded then.

    To be called before there are threads: torch loads its linear algebra for CUDA when it is first used, and not safely
    from several threads at once (https://github.com/pytorch/pytorch/issues/90613).
    """
    with warnings.catch_warnings():
        # That a card is too old for this torch is a warning first; the error behind it says so too.
        warnings.simplefilter("ignore")
        try:
            for dtype in (torch.float32,) if device.type == "mps" else (torch.float32, torch.float64):
                _load_linear_algebra(torch.eye(2, dtype=dtype, device=device).expand(2, 2, 2))
        except (RuntimeError, AssertionError) as error:
            fault = fault_of(error)
            if fault is None and not isinstance(error, AssertionError):
                raise
            what = "has no room for the context that computing needs" if fault is Fault.MEMORY else "does not work"
            return f"{what} ({first_line(error)})"
    return None


def _load_linear_algebra(matrices: Tensor) -> None:
    """Runs, on small matrices, every operation of linear algebra that is run on a device, and waits for the results."""
    if matrices.device.type == "mps":
        # Factors are decomposed on the CPU there: products are all that is asked of it.
        (matrices @ matrices).cpu()
        return
    root, _ = torch.linalg.cholesky_ex(matrices)
    reflectors, tau = torch.geqrf(matrices.clone())
    done = (
        torch.linalg.solve_triangular(root.mT, matrices, upper=True, left=False),
        torch.linalg.eigh(matrices @ matrices).eigenvalues,
        torch.linalg.qr(matrices).Q,
        torch.linalg.svdvals(matrices),
        torch.ormqr(reflectors[0], tau[0], matrices[0]),
        torch.linalg.vector_norm(matrices[0].addmm(matrices[0], matrices[0]), dim=0),
    )
    for each in done:
        each.cpu()


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


def open_devices(
    name: str = "cpu", work: Workload | None = None, *, doubles: bool = False, staged: bool = False
) -> DevicePool:
    """The pool of the devices called `name`, each of them tried.

    "auto" takes the GPUs where they do `work` faster than the CPU, and the CPU where no GPU works. The CPU stands in for
    Apple's GPU for work that needs `doubles`, float64. Raises `LoratoolError` where a device that is asked for is not there
    or does not work.
    """
    found, auto = devices_named(name), name == "auto"
    if found[0].type == "mps" and doubles:
        return DevicePool((CPU,), why="Apple's GPU has no float64, which this work needs")
    if found == (CPU,):
        said = why_no_cuda() if auto else None
        why = f"CUDA does not start ({said})" if said else "there is no GPU" if auto else "as asked"
        return DevicePool((CPU,), staged=staged, why=why, notes=(f"{why}: computed on the CPU",) if said else ())
    if auto and (reason := _better_on_cpu(work, len(found))):
        return DevicePool((CPU,), why=reason)
    troubles = [(device, trouble_with(device)) for device in found]
    wrong = [f"{device} {trouble}" for device, trouble in troubles if trouble]
    if wrong and not auto:
        raise LoratoolError(f"`device={name!r}`: {'; '.join(wrong)}; `device='cpu'` does without")
    usable = tuple(device for device, trouble in troubles if not trouble)
    if not usable:
        return DevicePool((CPU,), why=wrong[0], notes=(f"{'; '.join(wrong)}: computed on the CPU",))
    lanes, at_once = room_on(usable)
    return DevicePool(
        usable,
        staged=True,
        strict=not auto,
        why="it is expected to be faster than the CPU" if auto else "as asked",
        notes=tuple(f"{trouble}: computed without it" for trouble in wrong),
        lanes=lanes,
        at_once=at_once,
    )


def _better_on_cpu(work: Workload | None, gpus: int) -> str | None:
    """Why work is left to the CPU though there are GPUs; None where these are expected to be faster."""
    if memory_limit_of_addresses():
        return "the process may not have as many addresses (ulimit -v) as a GPU's context takes"
    if work is None:
        return None
    here, there, disk = work.seconds_on_cpu(usable_cores()), work.seconds_on_gpu(gpus), work.seconds_on_disk()
    if here > there:
        return None
    if here < CONTEXT_SECONDS:
        return f"the work is smaller than the {CONTEXT_SECONDS:g} s that a GPU takes to open"
    bound = "the disk bounds the work" if disk >= 0.9 * here else "it is expected to be as fast as the GPU"
    return f"{bound}: {here:.1f} s on the CPU, {there:.1f} s with a GPU"


def room_on(devices: Sequence[torch.device]) -> tuple[int, int]:
    """The threads that feed each of the devices, and the bytes that each thread gives a device at once, by what is free on
    the fullest of them."""
    if devices[0].type != CUDA:
        return MOST_LANES, MOST_AT_ONCE
    free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    lanes = max(1, min(MOST_LANES, free // LANE_BYTES))
    return lanes, min(MOST_AT_ONCE, free // (lanes * WORKING_SETS))


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
