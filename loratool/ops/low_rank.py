"""`convert --to-lora` and `resize`: deltas as the best LoRA of some rank or error, and what that leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from loratool.adapter import Adapter, Change, Unsaid, load
from loratool.checkpoint import DTYPE_NAMES, DTYPES, Checkpoint
from loratool.deltas import Delta, Embedding, LoRA
from loratool.errors import LoratoolError, NeedsBase, NonFinite, ShapeMismatch, Unsupported
from loratool.linalg import balanced, factored_svd, leading_svd, rank_within, singular_values
from loratool.names import Module
from loratool.ops.saving import as_they_were, biases, like_source, named, write
from loratool.schema import BIAS, WEIGHT
from loratool.targets import Targets

KEPT: Final = frozenset({"lora", "embedding", "enlarge", "replace", "tokens"})
"""Kinds that a LoRA file holds as they are."""
RESIZED: Final = frozenset({"lora"})
"""Of these, the kind whose rank can be another."""


@dataclass(frozen=True, slots=True)
class Converted:
    """One module that became a LoRA: its kind before, its rank now, ‖ΔW‖, and ‖ΔW − LoRA‖ / ‖ΔW‖."""

    name: str
    kind: str
    rank: int
    norm: float
    error: float


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


@dataclass(frozen=True, slots=True)
class Rule:
    """How much to keep: `rank`, or the least rank whose relative error is at most `max_error`, or all there is.

    `dtype`, a safetensors name, is what factors are stored in; None is each module's own.
    """

    rank: int | None = None
    max_error: float | None = None
    dtype: str | None = None


def to_lora(
    path: str | Path,
    out: str | Path,
    rule: Rule | None = None,
    *,
    base: str | Path | None = None,
    unsaid: Unsaid | None = None,
    overwrite: bool = False,
) -> LowRankReport:
    """Writes the adapter at `path` to `out` with every delta on a matrix or a kernel as a LoRA.

    What is a LoRA already keeps its bytes. Kinds that depend on the weight (DoRA, OFT, (IA)³ …) need `base`. Errors are
    those of the factors as stored. Raises `LoratoolError`.
    """
    return _approximated(load(path, unsaid=unsaid), Path(out), rule or Rule(), KEPT, base=base, overwrite=overwrite)


def resize(
    path: str | Path,
    out: str | Path,
    rule: Rule,
    *,
    base: str | Path | None = None,
    unsaid: Unsaid | None = None,
    overwrite: bool = False,
) -> LowRankReport:
    """Writes the adapter at `path` to `out` with every LoRA, and every other kind as a LoRA, of the rank that `rule` gives.

    The best approximation at that rank (Eckart and Young 1936), from QR of the factors and the SVD of their small core.
    """
    return _approximated(load(path, unsaid=unsaid), Path(out), rule, KEPT - RESIZED, base=base, overwrite=overwrite)


def _approximated(
    adapter: Adapter, out: Path, rule: Rule, keep: frozenset[str], *, base: str | Path | None, overwrite: bool
) -> LowRankReport:
    lowered, converted, kept = lower(adapter, rule, keep, base=base)
    tensors = as_they_were(adapter, kept) | biases(kept, {module.name for module in converted})
    for change in lowered.changes:
        if not change.keys:  # made here, not read
            tensors |= named(change)
    contents = like_source(adapter, tensors, kept, [module.rank for module in converted])
    nbytes = write(contents, adapter.path, out.expanduser(), overwrite=overwrite)
    return LowRankReport(str(out), tuple(converted), len(kept), error_of(converted), nbytes, adapter.notes)


def lower(
    adapter: Adapter, rule: Rule, keep: frozenset[str] = KEPT, *, base: str | Path | None = None
) -> tuple[Adapter, list[Converted], list[Change]]:
    """The adapter with every delta on a matrix or a kernel, but those of the kinds `keep`, as a LoRA of scale 1; what
    became of each, and the changes that stayed what they were."""
    weights = _Weights(Path(base).expanduser()) if base else None
    converted: list[Converted] = []
    kept: list[Change] = []
    changes: list[Change] = []
    for change in adapter.changes:
        if change.optional:
            _refuse_bias(change, weights)
        elif change.delta.kind in keep or change.parameter == BIAS or len(change.delta.shape) < 2:
            kept.append(change)
            changes.append(change)
        else:
            delta, figures = _low_rank(change, _effective(change, weights), rule)
            converted.append(figures)
            changes.append(Change(change.module, WEIGHT, delta))
    return replace(adapter, changes=tuple(changes)), converted, kept


def error_of(converted: Sequence[Converted]) -> float:
    """The relative error over all modules."""
    left = sum((module.error * module.norm) ** 2 for module in converted) ** 0.5
    whole = sum(module.norm**2 for module in converted) ** 0.5
    return left / whole if whole else 0.0


class _Weights:
    """The base's weights by an adapter's module, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint(path)
        self.targets = Targets(self.checkpoint.layout)

    def of(self, module: Module) -> Tensor:
        """The module's weight, (out, in, *kernel); raises `LoratoolError` where the base has none."""
        places = self.targets.find(module, WEIGHT)
        if not places:
            raise LoratoolError(f"{module}: has no weight in {self.checkpoint.layout.root}")
        rows = []
        for place in places:
            stored = self.checkpoint[place.tensor]
            rows.append((stored.T if place.transposed else stored)[place.start : place.stop : place.step])
        return torch.cat(rows)


