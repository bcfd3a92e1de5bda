"""Approximates an adapter's deltas by LoRA, one by one or within a budget over all of them, as they are to be stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor

from loratool.adapter.adapter import ONLY_PEFT, Adapter, Change, factor_workload
from loratool.base.base import BaseCheckpoint, open_base
from loratool.base.effects import Effect, effect_of
from loratool.deltas.base import Delta
from loratool.deltas.lora import Embedding, LoRA
from loratool.deltas.schema import BIAS, WEIGHT
from loratool.errors import LoratoolError, NeedsBase, Unsupported, error_context, error_in_file
from loratool.numbers.budgets import RankAllocator, within_error
from loratool.numbers.device_choice import open_devices
from loratool.numbers.devices import DevicePool
from loratool.numbers.factor import Storage, StoredFactors, candidate_of, factorise, recompress
from loratool.numbers.linalg import ProductSVD
from loratool.numbers.ranks import Budget, RankCandidate, Rule

_T = TypeVar("_T")

KeepsDelta = Callable[[Delta], bool]
"""Says of a delta whether it stays what it is."""


def fits_lora_file(delta: Delta) -> bool:
    """Whether a file of LoRA holds `delta` as it is, at whatever rank."""
    return delta.fits_lora_file


def keeps_its_rank(delta: Delta) -> bool:
    """Whether a file of LoRA holds `delta` as it is, and its rank cannot be changed."""
    return delta.fits_lora_file and not delta.resizable


KEEP_NO_RANK: Final = Rule("rank", 1, most=0)
"""The rule that keeps nothing of a module."""


@dataclass(frozen=True, slots=True)
class ApproximatedModule:
    """One module that became a LoRA: the kind it had, its new rank, ‖ΔW‖, and ‖ΔW − LoRA‖ / ‖ΔW‖."""

    name: str
    kind: str
    rank: int
    norm: float
    error: float


ApproximatedDeltas = dict[int, tuple[ApproximatedModule, Delta]]
"""What became of each change, by its number in the adapter: the figures, and the LoRA, of rank 0 where nothing is left."""


class Approximation:
    """An adapter whose deltas become LoRA: the `numbers` of those changes, and the changes that are `kept`."""

    def __init__(
        self,
        adapter: Adapter,
        dtype: torch.dtype | None,
        keep: KeepsDelta,
        base: BaseCheckpoint | None,
        *,
        devices: DevicePool,
        weigh: bool = False,
    ) -> None:
        self.adapter, self.dtype, self.base, self.devices = adapter, dtype, base, devices
        self.numbers: list[int] = []
        self.kept: list[Change] = []
        for number, change in enumerate(adapter.changes):
            # Optional is what (IA)³ does to a bias, beside the same delta on the weight: dropped, where there is no bias.
            if change.optional:
                with error_in_file(adapter.path):
                    _require_no_bias(change, base)
            elif keep(change.delta) or change.parameter == BIAS or len(change.delta.shape) < 2:
                self.kept.append(change)
            else:
                self.numbers.append(number)
        self.worth = {number: self._worth(number) if weigh else 1.0 for number in self.numbers}

    def approximate(self, rule: Rule | Mapping[int, Rule]) -> ApproximatedDeltas:
        """Approximates every delta to a LoRA, by one rule for all or by each one's own."""

        def compute(numbers: Sequence[int], device: torch.device) -> list[tuple[ApproximatedModule, Delta]]:
            changes = [self.adapter.changes[number] for number in numbers]
            effects = [_effect(change, self.base, device) for change in changes]
            rules = [rule if isinstance(rule, Rule) else rule[number] for number in numbers]
            return _low_rank(changes, effects, rules, [Storage(self._stored_as(change)) for change in changes])

        return self._on_devices(self.numbers, compute)

    def _on_devices(
        self, numbers: Iterable[int], compute: Callable[[Sequence[int], torch.device], list[_T]]
    ) -> dict[int, _T]:
        """The results of `compute` by number, those of one shape computed together where a device gains by it."""
        changes = self.adapter.changes
        return self.devices.map_alike(
            numbers,
            compute,
            title=lambda number: str(changes[number]),
            alike=lambda number: changes[number].delta.shape,
            nbytes=lambda number: 4 * math.prod(changes[number].delta.shape),
        )

    def within(self, budget: Budget, size: Callable[[ApproximatedDeltas], int]) -> ApproximatedDeltas:
        """Approximates every delta to the rank that its share of the budget buys; `size` gives the bytes of the output."""
        market = RankAllocator(self.numbers, self.offers, budget)
        # A size follows from ranks alone: placeholders stand in until these are settled, and only then are factors computed.
        if budget.nbytes is not None:
            return self._at(market.within_bytes(budget.nbytes, lambda ranks: size(self.placeholders(ranks))))
        # An error is not: rounding adds to it, so the factors as stored are measured, and fewer squares spent if need be.
        return within_error(
            budget.error or 0.0,
            market.total,
            lambda allowed: self._at(market.within_error(allowed)),
            lambda done: sum((figures.error * figures.norm * self.worth[i]) ** 2 for i, (figures, _) in done.items()),
        )

    def _stored_as(self, change: Change) -> torch.dtype:
        """The dtype of new factors: the one asked for, else the widest that the change's own leaves have."""
        if self.dtype:
            return self.dtype
        dtypes = [tensor.dtype for tensor in change.delta.leaves().values() if tensor.is_floating_point()]
        return max(dtypes, key=lambda dtype: dtype.itemsize)

    def _at(self, ranks: Mapping[int, int]) -> ApproximatedDeltas:
        # Ranks of 0 are left out of what the budget bought.
        rules = {number: Rule("rank", rank) for number, rank in ranks.items()}
        return self.approximate(dict.fromkeys(self.numbers, KEEP_NO_RANK) | rules)

    def offers(self, rules: Mapping[int, Rule]) -> dict[int, RankCandidate]:
        """The singular values of modules and the bytes that a rank of each costs, as far as each module's rule looks."""

        def compute(numbers: Sequence[int], device: torch.device) -> list[RankCandidate]:
            return [self._candidate_on(number, rules[number], device) for number in numbers]

        return self._on_devices(rules, compute)

    def _worth(self, number: int) -> float:
        """The factor 1 / ‖W‖ of a module's singular values, by which an error counts relative to the weight W it is in."""
        change = self.adapter.changes[number]
        if self.base is None:
            raise NeedsBase(f"{change}: what its weight is like only the base can tell; pass `base=`")
        norm = float(self.base.of(change.module).float().norm())
        return 1 / norm if norm else 0.0

    def _candidate_on(self, number: int, rule: Rule, device: torch.device) -> RankCandidate:
        change = self.adapter.changes[number]
        delta = _effect(change, self.base, device)
        each, worth = self._stored_as(change).itemsize, self.worth[number]
        # The small core of a product has all its singular values, so that nobody need look again.
        if delta.factors:
            core = ProductSVD.of(*delta.factors)
            cost = len(delta.factors[0]) + delta.factors[1].shape[1]
            return RankCandidate(core.sigma.cpu() * worth, True, cost * each, float(core.squares.sum()) * worth**2)
        # A threshold speaks of weighed singular values, the matrix has the bare ones.
        seen = replace(rule, value=rule.value / worth) if rule.method == "threshold" and worth else rule
        offer = candidate_of(delta.dense().flatten(1), seen, each)
        return replace(offer, sigma=offer.sigma * worth, total=offer.total * worth**2)

    def placeholders(self, ranks: Mapping[int, int]) -> ApproximatedDeltas:
        """What would be written at these ranks, to be measured in bytes: LoRA of the right shapes and dtypes, all zeros."""
        done: ApproximatedDeltas = {}
        for number, asked in ranks.items():
            change = self.adapter.changes[number]
            flattened = self.base is not None and change.delta.kernel_flattened
            shape = self.base.shape_of(change.module) if flattened and self.base else change.delta.shape
            # A LoRA cannot have more ranks than its matrix has rows or columns, whatever is asked for.
            nothing = torch.zeros(1, dtype=self._stored_as(change))
            rank = min(asked, shape[0], math.prod(shape[1:]))
            done[number] = (
                ApproximatedModule(str(change), change.delta.kind, rank, 0.0, 0.0),
                placeholder_lora(shape, rank, nothing),
            )
        return done


