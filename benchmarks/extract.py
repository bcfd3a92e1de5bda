"""Extracting against mergekit and against the full SVD: `python -m benchmarks.extract [--folder DIR] [--mergekit PATH]`.

- `pair`: rank 16 of a 0.5B pair, whole processes, starting Python and importing torch included, against
  `mergekit-extract-lora --max-rank 16` of the same folders (`--mergekit` is the program, in whichever environment) and
  against reading both models. Our errors are compared with the best there are, by float64 singular values of two layers.
- `range`: products with a matrix, of which the range finder consists, against a product of two matrices.
- `svd`: the leading 16 triples of 4096² matrices against `torch.linalg.svd` of the same, on as many threads.
- `memory`: peak memory beyond the imports for pairs of several sizes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks import common, floors
from loratool import Checkpoint, Rule
from loratool.numbers import krylov
from loratool.numbers.device_choice import devices_named
from loratool.numbers.krylov import truncated_svd

RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put some 5 GB; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mergekit", type=Path, help="mergekit-extract-lora, to run beside ours")
    parser.add_argument("--only", choices=list(PARTS), help="one part of it")
    arguments = parser.parse_args()
    print(floors.described(devices_named(arguments.device)[0]))
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="loratool-bench-") as name:
        for part in [arguments.only] if arguments.only else PARTS:
            PARTS[part](Path(name, part), arguments)


def small_pair(folder: Path, layers: int = 24) -> tuple[Path, Path]:
    """A pair of the shape of Qwen2.5-0.5B: 24 layers, 896 wide, a vocabulary of 151,936, embedding and head tied."""
    base = common.llama(folder / "base", layers, 896, 4864, 128, 151_936, tied=True)
    return base, common.finetune(folder / "tuned", base)


def pair_part(folder: Path, arguments: argparse.Namespace) -> None:
    base, tuned = small_pair(folder)
    reports: list[dict] = []

    def ours() -> float:
        reports.append(
            common.loratool("extract", base, tuned, "-o", folder / "out", "--rank", str(RANK), "--device", arguments.device)
        )
        return reports[-1]["whole"]

    def theirs() -> float:
        command = [
            arguments.mergekit,
            "--model",
            tuned,
            "--base-model",
            base,
            "--out-path",
            folder / "out",
            "--max-rank",
            str(RANK),
        ]
        # Its last step asks the hub for a model card, which fails without a network after the adapter is there.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return common.timed(lambda: subprocess.run(command, check=False, capture_output=True, env=environment))

    def read() -> float:
        return common.timed(lambda: [path.read_bytes() for model in (base, tuned) for path in model.glob("*.safetensors")])

    works = {"read both": read, "ours": ours} | ({"mergekit": theirs} if arguments.mergekit else {})
    taken = common.in_turns(works, arguments.rounds, lambda: common.clear(folder / "out"))
    size = sum(path.stat().st_size for path in base.iterdir())
    print(f"pair: 2 × {size / 1e9:.2f} GB bf16, rank {RANK} of {len(reports[0]['modules'])} linear layers, whole processes")
    for name, seconds in taken.items():
        print(f"  {name}: {seconds:.2f} s, {seconds / taken['ours']:.2f} × ours")
    print(f"  of ours, without Python's start and imports: {min(report['seconds'] for report in reports):.2f} s at best")
    print(f"  error over the best there is: {over_optimum(base, tuned, reports[0])}")


def over_optimum(base: Path, tuned: Path, report: dict) -> str:
    """The error before rounding of the modules of two layers, over that of the best of their rank."""
    before, after = Checkpoint(base), Checkpoint(tuned)
    ratios = []
    for module in report["modules"]:
        if ".layers.0." in module["name"] or ".layers.12." in module["name"]:
            name = f"{module['name']}.weight"
            sigma = torch.linalg.svdvals(after[name].double() - before[name].double())
            ratios.append(module["least"] / float(sigma[RANK:].norm() / sigma.norm()))
    return (
        f"1 + {sum(ratios) / len(ratios) - 1:.1e} on average, 1 + {max(ratios) - 1:.1e} at worst, of {len(ratios)} modules"
    )


def svd_part(folder: Path, arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    falling = torch.arange(1, 129) ** -0.7
    dense = 0.01 * torch.randn(4096, 4096) + 0.01 * (torch.randn(4096, 128) * falling) @ torch.randn(128, 4096)
    taken = common.in_turns(
        {
            "leading": lambda: common.timed(lambda: truncated_svd(dense, Rule("rank", RANK), rank=RANK)),
            "svd": lambda: common.timed(lambda: torch.linalg.svd(dense, full_matrices=False)),
        },
        arguments.rounds,
        lambda: None,
    )
    found = truncated_svd(dense, Rule("rank", RANK), rank=RANK)
    sigma = torch.linalg.svdvals(dense.double())
    error = float((dense - found.up @ found.down).norm() / sigma[RANK:].norm())
    print(f"svd: 4096², rank {RANK}: {taken['leading']:.3f} s; torch.linalg.svd {taken['svd']:.1f} s", end="")
    print(f" = {taken['svd'] / taken['leading']:.0f} × ours; error 1 + {error - 1:.1e} of the best")


def memory_part(folder: Path, arguments: argparse.Namespace) -> None:
    imports = common.import_bytes("loratool.verbs.extract.extract")
    for layers in (6, 24):
        base, tuned = small_pair(folder / str(layers), layers)
        peak = common.loratool("extract", base, tuned, "-o", folder / "out", "--rank", str(RANK))["peak_bytes"] - imports
        size = sum(path.stat().st_size for path in base.iterdir())
        common.clear(folder / "out")
        print(f"memory: 2 × {size / 1e9:.2f} GB, largest layer 17.4 MB: peak {peak / 1e6:.0f} MB beyond imports")


def range_part(folder: Path, arguments: argparse.Namespace) -> None:
    """One step of the range finder on 4096² matrices, two products with each, against plain products of the same device."""
    device = devices_named(arguments.device)[0]
    count, columns = (8 if device.type != "cpu" else 1), 24
    matrices = torch.randn(count, floors.SIDE, floors.SIDE, device=device)
    seconds = floors.best(lambda: krylov._Range(matrices, 0).grow(columns), device)
    rate = count * 2 * 2 * floors.SIDE**2 * columns / seconds
    square, skinny = floors.matmul(device), floors.matmul(device, columns)
    print(
        f"range: {count} × 4096², {columns} columns: {seconds:.4f} s, {rate / 1e12:.3f} TFLOP/s in products with D: ", end=""
    )
    print(f"{rate / square:.0%} of a product of squares, {rate / skinny:.0%} of one with {columns} columns")


PARTS = {"pair": pair_part, "svd": svd_part, "range": range_part, "memory": memory_part}


if __name__ == "__main__":
    main()
