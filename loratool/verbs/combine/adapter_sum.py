"""The sum of several adapters: their changes collected by place in the output, and combined place by place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch

from loratool.adapter.adapter import Adapter, Change
from loratool.adapter.approximate import (
    ApproximatedDeltas,
    ApproximatedModule,
    Approximation,
    approximated_adapter,
    as_lora,
    keeps_its_rank,
)
from loratool.adapter.rename import rename_changes
from loratool.adapter.strengths import Strength
from loratool.adapter.write import size_in_format
from loratool.archs import Arch
from loratool.archs.table import NameReading
from loratool.base.base import BaseCheckpoint
from loratool.base.effects import effect_of
from loratool.deltas.base import Delta
from loratool.deltas.full import Replace
from loratool.deltas.relations import norm_and_distance
from loratool.deltas.sums import LazySum, Merge, add_deltas
from loratool.errors import LoratoolError, NonFinite, ShapeMismatch, error_context, first_few
from loratool.formats.table import Format
from loratool.keys.routes import Route
from loratool.names import DIFFUSERS, Module
from loratool.numbers.devices import DevicePool
from loratool.numbers.factor import Storage, factorise
from loratool.numbers.linalg import all_finite, bounds, dtype_name
from loratool.numbers.ranks import Budget, Rule
from loratool.numbers.threads import map_on_threads

Describe = Callable[[Adapter], Adapter]
"""Gives an adapter the output's metadata."""
MergeAt = Callable[[Module, Sequence[int]], Merge]
"""Gives the `Merge` for a module, and for the numbers of the adapters that change the module."""


def as_sum(module: Module, owners: Sequence[int]) -> Merge:
    """The exact sum, the same at every module and for all adapters."""
    return add_deltas


OutputPlace = tuple[str, str, str]
"""Where a change goes: the component's prefix, the module's path and the parameter, as the output names them."""


@dataclass(frozen=True, slots=True)
class _Term:
    """One adapter's contribution at a place: the adapter's number (`owner`), its own name of the module, the delta, and the
    strength (`strength`)."""

    owner: int
    module: Module
    delta: Delta
    strength: float


