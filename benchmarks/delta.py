"""Measuring and writing ΔW: `python -m benchmarks.delta [--folder DIR] [--device NAME] [--rounds N]`.

- `pair`: W' − W₀ of a bf16 pair, its figures alone and with the file of it, against reading both models, and that and
  writing as many bytes as the file has.
- `adapter`: an SDXL-shaped kohya LoRA of rank 128, its figures, against reading it; and the file of its ΔW in fp16, against
  multiplying out the factors and writing as many bytes.

Times are those of the whole call, without Python's start and imports.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from benchmarks import common, floors
from loratool import load
from loratool.numbers.device_choice import devices_named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put some 12 GB; default: a temporary folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22, help="of the pair: 22 make 1.1B parameters, 2048 wide")
    parser.add_argument("--only", choices=list(PARTS), help="one part of it")
    arguments = parser.parse_args()
    print(floors.described(devices_named(arguments.device)[0]))
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="loratool-bench-") as name:
        for part in [arguments.only] if arguments.only else PARTS:
            PARTS[part](Path(name, part), arguments)


def read(paths: list[Path]) -> float:
    """Seconds to read files into one buffer, a part at a time."""

    def work() -> None:
        buffer = bytearray(8 << 20)
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return common.timed(work)


def written(path: Path, nbytes: int) -> float:
    """Seconds to write and sync so many bytes."""
    block = bytes(8 << 20)

    def work() -> None:
        with open(path, "wb", buffering=0) as file:
            for start in range(0, nbytes, len(block)):
                file.write(block[: nbytes - start])
            os.fsync(file.fileno())

    return common.timed(work)


def pair_part(folder: Path, arguments: argparse.Namespace) -> None:
    base = common.llama(folder / "base", arguments.layers)
    tuned = common.finetune(folder / "tuned", base)
    files = [path for model in (base, tuned) for path in sorted(model.glob("*.safetensors"))]
    out = folder / "out.safetensors"

    def ours(*words: str | Path) -> float:
        return common.loratool("delta", base, tuned, "--device", arguments.device, *words)["seconds"]

    size = common.loratool("delta", base, tuned, "-o", out, "--dtype", "bfloat16")["nbytes"]
    works = {
        "read both": lambda: read(files),
        "figures": ours,
        "read and write": lambda: read(files) + written(out, size),
        "with the file": lambda: ours("-o", out, "--dtype", "bfloat16"),
    }
    taken = common.in_turns(works, arguments.rounds, lambda: common.clear(out))
    total = sum(path.stat().st_size for path in files)
    print(f"pair: {total / 1e9:.2f} GB in both, {size / 1e9:.2f} GB of ΔW in bf16, on {arguments.device}")
    for name, floor in (("figures", "read both"), ("with the file", "read and write")):
        print(f"  {name}: {taken[name]:.2f} s = {taken[name] / taken[floor]:.2f} × {floor} ({taken[floor]:.2f} s)")


def adapter_part(folder: Path, arguments: argparse.Namespace) -> None:
    folder.mkdir(parents=True)
    lora, out = common.sdxl_lora(folder / "lora.safetensors", 128), folder / "out.safetensors"
    size = common.loratool("delta", lora, "-o", out, "--dtype", "float16")["nbytes"]

    def ours(*words: str | Path) -> float:
        return common.loratool("delta", lora, "--device", arguments.device, *words)["seconds"]

    def multiplied() -> float:
        changes = load(lora).changes
        return common.timed(lambda: [change.delta.dense().to(torch.float16) for change in changes])

    works = {
        "read": lambda: read([lora]),
        "figures": ours,
        "multiply and write": lambda: multiplied() + written(out, size),
        "with the file": lambda: ours("-o", out, "--dtype", "float16"),
    }
    taken = common.in_turns(works, arguments.rounds, lambda: common.clear(out))
    print(f"adapter: {lora.stat().st_size / 1e9:.2f} GB, r = 128, {size / 1e9:.2f} GB of ΔW in fp16, on {arguments.device}")
    for name, floor in (("figures", "read"), ("with the file", "multiply and write")):
        print(f"  {name}: {taken[name]:.2f} s = {taken[name] / taken[floor]:.2f} × {floor} ({taken[floor]:.2f} s)")


PARTS = {"pair": pair_part, "adapter": adapter_part}


if __name__ == "__main__":
    main()
