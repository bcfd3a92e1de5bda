"""Work in pieces on a few threads, ended by the first error; and the cores and memory that a process may use."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from loratool.numbers.settings import steady_arithmetic

THREAD_BYTES: Final = 512 << 20
"""Memory to reckon with for each thread, with the parts of a model and its adapters that the thread holds."""
CGROUP_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""The files with a container's memory limit: of Linux's control groups version 2, and version 1."""

_T = TypeVar("_T")

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and with the total to do."""


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    try:
        # Linux's ru_maxrss may be the parent's, from before this process became its own program.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        # macOS gives bytes, other systems KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def progress_counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """A function that adds a piece's bytes to those done and tells `progress`; to be called from one thread."""
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    return add


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit_of_addresses() -> int:
    """The bytes of addresses that this process may reserve (ulimit -v), used or not; 0 where there is no limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return limit if 0 < limit < 1 << 60 else 0


def memory_limit() -> int:
    """The bytes that this process may take by its container's limit and its own (ulimit -v); 0 where there is no limit."""
    limits = [memory_limit_of_addresses()]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(path.read_text()))
    # "No limit" is -1 of POSIX's limits, the word max of cgroup v2, which int refuses, and almost 2^63 of cgroup v1.
    return min((limit for limit in limits if 0 < limit < 1 << 60), default=0)


def memory_sizes() -> dict[str, int]:
    """Linux's /proc/meminfo in bytes; nothing elsewhere."""
    try:
        # What the kernel calls kB are 1024 bytes. Counts of huge pages have no unit and come out wrong; nobody uses them.
        lines = Path("/proc/meminfo").read_text().splitlines()
        return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    except (OSError, ValueError, IndexError):
        return {}


def usable_memory() -> int:
    """The bytes that this process may hope for: its limit or what the machine has available, whichever is less; 0 where the
    system tells neither."""
    return min((size for size in (memory_limit(), memory_sizes().get("MemAvailable", 0)) if size), default=0)


def threads_for(room: int) -> int:
    """The number of threads that work at once: one for each core, as far as `room`, the bytes of memory for all of them,
    allows; 0 stands for memory that is not known."""
    return max(1, min(usable_cores(), room // THREAD_BYTES if room else usable_cores()))


def run_all(
    pieces: Iterable[Callable[[], _T]],
    done: Callable[[int, _T], None],
    stopped: threading.Event,
    *,
    threads: int | None = None,
) -> None:
    """Calls every piece on a thread, and `done` in the calling thread with each piece's number and result, as pieces end.

    Each thread computes with one core: pieces are too small to share, and sums must not depend on the number of cores.
    `stopped` is set at the end, so that pieces that look at the event stop early after an error or an interruption.
    """
    count = threads or threads_for(usable_memory())
    running, numbered = dict[Future[_T], int](), enumerate(pieces)
    with steady_arithmetic(), ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, 1)) as pool:
        try:
            while True:
                # Pieces are made only as threads get to them; as many again in the queue keep every thread busy.
                for index, piece in numbered:
                    running[pool.submit(piece)] = index
                    if len(running) >= 2 * count:
                        break
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done(running.pop(future), future.result())
        finally:
            # Before the wait: pieces that are running look at the event, and the queued ones never start.
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)


def read_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The items, each next one made by a thread of its own while the caller works on the one before."""
    with ThreadPoolExecutor(1) as pool:
        # An iterator cannot end within a future, so that a value of its own stands for the end.
        end = object()
        coming: Future[Any] = pool.submit(next, items, end)
        while (found := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield found


def map_on_threads(pieces: Iterable[Callable[[], _T]], *, threads: int | None = None) -> list[_T]:
    """The results of the pieces, run by `run_all`, in the order of the pieces."""
    done: dict[int, _T] = {}
    run_all(pieces, done.__setitem__, threading.Event(), threads=threads)
    return [done[number] for number in range(len(done))]
