"""`convert --to-lora` and `resize`: deltas as the best LoRA of some rank or error, and what that leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.adapter import Adapter, Change, Unsaid, load
from loratool.ops.lowering import Converted, Lowering
from loratool.ops.saving import write
from loratool.ops.weights import Weights
from loratool.ranks import Budget, Rule
from loratool.schema import WEIGHT

KEPT: Final = frozenset({"lora", "embedding", "enlarge", "replace", "tokens"})
"""Kinds that a LoRA file holds as they are."""
RESIZED: Final = frozenset({"lora"})
"""Of these, the kind whose rank can be another."""


@dataclass(frozen=True, slots=True)
class LowRankReport:
    """What a conversion did: every module that changed its kind, how many did not, and the error over all of them."""

    out: str
    modules: tuple[Converted, ...]
    kept: int
    error: float
    nbytes: int
    warnings: tuple[str, ...] = ()

    @property
    def worst(self) -> Converted | None:
        """The module with the largest error."""
        return max(self.modules, key=lambda module: module.error, default=None)


def to_lora(
    path: str | Path,
    out: str | Path,
    rule: Rule | None = None,
    *,
    dtype: str | None = None,
    base: str | Path | None = None,
    unsaid: Unsaid | None = None,
    overwrite: bool = False,
) -> LowRankReport:
    """Writes the adapter at `path` to `out` with every delta on a matrix or a kernel as a LoRA.

    What is a LoRA already keeps its bytes. Kinds that depend on the weight (DoRA, OFT, (IA)³ …) need `base`. Errors are
    those of the factors as stored. Raises `LoratoolError`.
    """
    return _approximated(load(path, unsaid=unsaid), Path(out), rule or Rule(), dtype, KEPT, base=base, overwrite=overwrite)


def resize(
    path: str | Path,
    out: str | Path,
    rule: Rule | Budget,
    *,
    dtype: str | None = None,
    base: str | Path | None = None,
    unsaid: Unsaid | None = None,
    overwrite: bool = False,
) -> LowRankReport:
    """Writes the adapter at `path` to `out` with every LoRA, and every other kind as a LoRA, of the rank that `rule` gives.

    The best approximation at that rank (Eckart and Young 1936), from QR of the factors and the SVD of their small core. A
    budget is shared over all modules; one that no rank of is worth its bytes is dropped, and has rank 0 in the report.
    """
    return _approximated(load(path, unsaid=unsaid), Path(out), rule, dtype, KEPT - RESIZED, base=base, overwrite=overwrite)


def _approximated(
    adapter: Adapter,
    out: Path,
    rule: Rule | Budget,
    dtype: str | None,
    keep: frozenset[str],
    *,
    base: str | Path | None,
    overwrite: bool,
) -> LowRankReport:
    work = Lowering(adapter, dtype, keep, Weights(Path(base).expanduser()) if base else None)
    done = work.lowered(rule) if isinstance(rule, Rule) else work.within(rule)
    nbytes = write(work.contents(done), [adapter.path], out.expanduser(), overwrite=overwrite)
    figures = tuple(figures for figures, _ in done.values())
    return LowRankReport(str(out), figures, len(work.kept), error_of(figures), nbytes, adapter.notes)


def lower(
    adapter: Adapter, rule: Rule, dtype: str | None = None, *, base: str | Path | None = None
) -> tuple[Adapter, list[Converted]]:
    """The adapter with every delta on a matrix or a kernel that a LoRA file cannot hold as a LoRA of scale 1, and what
    became of each."""
    work = Lowering(adapter, dtype, KEPT, Weights(Path(base).expanduser()) if base else None)
    done = work.lowered(rule)
    changes = [
        Change(change.module, WEIGHT, done[number][1]) if number in done else change
        for number, change in enumerate(adapter.changes)
        if not change.optional
    ]
    return replace(adapter, changes=tuple(changes)), [figures for figures, _ in done.values()]


def error_of(converted: Sequence[Converted]) -> float:
    """The relative error over all modules."""
    left = sum((module.error * module.norm) ** 2 for module in converted) ** 0.5
    whole = sum(module.norm**2 for module in converted) ** 0.5
    return left / whole if whole else 0.0
