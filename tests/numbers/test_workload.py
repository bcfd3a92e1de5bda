"""The rule by which "auto" chooses: by bytes, products, cores and what a GPU takes to open."""

from __future__ import annotations

import pytest
import torch

from loratool import LoratoolError
from loratool.numbers import device_choice
from loratool.numbers.device_choice import open_devices, room_on, trouble_with
from loratool.numbers.devices import CPU, MOST_AT_ONCE, MOST_LANES, DevicePool
from loratool.numbers.workload import OPERATIONS_OF_SPECTRUM, Workload

GPU = torch.device("cuda", 0)
LLAMA_7B = 13_500_000_000
"""Bytes of a model of 7B parameters in bf16."""
TINY = Workload(read=1 << 20, products=1e6)
EXTRACTION = Workload(read=2 * LLAMA_7B, products=OPERATIONS_OF_SPECTRUM * LLAMA_7B / 2)
MERGE = Workload(read=LLAMA_7B, written=LLAMA_7B, products=2 * 16 * LLAMA_7B / 2)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine of sixteen cores with a GPU that works; returns the devices that were opened."""
    opened: list[torch.device] = []

    def works(device: torch.device) -> None:
        opened.append(device)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 80 << 30))
    monkeypatch.setattr(device_choice, "trouble_with", works)
    monkeypatch.setattr(device_choice, "usable_cores", lambda: 16)
    monkeypatch.setattr(device_choice, "memory_limit_of_addresses", lambda: 0)
    return opened


@pytest.mark.parametrize(
    ("work", "wanted", "why"),
    [(TINY, CPU, "smaller than the 0.5 s"), (MERGE, CPU, "the disk bounds"), (EXTRACTION, GPU, "faster than the CPU")],
    ids=["tiny", "merge", "extraction"],
)
def test_auto_takes_what_is_faster(one_gpu: list[torch.device], work: Workload, wanted: torch.device, why: str) -> None:
    pool = open_devices("auto", work)
    assert pool.devices == (wanted,)
    assert why in pool.why
    # A context costs half a second and a gigabyte: nobody opens one to learn that it is not worth it.
    assert one_gpu == ([GPU] if wanted == GPU else [])
    assert not list(pool.warnings())


def test_what_is_asked_for_is_taken(one_gpu: list[torch.device]) -> None:
    assert open_devices("cuda", TINY).devices == (GPU,)
    assert open_devices("cpu", EXTRACTION).devices == (CPU,)
    assert one_gpu == [GPU]


def test_a_limit_of_addresses_leaves_no_room_for_a_context(
    one_gpu: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_choice, "memory_limit_of_addresses", lambda: 8 << 30)
    pool = open_devices("auto", EXTRACTION)
    assert pool.devices == (CPU,)
    assert "ulimit -v" in pool.why
    assert one_gpu == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore"), "does not work"),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 12080)."), "does not work"),
        (torch.AcceleratorError("CUDA error: out of memory"), "has no room for the context"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling"), "has no room for the context"),
        (AssertionError("Torch not compiled with CUDA enabled"), "does not work"),
    ],
)
def test_a_gpu_that_does_not_work_is_a_line_or_an_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(matrices: torch.Tensor) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(device_choice, "memory_limit_of_addresses", lambda: 0)
    monkeypatch.setattr(device_choice, "usable_cores", lambda: 16)
    monkeypatch.setattr(device_choice, "_load_linear_algebra", fails)
    real = torch.eye
    monkeypatch.setattr(torch, "eye", lambda size, dtype, device: real(size, dtype=dtype))
    pool = open_devices("auto", EXTRACTION)
    (note,) = pool.warnings()
    assert pool.devices == (CPU,)
    assert note.startswith(f"cuda:0 {said}")
    assert note.endswith("computed on the CPU")
    assert "\n" not in note
    with pytest.raises(LoratoolError, match=rf"`device='cuda'`: cuda:0 {said}.*; `device='cpu'` does without"):
        open_devices("cuda", EXTRACTION)


def test_a_driver_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12080). Please update")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    pool = open_devices("auto", EXTRACTION)
    (note,) = pool.warnings()
    assert "driver on your system is too old" in note
    with pytest.raises(LoratoolError, match=r"sees 0 CUDA devices.*too old"):
        open_devices("cuda")
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("Found no NVIDIA driver on your")))
    assert not list(open_devices("auto", EXTRACTION).warnings())


def test_linear_algebra_is_loaded_by_the_device_that_works() -> None:
    """On the CPU, whose libraries are loaded: what is called on a GPU before any thread can be called."""
    assert trouble_with(CPU) is None


@pytest.mark.parametrize("gigabytes", [141, 6, 2.5, 1, 0.3])
def test_what_is_given_at_once_follows_what_is_free(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    free = int(gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 141 << 30))
    lanes, at_once = room_on([GPU])
    assert 1 <= lanes <= MOST_LANES
    assert 0 < at_once <= MOST_AT_ONCE
    assert lanes * at_once * device_choice.WORKING_SETS <= free
    # The most that all lanes take together stays under 3 GiB, whatever is free.
    assert lanes * at_once * device_choice.WORKING_SETS <= 3 << 30


def test_batches_hold_what_is_alike_and_fits() -> None:
    pool = DevicePool((CPU,), staged=True, at_once=100)
    assert pool.batches(range(10), lambda number: number % 2, lambda number: 30) == [
        [0, 2, 4], [6, 8], [1, 3, 5], [7, 9],
    ]  # fmt: skip
    assert pool.batches([1, 2], lambda number: 0, lambda number: 1000) == [[1], [2]]
    assert DevicePool((CPU,)).batches([3, 1], lambda number: 0, lambda number: 1) == [[3], [1]]
