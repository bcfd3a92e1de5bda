"""What a device's errors mean: memory that ran out, in all the clothes that it comes in, or a device that does not work.

torch passes on what CUDA's libraries say, and only its own allocator says `torch.OutOfMemoryError`: a library that finds no
room for a handle or a workspace of its own says so in words of its own, some of which do not mention memory at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

import torch


class Fault(Enum):
    """What an error of a device means: less at once may do, or the device is of no use in this process any more."""

    MEMORY = "ran out of memory"
    BROKEN = "does not work"


# From torch's source: c10/cuda/CUDAException.cpp (errors of the runtime), aten/src/ATen/cuda/Exceptions.h and
# aten/src/ATen/cuda/CUDABlas.cpp (the libraries' statuses), torch/csrc/Exceptions.h (types), and for Apple's GPUs
# aten/src/ATen/mps/MPSAllocator.mm.
FAULTS: Final[Mapping[str, Fault]] = {
    "out of memory": Fault.MEMORY,
    "cudaErrorMemoryAllocation": Fault.MEMORY,
    "hipErrorOutOfMemory": Fault.MEMORY,
    "CUBLAS_STATUS_ALLOC_FAILED": Fault.MEMORY,
    "CUBLAS_STATUS_NOT_INITIALIZED": Fault.MEMORY,
    "CUSOLVER_STATUS_ALLOC_FAILED": Fault.MEMORY,
    "CUSOLVER_STATUS_NOT_INITIALIZED": Fault.MEMORY,
    "CUSOLVER_STATUS_INTERNAL_ERROR": Fault.MEMORY,
    "CUDNN_STATUS_ALLOC_FAILED": Fault.MEMORY,
    "CUDNN_STATUS_NOT_INITIALIZED": Fault.MEMORY,
    "HIPBLAS_STATUS_ALLOC_FAILED": Fault.MEMORY,
    "HIPBLAS_STATUS_NOT_INITIALIZED": Fault.MEMORY,
    "CUDA error: ": Fault.BROKEN,
    "CUDA driver error: ": Fault.BROKEN,
    "CUDA NVRTC error: ": Fault.BROKEN,
    "cusolver error: ": Fault.BROKEN,
    "cuDNN error: ": Fault.BROKEN,
    "HIP error: ": Fault.BROKEN,
    "no kernel image is available": Fault.BROKEN,
    "lazy wrapper should be called at most once": Fault.BROKEN,
    "driver on your system is too old": Fault.BROKEN,
    "No CUDA GPUs are available": Fault.BROKEN,
    "CUDA unknown error": Fault.BROKEN,
    "CUDA initialization": Fault.BROKEN,
    "CUDACachingAllocator.cpp": Fault.BROKEN,
}
"""What the words of an error mean; the first that are found count, so that an error of CUDA which speaks of memory is one of
memory. cuBLAS and cuSOLVER say "not initialized" and "internal error" where there is no room for their handles."""


_NOT_DECOMPOSED: Final[type[RuntimeError]] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def fault_of(error: BaseException) -> Fault | None:
    """What an error says of the device that it came from; None for errors that are no device's."""
    if isinstance(error, torch.OutOfMemoryError):
        return Fault.MEMORY
    # A matrix that has no decomposition is no fault of the device, though cuSOLVER reports it in such words too.
    if not isinstance(error, RuntimeError) or isinstance(error, _NOT_DECOMPOSED):
        return None
    words = str(error)
    found = next((fault for fragment, fault in FAULTS.items() if fragment in words), None)
    return found or (Fault.BROKEN if isinstance(error, torch.AcceleratorError) else None)


def first_line(error: BaseException) -> str:
    """What an error says first: torch's advice on debugging follows in further lines."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
