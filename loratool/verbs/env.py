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
from loratool.numbers.threads import memory_limit, usable_cores

LIBRARIES: Final = ("torch", "safetensors", "numpy", "click", "rich", "peft", "diffusers", "transformers")
"""The libraries that loratool is built on, and those whose files it writes."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device: its `name` for `--device`, its `title` for people, its memory in bytes (0: the machine's own memory)."""

    name: str
    title: str
    memory: int = 0
    memory_free: int = 0


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


def environment() -> Environment:
    """Gathers the environment of this process."""
    meminfo = _meminfo()
    total = meminfo.get("MemTotal", 0)
    limit = memory_limit()
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
        devices=tuple(_devices()),
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
    found = [Device("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found.append(Device(f"cuda:{number}", torch.cuda.get_device_name(number), total, free))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple's GPU"))
    return found


def _meminfo() -> dict[str, int]:
    """Linux's /proc/meminfo in bytes; nothing elsewhere."""
    try:
        # What the kernel calls kB are 1024 bytes. Counts of huge pages have no unit and come out wrong; nobody uses them.
        lines = Path("/proc/meminfo").read_text().splitlines()
        return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    except (OSError, ValueError, IndexError):
        return {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        # ARM's cpuinfo has no model name, and other systems no cpuinfo.
        return platform.processor() or platform.machine()