class AdapterSum:
    """The changes of several adapters by their place in the output: `add` each adapter, then `materialise` the sum."""

    def __init__(
        self,
        target: Format,
        arch: Arch,
        routes: Mapping[Module, Route],
        merge: MergeAt,
        base: BaseCheckpoint | None,
        devices: DevicePool,
    ) -> None:
        self.target, self.arch, self.routes, self.base = target, arch, routes, base
        self.merge, self.devices = merge, devices
        self.terms: dict[OutputPlace, list[_Term]] = {}
        self.common = 0
        # PEFT gives a bias the scale of its module's factors: 1 after a sum, whose terms had scales of their own.
        self.biased = False
        self.warnings: list[str] = []

    def add(self, number: int, adapter: Adapter, strength: Strength) -> None:
        """Collects the changes of one adapter under the output's names; `number` tells the adapter from the others."""
        modules = adapter.modules
        with error_context(adapter.path):
            strengths = strength.of(modules, self.arch)
            if unnamed := strength.modules_without_block(modules, self.arch):
                shown = first_few(map(str, unnamed), 2)
                self.warnings.append(
                    f"{adapter.path}: {len(unnamed)} modules are in blocks that the vector has no number for: {shown}"
                )
            for item in rename_changes(adapter.changes, self.routes):
                module = item.sources[0].module
                # PEFT's (IA)³ multiplies a bias where the layer has one, which the base alone can tell.
                if item.sources[0].optional and not (self.base and self.base.targets.find(module, item.parameter)):
                    continue
                self.biased |= item.delta.shares_scale
                place = item.prefix, item.path, item.parameter
                self.terms.setdefault(place, []).append(_Term(number, module, item.delta, strengths[module]))
        self.warnings += adapter.warnings

    def materialise(
        self, adapters: Sequence[Adapter], rule: Rule | Budget | None, dtype: torch.dtype | None, describe: Describe
    ) -> tuple[Adapter, tuple[ApproximatedModule, ...]]:
        """The sum as one adapter, exact or at the ranks that `rule` gives, and the figures of each approximated module."""
        # One adapter may have several terms at a place (PEFT's saved embedding beside its LoRA), so owners are counted.
        self.common = sum(len({term.owner for term in terms}) > 1 for terms in self.terms.values())
        asked = self._adapter(adapters)
        # The originals of terms that were dropped, or became differences, need not stay in memory while sums are computed.
        self.terms.clear()
        return self._exact(asked, dtype, describe) if rule is None else self._approximate(asked, rule, dtype, describe)

    def _adapter(self, adapters: Sequence[Adapter]) -> Adapter:
        """One adapter of all places, whose deltas are computed when they are asked for."""
        changes: list[Change] = []
        for (prefix, path, parameter), terms in self.terms.items():
            module = Module(terms[0].module.component, path, self.target.stem(prefix, path))
            with error_context(module):
                changes += [Change(module, parameter, delta) for delta in self._combine(module, parameter, terms)]
        first = adapters[0]
        # Extras change no weight and have no sum: each travels once, and only where all adapters agree about it.
        extras: dict[str, torch.Tensor] = {}
        for adapter in adapters:
            for name, tensor in adapter.extras.items():
                if name in extras and not torch.equal(extras[name], tensor):
                    raise LoratoolError(
                        f"{adapter.path}: {name} travels with another adapter too, and is not the same there"
                    )
                extras[name] = tensor
        if not changes:
            raise LoratoolError("nothing is left: every strength is zero")
        tied = any(adapter.tied for adapter in adapters)
        return Adapter(first.path, tuple(changes), {}, tied, extras, config=first.config)

    def _combine(self, module: Module, parameter: str, terms: Sequence[_Term]) -> list[Delta]:
        """The deltas that the terms of one place come to: the terms' own, where one adapter alone changes the place at
        strength 1."""
        # A method other than the sum sparsifies a single term too. Folding scales for PEFT changes additive deltas only.
        alone = self.merge is as_sum and len({term.owner for term in terms}) == 1
        if alone and all(term.strength == 1 and not (self.biased and term.delta.additive) for term in terms):
            return [term.delta for term in terms]
        terms = [term for term in terms if term.strength]
        if not terms:
            return []
        # Kinds that depend on the weight (DoRA, OFT, replaced values …) have no sum, but the differences that they make do.
        deltas = [
            term.delta
            if term.delta.additive
            else effect_of(term.delta, term.module, parameter, self.base).as_delta(parameter)
            for term in terms
        ]
        # PEFT saves the untouched embedding beside its LoRA: that copy is a difference of zeros by now, and is dropped.
        kept = [i for i, delta in enumerate(deltas) if not delta.stored_whole or bounds(delta.dense()) != (0, 0)]
        terms, deltas = [terms[i] for i in kept], [deltas[i] for i in kept]
        if not terms:
            return []
        replaced = next((term.delta for term in terms if term.delta.replaces), None)
        shapes = {_flat(delta) for delta in deltas}
        if len(shapes) > 1:
            raise ShapeMismatch(
                f"is changed as {' and as '.join(map(str, sorted(shapes)))}: the adapters are for other models"
            )
        merge = self.merge(module, [term.owner for term in terms])
        if merge is add_deltas and self.biased:
            merge = partial(add_deltas, fold=True)
        # Computed when it is asked for, by `_exact` or `Approximation`, which work on several threads.
        whole = LazySum(tuple(deltas), tuple(term.strength for term in terms), merge)
        if replaced is None or self.base is None:
            return [whole]
        # Readers put a replaced value (PEFT's modules_to_save) in the weight's place, so it has to include the whole sum.
        value = self.base.of(terms[0].module, parameter).float() + whole.dense().reshape(replaced.shape)
        (leaf,) = replaced.leaves()
        return [Replace(value, leaf)]

    def _exact(
        self, combined: Adapter, dtype: torch.dtype | None, describe: Describe
    ) -> tuple[Adapter, tuple[ApproximatedModule, ...]]:
        """The sum with every delta computed, and rounded only where a dtype is asked for."""
        done = map_on_threads(partial(_as_stored, change, dtype, self.target) for change in combined.changes)
        changes = [replace(change, delta=delta) for change, (delta, _) in zip(combined.changes, done, strict=True)]
        rounded = tuple(figures for _, figures in done if figures)
        return describe(replace(combined, changes=tuple(changes))), rounded

    def _approximate(
        self, combined: Adapter, rule: Rule | Budget, dtype: torch.dtype | None, describe: Describe
    ) -> tuple[Adapter, tuple[ApproximatedModule, ...]]:
        """The sum as LoRA of the ranks that `rule` gives."""
        work = Approximation(combined, dtype, keeps_its_rank, self.base, devices=self.devices)

        # A budget in bytes is that of the whole file: names, alignment and metadata count too.
        def size(imagined: ApproximatedDeltas) -> int:
            adapter = describe(approximated_adapter(work, imagined))
            return size_in_format(adapter, self.target, self.routes_of(adapter))

        done = work.approximate(rule) if isinstance(rule, Rule) else work.within(rule, size)
        adapter = approximated_adapter(work, done)
        # Changes that were not approximated (biases, norms …) may still be lazy sums.
        changes = [replace(change, delta=change.delta.materialise()) for change in adapter.changes]
        return describe(replace(adapter, changes=tuple(changes))), tuple(figures for figures, _ in done.values())

    def routes_of(self, combined: Adapter) -> dict[Module, Route]:
        """Routes that leave every name as it is: `combined` has the output's names already."""
        routes = {}
        for change in combined.changes:
            module = change.module
            prefix = module.stem.removesuffix(self.target.stem("", module.path))
            routes[module] = Route(prefix, NameReading(DIFFUSERS, module.path), DIFFUSERS, ((module.path, None),))
        return routes


