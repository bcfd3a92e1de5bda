"""What a GPU and many cores do, in one JSON within six minutes: `python -m benchmarks.gpu [--device cpu] [--small]`.

- `rates`: what the machine can do at most, measured in the same run: disk, products, PCIe, the GPU's memory.
- `tests`: the tests of devices, of which some need a GPU.
- `verbs`: each verb in a process of its own on the device, on all cores, and on 1, 2, 4, 8 … of them, with the bytes of the
  GPU's memory that were taken beside those of its context.
- `full`: verbs on a GPU of whose memory so many megabytes are free, and how they end.

Needs torch, numpy, click, rich, safetensors, pytest and hypothesis. With `--small --device cpu` it runs anywhere, to try it.
What no time was left for is named under `skipped`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, floors

SECONDS = 340.0
"""For everything, the making of the data included."""
FREE_MEGABYTES = (6000, 2500, 1000, 300)
CORES = (1, 2, 4, 8, 16)
HOG = """
import sys, time, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(free - (int(sys.argv[1]) << 20), 0), dtype=torch.uint8, device="cuda")
print("held", flush=True)
time.sleep(600)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where to put some 15 GB; default: a temporary folder")
    parser.add_argument("--small", action="store_true", help="small data, to try the benchmark itself")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="loratool-bench-") as name:
        print(json.dumps(Measurement(Path(name), arguments.device, small=arguments.small).all(), indent=1))


