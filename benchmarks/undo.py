"""Merging with an undo file, taking it back, swapping: `python -m benchmarks.undo [--folder DIR] [--device NAME]`.

A Llama-shaped bf16 model and PEFT adapters of rank 16 on all linear layers, at a strength that changes the weights by about
a hundredth of their size. All times are those of the whole call, synced, without Python's start and imports, against `cp -r`
of the model and a sync.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import common, floors
from loratool.numbers.device_choice import devices_named

STRENGTH = "0.12"
"""Factors of 0.02 · N(0, 1) and rank 16 make 0.0016 · N(0, 1); weights are 0.02 · N(0, 1)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put some 12 GB; default: a temporary folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22, help="22 make 1.1B parameters, 2048 wide")
    arguments = parser.parse_args()
    print(floors.described(devices_named(arguments.device)[0]))
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="loratool-bench-") as name:
        measure(Path(name), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    base = common.llama(folder / "base", arguments.layers)
    one, other = (common.peft_adapter(folder / name, base) for name in ("one", "other"))
    merged, undo, out = folder / "merged", folder / "undo", folder / "out"
    adapter = f"{one}:{STRENGTH}"
    report = common.loratool("merge", base, adapter, "-o", merged, "--undo", undo)

    def ours(*words: str | Path) -> float:
        return common.loratool(*words, "--device", arguments.device)["seconds"]

    def prepare() -> None:
        common.clear(out)
        common.clear(folder / "again")

    works = {
        "cp + sync": lambda: common.copy(base, out, sync=True),
        "merge": lambda: ours("merge", base, adapter, "-o", out),
        "merge --undo": lambda: ours("merge", base, adapter, "-o", out, "--undo", folder / "again"),
        "unmerge --undo": lambda: ours("unmerge", merged, "--undo", undo, "-o", out),
        "unmerge ADAPTER": lambda: ours("unmerge", merged, adapter, "-o", out),
        "swap": lambda: ours("swap", merged, "--out", adapter, "--in", f"{other}:{STRENGTH}", "-o", out),
        "swap --in-place": lambda: ours(
            # The second takes out what the first put in, so that every round finds the same model.
            "swap",
            merged,
            "--out",
            f"{other}:0.5",
            "--in",
            f"{other}:0.5",
            "--in-place",
        ),
    }
    taken = common.in_turns(works, arguments.rounds, prepare)
    size = sum(path.stat().st_size for path in base.iterdir())
    touched = common.loratool("unmerge", merged, "--undo", undo, "-o", out)["numbers"]
    own = sum(path.stat().st_size for path in one.iterdir())
    bits = 8 * (undo.stat().st_size - own) / touched
    print(f"undo: {size / 1e9:.2f} GB bf16, {touched / 1e9:.2f} B numbers touched, on {arguments.device}")
    print(f"  undo file {undo.stat().st_size / 1e6:.1f} MB, {own / 1e6:.1f} MB of it the adapter: {bits:.3f} bits a number")
    print(f"  rounding left {report['unchanged']:.1%} of them unchanged")
    for name, seconds in taken.items():
        print(f"  {name}: {seconds:.2f} s = {seconds / taken['cp + sync']:.2f} × cp and sync")
    peak = common.loratool("unmerge", merged, "--undo", undo, "-o", out, "--overwrite")["peak_bytes"]
    imports = common.import_bytes("loratool.verbs.unmerge.unmerge")
    print(f"  unmerge's peak memory beyond the imports: {(peak - imports) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