def _flat(delta: Delta) -> tuple[int, ...]:
    """The delta's shape as a matrix, (out, in · kernel), which is the same for a linear layer and a 1 × 1 convolution."""
    return (delta.shape[0], prod(delta.shape[1:])) if len(delta.shape) > 1 else delta.shape


def _as_stored(change: Change, dtype: torch.dtype | None, target: Format) -> tuple[Delta, ApproximatedModule | None]:
    """A change's delta, computed and rounded to `dtype`, and the error that this makes (None where there is none).

    A difference for which the format has no leaf becomes the LoRA of all its singular values above noise.
    """
    delta = change.delta.materialise()
    if delta.stored_whole and len(delta.shape) > 1 and not delta.leaves().keys() <= target.leaves.keys():
        with error_context(change):
            # Rule 'all' returns every value above noise, so nothing further is hidden.
            found = factorise(delta.dense().flatten(1), Rule(), Storage(dtype or torch.float32))
        error = found.error / found.norm if found.norm else 0.0
        return as_lora(found, delta.shape), ApproximatedModule(str(change), delta.kind, found.rank, found.norm, error)
    narrow = delta.rounded(dtype) if dtype else None
    if dtype is None or narrow is None:
        return delta, None
    with error_context(change):
        # A sum, or a factor with its scale inside, may be beyond float16's 65504 where no adapter alone is.
        if not all(map(all_finite, narrow.leaves().values())):
            raise NonFinite(f"overflows {dtype_name(dtype)}; choose `dtype='float32'` or bfloat16")
        norm, error = norm_and_distance(delta, narrow)
    return narrow, ApproximatedModule(str(change), delta.kind, narrow.rank or 0, norm, error / norm if norm else 0.0)
