"""Merging against copying the base and against PEFT: `python -m benchmarks.merge [--folder DIR] [--device NAME]`.

Floors: `cp -r` of the base, as it is and until the copy is on the disk. Our own time is that of the work, from the
opening of the base to the synced output; starting Python and importing torch is shown apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common, floors
from loratool.numbers.device_choice import devices_named

PEFT = """
import sys, time, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put some 15 GB; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=["llama", "peft", "memory", "sdxl"], help="one part of it")
    arguments = parser.parse_args()
    print(floors.described(devices_named(arguments.device)[0]))
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="loratool-bench-") as name:
        for part in [arguments.only] if arguments.only else ["llama", "peft", "memory", "sdxl"]:
            PARTS[part](Path(name, part), arguments)


def llama_part(folder: Path, arguments: argparse.Namespace) -> None:
    base = common.llama(folder / "base", layers=22)
    adapter = common.peft_adapter(folder / "adapter", base)
    compare_with_copy("Llama-shaped 1.1B bf16, PEFT r=16 on all linear layers", base, adapter, folder / "out", arguments)


def peft_part(folder: Path, arguments: argparse.Namespace) -> None:
    base = common.llama(folder / "base", layers=22)
    compare_with_peft(base, common.peft_adapter(folder / "adapter", base), folder / "out")


def memory_part(folder: Path, arguments: argparse.Namespace) -> None:
    bases = [common.llama(folder / str(layers), layers=layers) for layers in (6, 22)]
    memory([(base, common.peft_adapter(folder / f"{base.name}-adapter", base)) for base in bases], folder / "out")


def sdxl_part(folder: Path, arguments: argparse.Namespace) -> None:
    folder.mkdir(parents=True)
    for rank in (32, 128):
        unet, lora = common.sdxl(folder / "sdxl.safetensors", folder / "lora.safetensors", rank)
        title = f"SDXL-shaped fp16 U-Net, kohya r={rank} with convolutions"
        compare_with_copy(title, unet, lora, folder / "out.safetensors", arguments)


def compare_with_copy(title: str, base: Path, adapter: Path, out: Path, arguments: argparse.Namespace) -> None:
    """Prints our time as a ratio to `cp -r`."""
    starts: list[float] = []

    def merge() -> float:
        report = common.loratool("merge", base, adapter, "-o", out, "--device", arguments.device)
        starts.append(report["whole"] - report["seconds"])
        return report["seconds"]

    taken = common.in_turns(
        {
            "cp": lambda: common.copy(base, out, sync=False),
            "cp + sync": lambda: common.copy(base, out, sync=True),
            "merge": merge,
        },
        arguments.rounds,
        lambda: common.clear(out),
    )
    common.clear(out)
    ratios = ", ".join(
        f"{taken['merge'] / taken[floor]:.2f} × {floor} ({taken[floor]:.2f} s)" for floor in ("cp", "cp + sync")
    )
    print(f"{title}: merge {taken['merge']:.2f} s = {ratios}; start-up {statistics.median(starts):.2f} s")


def compare_with_peft(base: Path, adapter: Path, out: Path) -> None:
    """Prints how much longer PEFT takes, both without imports."""
    common.clear(out)
    os.sync()
    done = subprocess.run([sys.executable, "-c", PEFT, base, adapter, out], capture_output=True, text=True, check=True)
    peft = float(done.stdout.split()[-1])
    common.clear(out)
    os.sync()
    ours = common.loratool("merge", base, adapter, "-o", out)["seconds"]
    print(f"PEFT load, merge_and_unload, save: {peft:.2f} s = {peft / ours:.1f} × ours ({ours:.2f} s)")


def memory(pairs: list[tuple[Path, Path]], out: Path) -> None:
    """Prints the peak memory beyond the imports, for bases of several sizes."""
    imports = common.import_bytes("loratool.verbs.merge.merge")
    for base, adapter in pairs:
        common.clear(out)
        peak = common.loratool("merge", base, adapter, "-o", out)["peak_bytes"] - imports
        size = sum(path.stat().st_size for path in base.iterdir())
        own = sum(path.stat().st_size for path in adapter.iterdir())
        print(f"memory: base {size / 1e9:.2f} GB, adapter {own / 1e6:.0f} MB: peak {peak / 1e6:.0f} MB beyond the imports")


PARTS = {"llama": llama_part, "peft": peft_part, "memory": memory_part, "sdxl": sdxl_part}


if __name__ == "__main__":
    main()
