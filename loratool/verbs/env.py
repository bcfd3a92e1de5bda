"""`env`: the versions, the machine and the devices that loratool runs on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

from loratool._version import __version__
from loratool.numbers.device_choice import cuda_count, open_devices, trouble_with
from loratool.numbers.devices import CPU, CUDA
from loratool.numbers.threads import (
    memory_limit,
    memory_sizes,
    threads_for,
    usable_cores,
    usable_memory,
)
from loratool.numbers.workload import CONTEXT_SECONDS

LIBRARIES: Final = ("torch", "safetensors", "numpy", "click", "rich", "peft", "diffusers", "transformers")
"""The libraries that loratool is built on, and those whose files it writes."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device: its `name` for `--device`, its `title` for people, its memory in bytes (0: the machine's own memory), and
    the `trouble` for which it cannot be computed on, if any."""

    name: str
    title: str
    memory: int = 0
    memory_free: int = 0
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Environment:
    """Versions, the machine, its memory and devices. Sizes are in bytes; 0 where the system does not tell them."""

    versions: Mapping[str, str]
    system: str
    processor: str
    cores: int
    memory: int
    memory_limit: int
    memory_free: int
    devices: tuple[Device, ...]
    auto: str


def environment() -> Environment:
    """Gathers the environment of this process."""
    meminfo = memory_sizes()
    total = meminfo.get("MemTotal", 0)
    limit = memory_limit()
    devices = tuple(_devices())
    return Environment(
        versions={"loratool": __version__, "Python": platform.python_version(), **_versions()},
        system=platform.platform(),
        processor=_processor(),
        cores=usable_cores(),
        memory=total,
        # A limit (a container's, ulimit -v) at or above the machine's memory limits nothing. Where /proc/meminfo does not
        # tell that memory (total 0), any limit is shown.
        memory_limit=limit if limit < (total or limit + 1) else 0,
        memory_free=meminfo.get("MemAvailable", 0),
        devices=devices,
        auto=_auto(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Extras, and the libraries whose files are written, need not be there.
            continue
    # torch is built for one of both; ROCm's builds answer to the names of CUDA.
    built = torch.version.cuda or torch.version.hip
    return found | ({"CUDA": built} if built else {})


def _devices() -> list[Device]:
    threads = threads_for(usable_memory())
    found = [Device("cpu", f"{threads} threads work at once, {torch.backends.cpu.get_cpu_capability()}")]
    for number in range(cuda_count()):
        # One that does not work may not tell its name or its memory either.
        trouble = trouble_with(torch.device(CUDA, number))
        if trouble:
            found.append(Device(f"cuda:{number}", "a GPU that", trouble=trouble))
            continue
        free, total = torch.cuda.mem_get_info(number)
        found.append(Device(f"cuda:{number}", torch.cuda.get_device_name(number), total, free))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple's GPU"))
    return found


def _auto() -> str:
    """What `--device auto` takes here, in words, by the rule that the verbs have."""
    pool = open_devices("auto")
    if pool.devices == (CPU,):
        return f"the CPU: {pool.why}"
    return f"the GPUs, for work that they end sooner than the CPU though opening them takes {CONTEXT_SECONDS:g} s"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        # ARM's cpuinfo has no model name, and other systems no cpuinfo.
        return platform.processor() or platform.machine()
