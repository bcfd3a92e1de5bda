"""One parameter of two checkpoints to the delta between them, with its error measured on what is to be stored."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from loratool.adapter.approximate import as_lora
from loratool.base.base import BaseCheckpoint
from loratool.base.difference import Difference, difference
from loratool.base.pairs import Pair
from loratool.deltas.base import Delta, to_compute_dtype
from loratool.deltas.experts import ExpertLoRA
from loratool.deltas.full import Full, Replace
from loratool.errors import LoratoolError, NonFinite, error_context
from loratool.files.tensors import DTYPES
from loratool.numbers.devices import DevicePool
from loratool.numbers.factor import Split, Storage, StoredFactors, candidates_of, factorise, factorise_batch
from loratool.numbers.krylov import squared_norm
from loratool.numbers.linalg import dtype_name
from loratool.numbers.ranks import RankCandidate, Rule
from loratool.verbs.extract.forms import BESIDE_LORA, EXPERTS, LORA, REPLACED

_NARROW: Final = (torch.float16, torch.bfloat16)
"""Dtypes of tuned weights that factors are stored in too; others make float32, and the 8-bit ones bfloat16."""


@dataclass(frozen=True, slots=True)
class ExtractedModule:
    """What became of one parameter: its name, how it is held ("lora", or a leaf such as "diff_b"), and its rank, 0 where it
    has none; ‖W' − W₀‖; the relative `error` of what is stored, measured by subtracting it, and `least`, that of the same
    before it was rounded; the effective rank of what is kept; and how far ‖W' − W₀‖ is above what rounding W' to its dtype
    would alone come to, in dB (None: nothing was rounded)."""

    name: str
    held: str
    rank: int
    norm: float
    error: float
    least: float
    effective_rank: float
    snr: float | None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The delta of one parameter that changed; None where the rule kept nothing of it."""

    delta: Delta | None
    figures: ExtractedModule


@dataclass(frozen=True, slots=True)
class Task:
    """A pair, the form in which its change is to be held, and the rule; without a rule it is only measured."""

    pair: Pair
    form: str | None
    rule: Rule | None