def approximated_adapter(work: Approximation, done: ApproximatedDeltas) -> Adapter:
    """The adapter with approximated deltas in place of its own, without the modules whose rank came to 0."""
    changes = [
        Change(change.module, WEIGHT, done[number][1]) if number in done else change
        for number, change in enumerate(work.adapter.changes)
        if not change.optional and (number not in done or done[number][0].rank)
    ]
    return replace(work.adapter, changes=tuple(changes))


def _require_no_bias(change: Change, base: BaseCheckpoint | None) -> None:
    """Raises `Unsupported` where the layer has a bias: PEFT's (IA)³ multiplies it, which a LoRA cannot."""
    if base is None:
        raise NeedsBase(f"{change}: may multiply a bias, which only the base can tell; pass `base=`")
    if base.targets.find(change.module, BIAS):
        raise Unsupported(f"{change}: (IA)³ multiplies this layer's bias too, which a LoRA cannot hold; merge it instead")


def _effect(change: Change, base: BaseCheckpoint | None, device: torch.device) -> Effect:
    """The matrix that a change adds to its weight, computed on `device`; raises `Unsupported` for stacked experts."""
    with error_context(change):
        delta = change.delta.materialise()
        if delta.stacked:
            raise Unsupported(ONLY_PEFT)
        return effect_of(delta, change.module, change.parameter, base, device)


