"""What changes, module by module: by an adapter, or from one checkpoint to another. Only what is asked for is held."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch

from loratool.adapter.adapter import Adapter, Change, files_of
from loratool.base.base import BaseCheckpoint
from loratool.base.difference import difference
from loratool.base.effects import Effect, effect_of, weight_norm
from loratool.base.pairs import Pair, Takes, pair_parameters
from loratool.errors import error_context
from loratool.files.layout import Layout, require_weights
from loratool.files.output import Input
from loratool.names import Module

_QUANTISED = "a difference to it is that of the quantisation; compare the 16-bit originals"


class DeltaSource(ABC):
    """Where changes come from: `count` of them, each with a name, computed when it is asked for."""

    count: int
    warnings: tuple[str, ...]
    inputs: Sequence[Input]

    @abstractmethod
    def name(self, number: int) -> str:
        """What a change is called in reports."""

    @abstractmethod
    def place(self, number: int) -> tuple[Module, str]:
        """The module and its parameter."""

    @abstractmethod
    def nbytes(self, number: int) -> int:
        """What computing a change costs, in bytes of the whole ΔW."""

    @abstractmethod
    def effect(self, number: int, device: torch.device) -> Effect | None:
        """What changes, computed on `device`; None where nothing does. Raises `LoratoolError`."""


class AdapterDeltas(DeltaSource):
    """What an adapter adds; `weights` are those of its base, which some kinds need, and whose norms it is compared with."""

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
        return 4 * max(math.prod(self.changes[number].delta.shape), 1)

    def effect(self, number: int, device: torch.device) -> Effect:
        change = self.changes[number]
        with error_context(f"{self.adapter.path}: {change}"):
            return self._effect(change, device)

    def _is_there(self, change: Change) -> bool:
        """Whether an optional change, of a bias that not every layer has, has something to change."""
        return not change.optional or bool(self.weights and self.weights.targets.find(change.module, change.parameter))

    def _effect(self, change: Change, device: torch.device) -> Effect:
        found = self.weights and self.weights.targets.find(change.module, change.parameter)
        base = self.weights if found else None
        return effect_of(change.delta, change.module, change.parameter, base, device, measure_weight=True)


class CheckpointDeltas(DeltaSource):
    """W' − W₀, for every parameter that both have."""

    def __init__(self, base: Layout, tuned: Path, takes: Takes, *, pinned: bool) -> None:
        self.base, self.tuned = BaseCheckpoint(base, pinned=pinned), BaseCheckpoint(tuned, pinned=pinned)
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

    def effect(self, number: int, device: torch.device) -> Effect | None:
        pair = self.pairs[number]
        change = difference(self.base, self.tuned, pair, device)
        if change is None:
            return None
        return Effect(tuple(change.dense.shape), None, change.dense, weight_norm(self.base.at(pair.base)))
