"""`convert --to-lora` and `resize`: deltas as the best LoRA of some rank or error, and what that leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from loratool.adapter import Adapter, Change, Unsaid, load
from loratool.checkpoint import DTYPES
from loratool.deltas import Delta, Embedding, LoRA
from loratool.errors import NeedsBase, ShapeMismatch, Unsupported, about
from loratool.krylov import Spectrum
from loratool.linalg import effective_rank, factored_svd, singular_values
from loratool.ops.factoring import Factored, Storage, factored, stored
from loratool.ops.saving import as_they_were, biases, like_source, named, write
from loratool.ops.weights import Weights
from loratool.ranks import Rule
from loratool.schema import BIAS, WEIGHT

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
    rule: Rule,
    *,
    dtype: str | None = None,
    base: str | Path | None = None,
    unsaid: Unsaid | None = None,
    overwrite: bool = False,
) -> LowRankReport:
    """Writes the adapter at `path` to `out` with every LoRA, and every other kind as a LoRA, of the rank that `rule` gives.

    The best approximation at that rank (Eckart and Young 1936), from QR of the factors and the SVD of their small core.
    """
    return _approximated(load(path, unsaid=unsaid), Path(out), rule, dtype, KEPT - RESIZED, base=base, overwrite=overwrite)


def _approximated(
    adapter: Adapter,
    out: Path,
    rule: Rule,
    dtype: str | None,
    keep: frozenset[str],
    *,
    base: str | Path | None,
    overwrite: bool,
) -> LowRankReport:
    lowered, converted, kept = lower(adapter, rule, dtype, keep, base=base)
    tensors = as_they_were(adapter, kept) | biases(kept, {module.name for module in converted})
    for change in lowered.changes:
        if not change.keys:  # made here, not read
            tensors |= named(change)
    contents = like_source(adapter, tensors, kept, [module.rank for module in converted])
    nbytes = write(contents, [adapter.path], out.expanduser(), overwrite=overwrite)
    return LowRankReport(str(out), tuple(converted), len(kept), error_of(converted), nbytes, adapter.notes)


def lower(
    adapter: Adapter, rule: Rule, dtype: str | None = None, keep: frozenset[str] = KEPT, *, base: str | Path | None = None
) -> tuple[Adapter, list[Converted], list[Change]]:
    """The adapter with every delta on a matrix or a kernel, but those of the kinds `keep`, as a LoRA of scale 1; what
    became of each, and the changes that stayed what they were."""
    weights = Weights(Path(base).expanduser()) if base else None
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
            delta, figures = _low_rank(change, _effective(change, weights), rule, dtype)
            converted.append(figures)
            changes.append(Change(change.module, WEIGHT, delta))
    return replace(adapter, changes=tuple(changes)), converted, kept


def error_of(converted: Sequence[Converted]) -> float:
    """The relative error over all modules."""
    left = sum((module.error * module.norm) ** 2 for module in converted) ** 0.5
    whole = sum(module.norm**2 for module in converted) ** 0.5
    return left / whole if whole else 0.0


def _refuse_bias(change: Change, weights: Weights | None) -> None:
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


def _effective(change: Change, weights: Weights | None) -> _Effective:
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


def _low_rank(change: Change, delta: _Effective, rule: Rule, dtype: str | None) -> tuple[Delta, Converted]:
    """A LoRA as it is to be stored, and how far its product is from the delta."""
    storage = Storage(DTYPES[dtype] if dtype else _widest(change))
    rule = rule.of(delta.shape)
    with about(change):
        found = _refactored(*delta.factors, rule, storage) if delta.factors else factored(_dense(delta), rule, storage)
    error = found.error / found.norm if found.norm else 0.0
    figures = Converted(str(change), change.delta.kind, found.rank, found.norm, error)
    if "embedding_down" in change.delta.leaves():
        # PEFT adds the product of an embedding's factors transposed.
        return Embedding(found.up.T.contiguous(), found.down.T.contiguous(), 1.0), figures
    return as_lora(found, delta.shape), figures


def as_lora(found: Factored, shape: tuple[int, ...]) -> LoRA:
    """The factors of a weight of `shape`, (out, in, *kernel), with the kernel in `down`, and scale 1."""
    kernel = shape[2:]
    ones = (1,) * len(kernel)
    down = found.down.reshape(found.rank, -1, *kernel).contiguous()
    return LoRA(down, found.up.reshape(*found.up.shape, *ones).contiguous(), None, 1.0)


def _refactored(up: Tensor, down: Tensor, rule: Rule, storage: Storage) -> Factored:
    """The best factors of `up` · `down` at the rank that the rule gives, without multiplying them out."""
    left, sigma, right = factored_svd(up, down)
    total = float(sigma.square().sum())
    rank = min(rule(Spectrum(sigma, total, True)) or 0, len(sigma))
    root = sigma[:rank].sqrt()
    ups, downs = stored(left[:, :rank].double() * root, root[:, None] * right[:rank].double(), storage)
    between = torch.cat([up, -ups.float()], dim=1), torch.cat([down, downs.float()])
    least = float(sigma[rank:].norm())
    return Factored(ups, downs, total**0.5, float(singular_values(*between).norm()), least, effective_rank(sigma[:rank]))


def _dense(delta: _Effective) -> Tensor:
    assert delta.dense is not None
    return delta.dense


def _widest(change: Change) -> torch.dtype:
    """The dtype of the change's own factors, the widest where they differ."""
    dtypes = [tensor.dtype for tensor in change.delta.leaves().values() if tensor.is_floating_point()]
    return max(dtypes, key=lambda dtype: dtype.itemsize)
