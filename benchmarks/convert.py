"""Converting a FLUX.1 LoRA there and back against copying it: `python -m benchmarks.convert [--folder DIR] [--rounds N]`.

There, q, k and v (and the MLP) with factors of their own are stacked; back, they are cut; the third only renames. Times are
of the whole process, starting Python and importing torch included, and of reading the output again to compare it. The
floor is `cp` until the copy is on the disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common

RANK = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put some 2 GB; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(common.machine())
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="loratool-bench-") as name:
        measure(Path(name), arguments.rounds)


def measure(folder: Path, rounds: int) -> None:
    source = common.flux(folder / "diffusers.safetensors", RANK)
    stacked, out = folder / "kohya.safetensors", folder / "out.safetensors"
    common.loratool("convert", source, "-o", stacked, "--to", "kohya", "--arch", "flux1")

    def convert(adapter: Path, to: str) -> float:
        return common.loratool("convert", adapter, "-o", out, "--to", to, "--arch", "flux1")["whole"]

    taken = common.in_turns(
        {
            "start Python, import torch": lambda: common.timed(
                lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)
            ),
            "cp and sync": lambda: common.copy(source, out, sync=True),
            "rename (to onetrainer)": lambda: convert(source, "onetrainer"),
            "stack (to kohya)": lambda: convert(source, "kohya"),
            "cut (kohya to diffusers)": lambda: convert(stacked, "diffusers"),
        },
        rounds,
        lambda: common.clear(out),
    )
    for path in (source, stacked):
        print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")
    for name, seconds in taken.items():
        print(f"{name}: {seconds:.2f} s, {seconds / taken['cp and sync']:.1f} x cp and sync")


if __name__ == "__main__":
    main()
