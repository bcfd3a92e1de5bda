"""Sources of changes: an adapter, or two checkpoints. Each change is computed when it is asked for, and not kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loratool.adapter.adapter import Adapter, Change, factor_workload, files_of
from loratool.base.base import BaseCheckpoint
from loratool.base.difference import difference, difference_workload
from loratool.base.effects import Effect, effect_of
from loratool.base.pairs import Pair, Takes, pair_parameters
from loratool.errors import error_context
from loratool.files.layout import Layout, require_weights
from loratool.files.output import Input
from loratool.names import Module
from loratool.numbers.workload import Workload

_QUANTISED = "a difference to it is that of the quantisation; compare the 16-bit originals"


class DeltaSource(ABC):
    """A source of `count` changes, each with a number and a name, and computed when it is asked for."""

    count: int
    warnings: tuple[str, ...]
    inputs: Sequence[Input]

    @abstractmethod
    def name(self, number: int) -> str:
        """The name of a change in reports."""

    @abstractmethod
    def place(self, number: int) -> tuple[Module, str]:
        """The module and the parameter that change."""

    @abstractmethod
    def nbytes(self, number: int) -> int:
        """The bytes of the whole ΔW in float32, as a measure of the work."""

    @abstractmethod
    def workload(self) -> Workload:
        """All changes, as work."""

    @abstractmethod
    def effect(self, number: int, device: torch.device) -> Effect | None:
        """The change, computed on `device`; None where nothing changes. Raises `LoratoolError`."""


class AdapterDeltas(DeltaSource):
    """The changes of an adapter; `weights` is its base, which some kinds need, and with whose norms changes are compared."""

    def __init__(self, adapter: Adapter, takes: Takes, weights: BaseCheckpoint | None) -> None:
        self.adapter, self.weights = adapter, weights
        taken = [change for change in adapter.changes if takes(change.module, change.parameter)]
        self.changes = [change for change in taken if self._is_there(change)]
        self.count, self.warnings = len(self.changes), adapter.warnings
        self.inputs = [*files_of([adapter]), *([weights.layout] if weights else [])]

    def name(self, number: int) -> str:
        return str(self.changes[number])

    def place(self, number: int) -> tuple[Module, str]:
        return self.changes[number].module, self.changes[number].parameter

    def nbytes(self, number: int) -> int:
        # A dimension that is left to the weight is `ANY`, −1: such a product tells nothing, and counts as 1.
        return 4 * max(math.prod(self.changes[number].delta.shape), 1)

    def workload(self) -> Workload:
        work = factor_workload([replace(self.adapter, changes=tuple(self.changes))])
        if self.weights is None:
            return work
        # ‖W₀‖ takes a reading of every weight that changes.
        return replace(work, read=work.read + sum(self.nbytes(number) for number in range(self.count)))

    def effect(self, number: int, device: torch.device) -> Effect:
        change = self.changes[number]
        with error_context(f"{self.adapter.path}: {change}"):
            return self._effect(change, device)

    def _is_there(self, change: Change) -> bool:
        """Whether a change has its target: PEFT's (IA)³ multiplies a layer's bias, which the base may lack."""
        return not change.optional or bool(self.weights and self.weights.targets.find(change.module, change.parameter))

    def _effect(self, change: Change, device: torch.device) -> Effect:
        """The effect of a change on its weight in the base, with ‖W₀‖, or without either where the base lacks the module."""
        # Only kinds that depend on their weight fail without it; all others are measured without ‖W₀‖.
        found = self.weights and self.weights.targets.find(change.module, change.parameter)
        base = self.weights if found else None
        return effect_of(change.delta, change.module, change.parameter, base, device, measure_weight=True)


class CheckpointDeltas(DeltaSource):
    """The changes W' − W₀ of every parameter that two checkpoints have in common."""

    def __init__(self, base: Layout, tuned: Path, takes: Takes) -> None:
        self.base, self.tuned = BaseCheckpoint(base), BaseCheckpoint(tuned)
        for weights in (self.base, self.tuned):
            require_weights(weights.layout, _QUANTISED)
        pairing = pair_parameters(self.base, self.tuned, takes)
        self.pairs: Sequence[Pair] = pairing.pairs
        self.count, self.warnings = len(self.pairs), pairing.warnings
        self.inputs = [self.base.layout, self.tuned.layout]

    def name(self, number: int) -> str:
        return str(self.pairs[number])

    def place(self, number: int) -> tuple[Module, str]:
        return self.pairs[number].module, self.pairs[number].parameter

    def nbytes(self, number: int) -> int:
        return 4 * max(math.prod(self.pairs[number].shape), 1)

    def workload(self) -> Workload:
        return difference_workload(self.base, self.tuned, self.pairs)

    def effect(self, number: int, device: torch.device) -> Effect | None:
        pair = self.pairs[number]
        change = difference(self.base, self.tuned, pair, device, base_norm=True)
        return Effect(tuple(change.dense.shape), None, change.dense, change.base_norm) if change else None
