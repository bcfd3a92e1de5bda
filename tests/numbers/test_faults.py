"""What a device's errors mean: torch's and CUDA's words for memory that ran out and for a device that does not work."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch

from loratool import LoratoolError
from loratool.base.effects import _matrix_added
from loratool.deltas.multiply import IA3
from loratool.numbers.devices import CPU, DevicePool
from loratool.numbers.faults import FAULTS, Fault, fault_of

MESSAGES = {
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported": Fault.MEMORY,
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB": Fault.MEMORY,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": Fault.MEMORY,
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`": Fault.MEMORY,
    "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`. If you": Fault.MEMORY,
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`": Fault.MEMORY,
    "MPS backend out of memory (MPS allocated: 8.00 GiB)": Fault.MEMORY,
    "CUDA driver error: out of memory": Fault.MEMORY,
    "CUDA error: an illegal memory access was encountered": Fault.BROKEN,
    "CUDA error: no kernel image is available for execution on the device": Fault.BROKEN,
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`": Fault.BROKEN,
    "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd`": Fault.BROKEN,
    "lazy wrapper should be called at most once": Fault.BROKEN,
    "The NVIDIA driver on your system is too old (found version 12080).": Fault.BROKEN,
}
"""Whole messages as torch has them, beside the fragments of the table."""


def messages(wanted: Fault) -> list[str]:
    """All that mean a fault: whole messages, and the fragments of the table alone."""
    return [message for message, fault in [*MESSAGES.items(), *FAULTS.items()] if fault is wanted]


@pytest.mark.parametrize(("message", "fault"), [*MESSAGES.items(), *FAULTS.items()])
def test_every_clothing_is_known(message: str, fault: Fault) -> None:
    assert fault_of(RuntimeError(message)) == fault
    assert fault_of(torch.AcceleratorError(message)) == fault


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
        torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE. This error may appear if NaN"),  # type: ignore[attr-defined]
        ValueError("CUDA error: out of memory"),
        KeyboardInterrupt(),
        LoratoolError("out of memory"),
    ],
)
def test_bugs_and_bad_input_are_no_faults_of_a_device(error: BaseException) -> None:
    assert fault_of(error) is None


def test_an_unknown_error_of_an_accelerator_is_one_of_the_device() -> None:
    assert fault_of(torch.AcceleratorError("something new")) is Fault.BROKEN
    assert fault_of(torch.OutOfMemoryError()) is Fault.MEMORY


@pytest.mark.parametrize("message", messages(Fault.MEMORY))
def test_memory_that_ran_out_is_answered_by_less_and_then_by_the_cpu(message: str) -> None:
    sizes: list[int] = []

    def compute(items: Sequence[int], device: torch.device) -> list[int]:
        sizes.append(len(items))
        if len(items) > 1 or sizes.count(1) == 1:
            raise RuntimeError(message)
        return [-item for item in items]

    pool = DevicePool((CPU,), staged=True)
    assert pool.run_batch("it", range(4), compute) == [0, -1, -2, -3]
    assert sizes == [4, 2, 1, 1, 1, 2, 1, 1]
    assert pool.moved == ["it"]


@pytest.mark.parametrize("message", messages(Fault.BROKEN))
def test_a_device_that_breaks_ends_the_work_or_leaves_it_to_the_cpu(message: str) -> None:
    calls: list[int] = []

    def compute(items: Sequence[int], device: torch.device) -> list[int]:
        calls.append(len(items))
        if len(calls) == 1:
            raise RuntimeError(message)
        return [-item for item in items]

    with pytest.raises(LoratoolError, match=r"broke in the middle of it \(.*`device='cpu'` does without"):
        DevicePool((CPU,), staged=True, strict=True).run_batch("it", range(4), compute)
    calls.clear()
    pool = DevicePool((CPU,), staged=True, strict=False)
    assert pool.run_batch("it", range(4), compute) == [0, -1, -2, -3]
    assert [note for note in pool.warnings() if "broke at it" in note and "on the CPU" in note]


def test_a_bug_is_a_bug_on_a_device_too() -> None:
    def compute(items: Sequence[int], device: torch.device) -> list[int]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        DevicePool((CPU,), staged=True, strict=False).run_batch("it", [1], compute)


@pytest.mark.parametrize("message", messages(Fault.MEMORY)[:4])
def test_memory_that_runs_out_is_not_taken_for_another_model(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """A shape that does not fit is an error of torch's like any other: what a device says is left to those who know it."""

    def apply(delta: IA3, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        raise RuntimeError(message)

    monkeypatch.setattr(IA3, "apply", apply)
    with pytest.raises(RuntimeError, match=re.escape(message[:20])) as raised:
        _matrix_added(IA3(torch.ones(3), False, 0.0, {}), torch.ones(3, 4))
    assert fault_of(raised.value) is Fault.MEMORY