@dataclass(frozen=True, slots=True)
class Extraction:
    """Two checkpoints, and where and how the deltas between them are computed and stored; without a `dtype`, each as its
    weight is."""

    base: BaseCheckpoint
    tuned: BaseCheckpoint
    devices: DevicePool
    dtype: torch.dtype | None = None
    split: Split = "even"
    clamp: float | None = None

    def nbytes(self, pair: Pair) -> int:
        """The bytes of `pair` that are read of both checkpoints."""
        sides = ((self.base, pair.base, pair.shape), (self.tuned, pair.tuned, pair.tuned_shape))
        dtypes = [weights.layout.info(places[0].tensor).dtype for weights, places, _ in sides]
        return sum(math.prod(shape) * DTYPES[dtype].itemsize for (*_, shape), dtype in zip(sides, dtypes, strict=True))

    def outcomes(self, tasks: Sequence[Task], device: torch.device) -> list[Outcome | None]:
        """What pairs of one shape changed, each in the form of its task (None: it is only measured), computed together; None
        for what changed nothing. The rules of all expect the same rank.

        Raises `LoratoolError` naming the parameter.
        """
        started = time.monotonic()
        changes = [difference(self.base, self.tuned, task.pair, device) for task in tasks]
        matrices = [
            (task, change) for task, change in zip(tasks, changes, strict=True) if change and task.form == LORA and task.rule
        ]
        together = iter(self._factorise(matrices))
        found: list[Outcome | None] = []
        for task, change in zip(tasks, changes, strict=True):
            if change is None:
                found.append(None)
                continue
            with error_context(task.pair):
                found.append(self._hold(change, task, next(together) if task.form == LORA and task.rule else None))
        seconds = (time.monotonic() - started) / len(tasks)
        return [each and replace(each, figures=replace(each.figures, seconds=seconds)) for each in found]

    def offers(self, tasks: Sequence[Task], device: torch.device) -> list[RankCandidate | None]:
        """The leading singular values of changes of one shape, as many as the rules want; None where there is no change."""
        changes = [difference(self.base, self.tuned, task.pair, device) for task in tasks]
        wanted = [(task, change) for task, change in zip(tasks, changes, strict=True) if change]
        if not wanted:
            return [None for _ in tasks]
        found = iter(
            candidates_of(
                [change.dense.flatten(1) for _, change in wanted],
                [task.rule or Rule() for task, _ in wanted],
                [self.stored_as(task.pair).itemsize for task, _ in wanted],
            )
        )
        return [next(found) if change else None for change in changes]

    def stored_as(self, pair: Pair) -> torch.dtype:
        """The dtype of what is stored of `pair`: where nobody says, that of the tuned weight if it is a narrow one."""
        if self.dtype:
            return self.dtype
        dtype = DTYPES[self.tuned.layout.info(pair.tuned[0].tensor).dtype]
        if dtype in _NARROW:
            return dtype
        return torch.bfloat16 if dtype.itemsize == 1 else torch.float32

    def _storage(self, pair: Pair) -> Storage:
        return Storage(self.stored_as(pair), self.split, self.clamp)

    def _factorise(self, matrices: Sequence[tuple[Task, Difference]]) -> list[StoredFactors | LoratoolError]:
        if not matrices:
            return []
        return factorise_batch(
            [change.dense.flatten(1) for _, change in matrices],
            [(task.rule or Rule()).of(task.pair.shape) for task, _ in matrices],
            [self._storage(task.pair) for task, _ in matrices],
            [change.edge for _, change in matrices],
        )

    def _hold(self, change: Difference, task: Task, found: StoredFactors | LoratoolError | None) -> Outcome:
        pair, form, storage = task.pair, task.form if task.rule else None, self._storage(task.pair)
        if isinstance(found, LoratoolError):
            raise found
        if found:
            return _of_factors(change, pair, [found], as_lora(found, pair.shape) if found.rank else None)
        if form == EXPERTS:
            each = [factorise(expert, task.rule or Rule(), storage, noise=change.edge) for expert in change.dense]
            return _of_factors(change, pair, each, _stack_experts(each) if any(part.rank for part in each) else None)
        if form in REPLACED:
            return Outcome(Replace(self.tuned.at(pair.tuned), form), _figures(change, pair, form, 0.0))
        if form is None:
            return Outcome(None, _figures(change, pair, "", change.norm))
        stored = change.dense.to(storage.dtype)
        if not bool(stored.isfinite().all()):
            raise NonFinite(f"overflows {dtype_name(storage.dtype)}; choose `dtype='float32'` or bfloat16")
        error = math.sqrt(squared_norm((change.dense - to_compute_dtype(stored)).reshape(1, -1)))
        delta = Full(stored.cpu(), form, 1.0 if form == BESIDE_LORA else None)
        return Outcome(delta, _figures(change, pair, form, error))


def _of_factors(change: Difference, pair: Pair, parts: list[StoredFactors], delta: Delta | None) -> Outcome:
    """Of a LoRA, or one for each expert."""
    error, least = (math.sqrt(sum(getattr(part, name) ** 2 for part in parts)) for name in ("error", "least"))
    rank = max(part.rank for part in parts)
    effective = max(part.effective_rank for part in parts)
    figures = _figures(change, pair, LORA, error, least, rank, effective)
    return Outcome(delta, figures)


def _figures(
    change: Difference, pair: Pair, held: str, error: float, least: float = 0.0, rank: int = 0, effective: float = 0.0
) -> ExtractedModule:
    snr = 20 * math.log10(change.norm / change.noise) if change.noise else None
    return ExtractedModule(str(pair), held, rank, change.norm, error / change.norm, least / change.norm, effective, snr)


def _stack_experts(experts: list[StoredFactors]) -> ExpertLoRA:
    """The LoRA of stacked experts as PEFT's target_parameters has it, all of one rank: zeros fill up what a smaller one
    lacks."""
    rank = max(expert.rank for expert in experts)
    downs = [_fill_rank(expert.down, rank) for expert in experts]
    ups = [_fill_rank(expert.up.T, rank).T for expert in experts]
    return ExpertLoRA(torch.cat(downs), torch.stack(ups, dim=2).flatten(1), rank, 1.0)


def _fill_rank(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])
