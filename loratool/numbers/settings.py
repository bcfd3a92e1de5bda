"""torch's own settings while a verb works: one core for each thread, and float32 products in float32.

torch computes each operation with a team of threads, one for each core, that waits for the next operation in a loop: beside
a pool of threads that each compute on their own, the team takes the cores from the pool and gives nothing for them. And the
calling program may have allowed TF32, whose ten bits of mantissa would then bound every result.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Depth(threading.local):
    """How often a thread has entered `steady_arithmetic` and not left it."""

    depth = 0


class _Shared:
    """How many threads are within `steady_arithmetic`, and what was set before the first of them entered: the precision of
    products, and the number of torch's threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.precision = ""
        self.threads = 0


_mine, _shared = _Depth(), _Shared()


@contextmanager
def steady_arithmetic() -> Iterator[None]:
    """Has torch compute in this thread with one core, and float32 products in float32; as a decorator too, for a verb.

    What the calling program had set is put back when the last thread leaves.
    """
    _mine.depth += 1
    if _mine.depth == 1:
        with _shared.lock:
            _shared.users += 1
            if _shared.users == 1:
                _shared.precision, _shared.threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
                torch.set_float32_matmul_precision("highest")
            # The number is torch's setting for the thread that sets it, and for all threads that are yet to begin.
            torch.set_num_threads(1)
    try:
        yield
    finally:
        _mine.depth -= 1
        if not _mine.depth:
            with _shared.lock:
                _shared.users -= 1
                torch.set_num_threads(_shared.threads)
                if not _shared.users:
                    torch.set_float32_matmul_precision(_shared.precision)
