"""From one parameter of two checkpoints to its delta, with the error measured on the tensors that are to be stored."""

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
from loratool.base.difference import Difference, difference, pair_bytes
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
"""Dtypes of tuned weights in which their factors are stored too; 8-bit weights get bfloat16 factors, all others float32."""


@dataclass(frozen=True, slots=True)
class ExtractedModule:
    """What became of one parameter: its name, how the change is held ("lora", or a leaf such as "diff_b"), and the rank, 0
    of a leaf without one; ‖W' − W₀‖; the relative `error` of what is stored, measured by subtraction, and `least`, the
    relative error before rounding; the effective rank of what is kept; and how far ‖W' − W₀‖ is above what rounding W' to
    its dtype alone comes to, in dB (None: nothing was rounded)."""

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
    """The delta of one parameter that changed, None where nothing of the change is kept, and the figures for the report."""

    delta: Delta | None
    figures: ExtractedModule


@dataclass(frozen=True, slots=True)
class Task:
    """A pair, the form in which its change is to be held, and the rule; without a rule the change is only measured."""

    pair: Pair
    form: str | None
    rule: Rule | None


@dataclass(frozen=True, slots=True)
class Extraction:
    """Two checkpoints, and where and how the deltas between them are computed and stored; without a `dtype`, each delta in
    the dtype that `stored_as` gives for its weight."""

    base: BaseCheckpoint
    tuned: BaseCheckpoint
    devices: DevicePool
    dtype: torch.dtype | None = None
    split: Split = "even"
    clamp: float | None = None

    def nbytes(self, pair: Pair) -> int:
        """The bytes that are read of both checkpoints for `pair`."""
        return pair_bytes(self.base, self.tuned, pair)

    def outcomes(self, tasks: Sequence[Task], device: torch.device) -> list[Outcome | None]:
        """The outcomes of tasks whose pairs have one shape, computed together; None for a pair that did not change. The
        rules of all tasks expect the same rank.

        Raises `LoratoolError` naming the parameter.
        """
        started = time.monotonic()
        changes = [difference(self.base, self.tuned, task.pair, device, noise=True) for task in tasks]
        # First all plain matrices at once, in the batched products that a GPU is fast at; then pair by pair, where each
        # task that has a matrix takes the next result.
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
        # What was computed together cannot be timed apart.
        seconds = (time.monotonic() - started) / len(tasks)
        return [each and replace(each, figures=replace(each.figures, seconds=seconds)) for each in found]

    def offers(self, tasks: Sequence[Task], device: torch.device) -> list[RankCandidate | None]:
        """The leading singular values of changes of one shape, as many as the rules want; None for a pair without change."""
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
        """The dtype of the tensors stored for `pair`: the one asked for, else what the tuned weight's dtype calls for."""
        if self.dtype:
            return self.dtype
        dtype = DTYPES[self.tuned.layout.info(pair.tuned[0].tensor).dtype]
        if dtype in _NARROW:
            return dtype
        return torch.bfloat16 if dtype.itemsize == 1 else torch.float32

    def _storage(self, pair: Pair) -> Storage:
        return Storage(self.stored_as(pair), self.split, self.clamp)

    def _factorise(self, matrices: Sequence[tuple[Task, Difference]]) -> list[StoredFactors | LoratoolError]:
        """The factors of plain matrices of one shape as they are to be stored, or the error in the place of a matrix."""
        if not matrices:
            return []
        return factorise_batch(
            [change.dense.flatten(1) for _, change in matrices],
            [(task.rule or Rule()).of(task.pair.shape) for task, _ in matrices],
            [self._storage(task.pair) for task, _ in matrices],
            [change.edge for _, change in matrices],
        )

    def _hold(self, change: Difference, task: Task, found: StoredFactors | LoratoolError | None) -> Outcome:
        """The outcome of one change in the form that the task asks for; `found` is what became of a plain matrix."""
        pair, form, storage = task.pair, task.form if task.rule else None, self._storage(task.pair)
        # Raised here and not by the batch, so that the message names this parameter.
        if isinstance(found, LoratoolError):
            raise found
        if found:
            return _of_factors(change, pair, [found], as_lora(found, pair.shape) if found.rank else None)
        if form == EXPERTS:
            each = [factorise(expert, task.rule or Rule(), storage, noise=change.edge) for expert in change.dense]
            return _of_factors(change, pair, each, _stack_experts(each) if any(part.rank for part in each) else None)
        # The tuned tensor itself, in its own dtype: nothing is lost.
        if form in REPLACED:
            return Outcome(Replace(self.tuned.at(pair.tuned), form), _figures(change, pair, form, 0.0))
        if form is None:
            return Outcome(None, _figures(change, pair, "", change.norm))
        stored = change.dense.to(storage.dtype)
        if not bool(stored.isfinite().all()):
            raise NonFinite(f"overflows {dtype_name(storage.dtype)}; choose `dtype='float32'` or bfloat16")
        error = math.sqrt(squared_norm((change.dense - to_compute_dtype(stored)).reshape(1, -1)))
        # PEFT multiplies lora_B.bias by the scale of its module's factors, which `as_lora` makes 1.
        delta = Full(stored.cpu(), form, 1.0 if form == BESIDE_LORA else None)
        return Outcome(delta, _figures(change, pair, form, error))


def _of_factors(change: Difference, pair: Pair, parts: list[StoredFactors], delta: Delta | None) -> Outcome:
    """The outcome of a LoRA, or of one for each expert: errors add up as squares, ranks are the largest."""
    error, least = (math.sqrt(sum(getattr(part, name) ** 2 for part in parts)) for name in ("error", "least"))
    rank = max(part.rank for part in parts)
    effective = max(part.effective_rank for part in parts)
    figures = _figures(change, pair, LORA, error, least, rank, effective)
    return Outcome(delta, figures)


def _figures(
    change: Difference, pair: Pair, held: str, error: float, least: float = 0.0, rank: int = 0, effective: float = 0.0
) -> ExtractedModule:
    """The figures of a change from absolute errors; `change.norm` is not 0, since `difference` drops unchanged pairs."""
    # A ratio of norms is one of amplitudes, hence 20 and not 10.
    snr = 20 * math.log10(change.norm / change.noise) if change.noise else None
    return ExtractedModule(str(pair), held, rank, change.norm, error / change.norm, least / change.norm, effective, snr)


def _stack_experts(experts: list[StoredFactors]) -> ExpertLoRA:
    """The LoRA of stacked experts as PEFT's target_parameters has it: of one rank, with zeros for what an expert lacks."""
    # PEFT's two factors run differently (class ParamWrapper): `down` by expert and then rank, `up` by rank and then expert.
    rank = max(expert.rank for expert in experts)
    downs = [_fill_rank(expert.down, rank) for expert in experts]
    ups = [_fill_rank(expert.up.T, rank).T for expert in experts]
    return ExpertLoRA(torch.cat(downs), torch.stack(ups, dim=2).flatten(1), rank, 1.0)


def _fill_rank(rows: Tensor, count: int) -> Tensor:
    """`rows` with rows of zeros below, `count` in all."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])
