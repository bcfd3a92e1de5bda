"""How long work takes on the CPU and on a GPU: the rule by which `device="auto"` chooses, and the rates that were measured.

A GPU is opened for half a second's worth of work at least, and does not make a disk faster: what the disk bounds, and what
is small, stays on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

# Measured on 16 cores of a Xeon with an H200 and on 2 cores of an EPYC; `python -m benchmarks.gpu` measures them again.
CONTEXT_SECONDS: Final = 0.5
"""Until a GPU is ready: CUDA's context, and its linear algebra."""
READ_BYTES: Final = 4.7e9
"""Bytes a second that several threads read of files which the system has in memory."""
WRITTEN_BYTES: Final = 1.3e9
"""Bytes a second that are written and synced."""
CORE_BYTES: Final = 0.4e9
"""Bytes of weights a second that one core reads, widens, subtracts and measures."""
CORE_PRODUCTS: Final = 85e9
"""Operations a second of one core's float32 products."""
TRAVELLING_BYTES: Final = 20e9
"""Bytes a second to a GPU or back, on a slower bus than that of the machine that was measured, 55e9."""
GPU_PRODUCTS: Final = 4e12
"""Operations a second of float32 products with few columns, on a slower GPU than the one that was measured, 12e12."""
OPERATIONS_OF_FACTORS: Final = 12
"""Operations of QR, products and new factors of a module, as a multiple of (rows + columns) · rank²."""
OPERATIONS_OF_SPECTRUM: Final = 8 * 24
"""Operations of the leading singular values of a matrix for each of its numbers: four products with some 24 columns."""
CORES_EXPONENT: Final = 0.65
"""Sixteen cores do the work of 16 ** 0.65, six."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a verb has before it: bytes of weights to read and to write, and the operations of its products."""

    read: int = 0
    written: int = 0
    products: float = 0.0

    def seconds_on_disk(self) -> float:
        """The least seconds for any device: those of the disk."""
        return max(self.read / READ_BYTES, self.written / WRITTEN_BYTES)

    def seconds_on_cpu(self, cores: int) -> float:
        """The seconds that `cores` cores are expected to take."""
        computing = self.read / CORE_BYTES + self.products / CORE_PRODUCTS
        return max(self.seconds_on_disk(), computing / math.pow(cores, CORES_EXPONENT))

    def seconds_on_gpu(self, count: int) -> float:
        """The seconds that `count` GPUs are expected to take, from the moment that they are asked for."""
        there = (self.read + self.written) / TRAVELLING_BYTES + self.products / GPU_PRODUCTS
        return CONTEXT_SECONDS + max(self.seconds_on_disk(), there / count)