def _refuse_bias(change: Change, weights: _Weights | None) -> None:
    """PEFT's (IA)³ multiplies the bias of a layer that has one, which a LoRA cannot."""
    if weights is None:
        raise NeedsBase(f"{change}: may multiply a bias, which only the base can tell; pass --base")
    if weights.targets.find(change.module, BIAS):
        raise Unsupported(f"{change}: (IA)³ multiplies this layer's bias too, which a LoRA cannot hold; merge it instead")


@dataclass(frozen=True, slots=True)
class _Effective:
    """What a delta adds, as exact factors or as a dense matrix, and the shape of the weight."""

    shape: tuple[int, ...]
    factors: tuple[Tensor, Tensor] | None
    dense: Tensor | None


def _effective(change: Change, weights: _Weights | None) -> _Effective:
    delta = change.delta
    if change.apart:
        raise Unsupported(f"{change}: is a LoRA on stacked experts, which only PEFT's target_parameters can hold")
    if delta.additive:
        shape = tuple(weights.of(change.module).shape) if weights and delta.flattened else delta.shape
        factors = delta.factors()
        if factors is not None and 2 * factors[0].shape[1] <= min(factors[0].shape[0], factors[1].shape[1]):
            return _Effective(shape, factors, None)
        return _Effective(shape, None, delta.dense().flatten(1))
    if weights is None:
        raise NeedsBase(f"{change}: what a delta of kind {delta.kind} adds depends on its weight; pass --base")
    weight = weights.of(change.module).float()
    try:
        return _Effective(tuple(weight.shape), None, (delta.apply(weight) - weight).flatten(1))
    except RuntimeError as error:
        raise ShapeMismatch(
            f"{change}: does not fit its weight of {list(weight.shape)}: is the base another model?"
        ) from error


def _low_rank(change: Change, delta: _Effective, rule: Rule) -> tuple[Delta, Converted]:
    """A LoRA as it is to be stored, and how far its product is from the delta."""
    if delta.factors is not None:
        left, sigma, right = factored_svd(*delta.factors)
        norm = float(sigma.double().norm())
    else:
        assert delta.dense is not None
        norm = float(torch.linalg.vector_norm(delta.dense, dtype=torch.float64))
        left, sigma, right = _enough(delta.dense, norm, rule)
    kept = min(_rank(sigma, norm, rule), len(sigma))
    dtype = DTYPES[rule.dtype] if rule.dtype else _widest(change)
    up, down = (factor.to(dtype) for factor in balanced(left, sigma, right, kept))
    if not bool(up.isfinite().all() and down.isfinite().all()):
        raise NonFinite(f"{change}: its factors overflow {DTYPE_NAMES[dtype]}; choose --dtype float32 or bfloat16")
    left_out = _distance(delta, up.float(), down.float())
    figures = Converted(str(change), change.delta.kind, kept, norm, left_out / norm if norm else 0.0)
    if "embedding_down" in change.delta.leaves():
        # PEFT adds the product of an embedding's factors transposed.
        return Embedding(up.T.contiguous(), down.T.contiguous(), 1.0), figures
    kernel = delta.shape[2:]
    ones = (1,) * len(kernel)
    down = down.reshape(len(down), -1, *kernel).contiguous()
    return LoRA(down, up.reshape(*up.shape, *ones).contiguous(), None, 1.0), figures


def _distance(delta: _Effective, up: Tensor, down: Tensor) -> float:
    """‖ΔW − up · down‖, of the factors as stored."""
    if delta.factors is None:
        assert delta.dense is not None
        return float(torch.linalg.vector_norm(delta.dense - up @ down, dtype=torch.float64))
    ups, downs = torch.cat([delta.factors[0], -up], dim=1), torch.cat([delta.factors[1], down])
    return float(singular_values(ups, downs).norm())


def _widest(change: Change) -> torch.dtype:
    """The dtype of the change's own factors, the widest where they differ."""
    dtypes = [tensor.dtype for tensor in change.delta.leaves().values() if tensor.is_floating_point()]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _enough(dense: Tensor, norm: float, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """As many singular values as the rule needs: those of the rank, or twice as many until the error is met."""
    smaller = min(dense.shape)
    if rule.max_error is None:
        return leading_svd(dense, rule.rank or smaller)
    wanted = 16
    while wanted < smaller:
        found = leading_svd(dense, wanted)
        if rank_within(found[1], norm, rule.max_error):
            return found
        wanted *= 2
    return leading_svd(dense, smaller)


def _rank(sigma: Tensor, norm: float, rule: Rule) -> int:
    if rule.max_error is not None:
        return rank_within(sigma, norm, rule.max_error) or len(sigma)
    if rule.rank is not None:
        return rule.rank
    # Without a rule, all that is more than float32's noise.
    return max(1, int((sigma > 1e-6 * sigma[0]).sum())) if len(sigma) else 1