class Measurement:
    """One run of everything, in `folder` and on `device`, that ends in time."""

    def __init__(self, folder: Path, device: str, *, small: bool) -> None:
        self.folder, self.device, self.small = folder, torch.device(device), small
        self.end = time.monotonic() + SECONDS
        self.skipped: list[str] = []

    def all(self) -> dict[str, Any]:
        """Everything, what matters most first."""
        done: dict[str, Any] = {"machine": common.machine(), "rates": self.rates(), "tests": self.tests()}
        self.make_data()
        everything = len(os.sched_getaffinity(0))
        verbs: dict[str, dict[str, Any]] = {verb: {} for verb in self.commands}
        done["verbs"], done["full"] = verbs, {}
        if self.device.type == "cuda":
            for verb, found in verbs.items():
                found[str(self.device)] = self.run(verb, str(self.device))
        for cores in sorted({everything, *(cores for cores in CORES if cores < everything)}, reverse=True):
            for verb, found in verbs.items():
                found[f"{cores} cores"] = self.run(verb, "cpu", cores=cores)
            if cores == everything and self.device.type == "cuda":
                done["full"] = {f"{free} MB free": self.with_free_memory(free) for free in FREE_MEGABYTES}
        done["copy"] = self.copies
        done["skipped"] = self.skipped
        done["seconds"] = SECONDS - (self.end - time.monotonic())
        return done

    def rates(self) -> dict[str, float]:
        """Bytes and operations a second."""
        nbytes = (1 << 26) if self.small else floors.GIBIBYTE
        found = {
            "disk": floors.disk(self.folder, nbytes),
            "cpu products": floors.matmul(torch.device("cpu")),
        }
        if self.device.type == "cuda":
            to, back = floors.pcie(self.device)
            found |= {
                "products": floors.matmul(self.device),
                "products with 24 columns": floors.matmul(self.device, 24),
                "to the device": to,
                "from the device": back,
                "device memory": floors.memory(self.device),
            }
        return found

    def tests(self) -> str:
        """The last line of pytest over the tests of devices."""
        files = [f"tests/numbers/test_{name}.py" for name in ("devices", "faults", "workload", "settings")]
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
        except subprocess.TimeoutExpired:
            return "more than 100 s"
        return " ".join(done.stdout.strip().splitlines()[-1:]) or done.stderr[-300:]

    def make_data(self) -> None:
        """A model of 7B's shapes, a fine-tuning of it, a PEFT adapter, and two kohya adapters of SDXL's shapes."""
        folder = self.folder
        shapes = (2, 256, 512, 256, 1000) if self.small else (3, 4096, 11008, 4096, 32000)
        base = common.llama(folder / "base", *shapes)
        tuned, adapter = common.finetune(folder / "tuned", base), common.peft_adapter(folder / "adapter", base)
        one, other = (common.sdxl_lora(folder / f"{name}.safetensors", 4 if self.small else 128) for name in "ab")
        time.sleep(common.PAUSE_SECONDS)
        self.copies = {"cp": common.copy(base, folder / "copy", sync=False)}
        common.clear(folder / "copy")
        self.copies["cp and sync"] = common.copy(base, folder / "copy", sync=True)
        common.clear(folder / "copy")
        # What `unmerge` takes apart is kept; everything else that is written is removed before the next run.
        common.loratool("merge", base, adapter, "-o", folder / "merged")
        out = folder / "out.safetensors"
        self.commands: dict[str, Sequence[str | Path]] = {
            "merge": ("merge", base, adapter, "-o", folder / "out"),
            "extract": ("extract", base, tuned, "--rank", "16", "-o", folder / "out"),
            "delta": ("delta", base, tuned),
            "unmerge": ("unmerge", folder / "merged", adapter, "-o", folder / "out"),
            "compare --to": ("compare", folder / "merged", "--to", f"{base}+{adapter}:1"),
            "resize": ("resize", one, "--rank", "32", "-o", out),
            "combine": ("combine", f"{one}:0.7", f"{other}:0.4", "--rank", "32", "-o", out),
            "compare": ("compare", one, other, "--arch", "sdxl"),
        }

    def run(self, verb: str, device: str, *, cores: int = 0) -> dict[str, Any]:
        """One verb in a process of its own: how it ended, its seconds, its CPU seconds, and its memory."""
        left = self.end - time.monotonic()
        if left < 10:
            self.skipped.append(f"{verb} on {device}, {cores} cores")
            return {}
        for name in ("out", "out.safetensors"):
            common.clear(self.folder / name)
        os.sync()
        words = [sys.executable, "-m", "loratool", *map(str, self.commands[verb]), "--device", device, "--json"]
        if cores:
            words = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores])), *words]
        started = time.monotonic()
        with most_memory(self.device if device != "cpu" else None) as most, open(self.folder / "said", "w+") as said:
            process = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT)
            kill = threading.Timer(left, process.kill)
            kill.start()
            _, status, usage = os.wait4(process.pid, 0)
            kill.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            text = said.read()
        found: dict[str, Any] = {
            "exit": process.returncode,
            "whole": round(time.monotonic() - started, 2),
            "cpu": round(usage.ru_utime + usage.ru_stime, 2),
            "peak": usage.ru_maxrss * 1024,
        }
        if device != "cpu":
            found["device memory"] = most[0]
        with contextlib.suppress(ValueError):
            report = json.loads(text[text.index("{") :])
            found |= {name: report[name] for name in ("seconds", "device") if name in report}
        # Compared checkpoints differ, which is exit 1 and no failure.
        if process.returncode and not verb.startswith("compare"):
            found["said"] = text[-300:]
        return found

    def with_free_memory(self, megabytes: int) -> dict[str, Any]:
        """Verbs on a GPU whose other memory somebody else holds."""
        hog = subprocess.Popen([sys.executable, "-c", HOG, str(megabytes)], stdout=subprocess.PIPE, text=True)
        try:
            assert hog.stdout is not None
            hog.stdout.readline()
            return {verb: self.run(verb, "cuda") for verb in ("merge", "extract", "delta", "resize")}
        finally:
            hog.kill()
            hog.wait()


@contextlib.contextmanager
def most_memory(device: torch.device | None) -> Iterator[list[int]]:
    """Watches a GPU meanwhile: the most bytes that were taken of it beyond those taken before."""
    most = [0]
    if device is None:
        yield most
        return
    stop = threading.Event()
    before = torch.cuda.mem_get_info(device)[0]

    def watch() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], before - torch.cuda.mem_get_info(device)[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    main()
