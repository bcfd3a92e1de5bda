"""Which devices a verb computes on: those that were asked for, or by "auto" those that are expected to end sooner; each is
tried before there are threads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from loratool.errors import LoratoolError
from loratool.numbers.devices import CPU, CUDA, MOST_AT_ONCE, MOST_LANES, DevicePool
from loratool.numbers.faults import Fault, fault_of, first_line
from loratool.numbers.threads import memory_limit_of_addresses, usable_cores
from loratool.numbers.workload import CONTEXT_SECONDS, Workload

LANE_BYTES: Final = 1 << 30
"""Bytes of a GPU that are free for each thread that feeds it, or there are fewer threads."""
WORKING_SETS: Final = 4
"""The memory that work on matrices takes, as a multiple of the matrices themselves."""


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