def _low_rank(
    changes: Sequence[Change], effects: Sequence[Effect], rules: Sequence[Rule], storages: Sequence[Storage]
) -> list[tuple[ApproximatedModule, Delta]]:
    """The LoRA of each change as it is to be stored, and the figures of how far its product is from the change. Products of
    factors of one shape are decomposed together."""
    found: dict[int, StoredFactors | LoratoolError] = {}
    together: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    rules = [rule.of(effect.shape) for rule, effect in zip(rules, effects, strict=True)]
    for number, effect in enumerate(effects):
        if effect.factors:
            together.setdefault((effect.factors[0].shape, effect.factors[1].shape), []).append(number)
            continue
        with error_context(changes[number]):
            found[number] = factorise(effect.dense().flatten(1), rules[number], storages[number])
    # Where a delta is a product already, the QR of its factors stands for the large SVD.
    for numbers in together.values():
        products = [factors for number in numbers if (factors := effects[number].factors)]
        mine = recompress(products, [rules[number] for number in numbers], [storages[number] for number in numbers])
        found |= dict(zip(numbers, mine, strict=True))
    return [
        _as_stored(changes[number], found[number], rules[number], effects[number].shape) for number in range(len(changes))
    ]


def _as_stored(
    change: Change, found: StoredFactors | LoratoolError, rule: Rule, shape: tuple[int, ...]
) -> tuple[ApproximatedModule, Delta]:
    """The figures and the LoRA of one change; raises the error that stands in the place of its factors."""
    with error_context(change):
        if isinstance(found, LoratoolError):
            raise found
        found = found.padded(rule.padded(found.rank))
    error = found.error / found.norm if found.norm else 0.0
    figures = ApproximatedModule(str(change), change.delta.kind, found.rank, found.norm, error)
    if "embedding_down" in change.delta.leaves():
        # PEFT adds the product of an embedding's factors transposed.
        return figures, Embedding(found.up.T.contiguous(), found.down.T.contiguous(), 1.0)
    return figures, as_lora(found, shape)


def placeholder_lora(shape: tuple[int, ...], rank: int, nothing: Tensor) -> LoRA:
    """A LoRA of `rank` on a weight of `shape` that takes no memory: all its numbers are the one of `nothing`."""
    ones = (1,) * len(shape[2:])
    return LoRA(nothing.expand(rank, *shape[1:]), nothing.expand(shape[0], rank, *ones), None, 1.0)


def as_lora(found: StoredFactors, shape: tuple[int, ...]) -> LoRA:
    """The LoRA of scale 1 with these factors, on a weight of `shape` (out, in, *kernel), with the kernel in `down`."""
    # kohya and PEFT have a convolution's kernel in the first factor, and 1 × 1 in the second.
    kernel = shape[2:]
    ones = (1,) * len(kernel)
    down = found.down.reshape(found.rank, found.down.shape[1] // math.prod(kernel), *kernel).contiguous()
    return LoRA(down, found.up.reshape(*found.up.shape, *ones).contiguous(), None, 1.0)


def approximate_adapter(
    adapter: Adapter,
    rule: Rule,
    dtype: torch.dtype | None = None,
    *,
    base: str | Path | BaseCheckpoint | None = None,
    device: str = "cpu",
) -> tuple[Adapter, list[ApproximatedModule]]:
    """The adapter with a LoRA of scale 1 in place of every delta on a matrix or a kernel that a file of LoRA cannot hold,
    and what became of each delta."""
    devices = open_devices(device, factor_workload([adapter]), doubles=True)
    work = Approximation(adapter, dtype, fits_lora_file, open_base(base), devices=devices)
    done = work.approximate(rule)
    return approximated_adapter(work, done), [figures for figures, _ in done.values()]


def error_of(converted: Sequence[ApproximatedModule]) -> float:
    """The relative error over all modules, as if their deltas were one matrix: squares of norms add up."""
    left = sum((module.error * module.norm) ** 2 for module in converted) ** 0.5
    whole = sum(module.norm**2 for module in converted) ** 0.5
    return left / whole if whole else 0.0
