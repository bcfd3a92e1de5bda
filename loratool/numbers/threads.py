"""Work in pieces on a few threads, ended by the first error; and the cores and memory that a process may use."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import torch

from loratool.numbers.devices import exact_products

MOST_THREADS: Final = 8
"""Threads that work at once at most."""
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


def memory_limit() -> int:
    """The bytes that this process may take by its container's limit and its own (ulimit -v); 0 where there is no limit."""
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0]]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(path.read_text()))
    # "No limit" is -1 of POSIX's limits, the word max of cgroup v2, which int refuses, and almost 2^63 of cgroup v1.
    return min((limit for limit in limits if 0 < limit < 1 << 60), default=0)


def threads_for(limit: int) -> int:
    """The number of threads that work at once where memory is limited to `limit` bytes; 0 means no limit."""
    room = limit // THREAD_BYTES if limit else MOST_THREADS
    return max(1, min(MOST_THREADS, usable_cores(), room))


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
    count = threads or threads_for(memory_limit())
    before, running, numbered = torch.get_num_threads(), dict[Future[_T], int](), enumerate(pieces)
    with exact_products(), ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, 1)) as pool:
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
            torch.set_num_threads(before)


def map_on_threads(pieces: Iterable[Callable[[], _T]]) -> list[_T]:
    """The results of the pieces, run by `run_all`, in the order of the pieces."""
    done: dict[int, _T] = {}
    run_all(pieces, done.__setitem__, threading.Event())
    return [done[number] for number in range(len(done))]
