"""The plan of a merge, settled before the first byte is written: every change has its place, or is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Final

from loratool.adapter.adapter import Adapter, Change
from loratool.adapter.selection import Selection
from loratool.adapter.strengths import Strength, strengths_of
from loratool.deltas.full import Enlarge
from loratool.deltas.schema import BIAS
from loratool.errors import (
    LoratoolError,
    UnmatchedModules,
    Unsupported,
    error_context,
    error_in_file,
    first_few,
)
from loratool.files.header import BITS, TensorInfo
from loratool.files.layout import Layout
from loratool.files.tensors import FLOATS
from loratool.keys.detect import detect
from loratool.keys.places import WeightIndex
from loratool.names import Module
from loratool.numbers.workload import Workload
from loratool.verbs.merge.heads import class_with_head, head_config, head_tensor, is_of_head, require_head, unread_weights
from loratool.verbs.merge.leftovers import unreached_layers
from loratool.verbs.merge.sizes import require_same_rows, resize_config
from loratool.verbs.merge.stacks import lay_experts
from loratool.verbs.merge.terms import Term, grows, require_no_overlap, terms_of
from loratool.verbs.merge.ties import UntiedWeights, is_of_all


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the output: the base's tensor that its values come from, its new dtype and shape, and its terms."""

    name: str
    file: str
    source: TensorInfo
    dtype: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...] = ()

    @property
    def key(self) -> str:
        """The tensor's name inside its file; `name` has the component's folder before that in a diffusers folder."""
        folder, slash, _ = self.file.rpartition("/")
        return self.name.removeprefix(folder + slash)

    @property
    def is_touched(self) -> bool:
        """Whether the tensor's bytes are computed; otherwise they are copied."""
        # Of a tensor without elements there are no bytes, however many rows it says it has.
        return (bool(self.terms) or self.dtype != self.source.dtype) and prod(self.shape) > 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8


CONTROL_INPUTS: Final = ("img_in", "x_embedder")
"""FLUX's input layer, in BFL's naming and in that of diffusers."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole merge: every tensor of the output, the modules without a target, and the entries that config.json gets."""

    layout: Layout
    tensors: Mapping[str, TensorPlan]
    matched: int
    unmatched: tuple[str, ...]
    config: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def changed_tensors(self) -> tuple[TensorPlan, ...]:
        """The tensors that receive terms."""
        return tuple(tensor for tensor in self.tensors.values() if tensor.terms)

    def workload(self) -> Workload:
        """All of it, as work: a product with two operations for each number and rank."""
        ranks = (
            tensor.source.numel * (term.delta.rank or min(term.delta.shape, default=1))
            for tensor in self.changed_tensors
            for term in tensor.terms
        )
        tensors = self.tensors.values()
        read, written = (sum(each) for each in ([t.source.nbytes for t in tensors], [t.nbytes for t in tensors]))
        return Workload(read, written, 2.0 * sum(ranks))


@dataclass(frozen=True, slots=True)
class MergeInput:
    """An adapter of a merge, with the strength, the selection and the assumptions that its terms depend on."""

    adapter: Adapter
    strength: Strength = field(default_factory=Strength)
    selection: Selection = field(default_factory=Selection)


def make_plan(
    layout: Layout, inputs: Sequence[MergeInput], *, dtype: str | None = None, allow_unmatched: bool = False
) -> Plan:
    """Finds the place of every change; raises `UnmatchedModules`, `ShapeMismatch` or another `LoratoolError`."""
    draft, adapters = _PlanDraft(layout), [each.adapter for each in inputs]
    strengths = strengths_of([(each.adapter, each.strength) for each in inputs])
    for each, by_module in zip(inputs, strengths, strict=True):
        with error_in_file(each.adapter.path):
            draft.add(each.adapter, each.selection, by_module)
    if draft.unmatched and not (allow_unmatched and draft.matched):
        raise UnmatchedModules(_unmatched_message(draft, adapters))
    if not draft.matched:
        raise LoratoolError("nothing to merge: `Selection(include=)` and `exclude=` leave no module of any adapter")
    # Only now is it known which heads are untied: `tensors` adds those, and fills in `config` on the way.
    tensors = draft.tensors(dtype)
    require_same_rows(layout, tensors)
    resize_config(layout, tensors.values(), draft.config)
    warnings = [f"{name} is not part of the model and is left out of the output" for name in layout.left_out]
    warnings += [*draft.untied.warnings(), *draft.leftovers]
    # Training scripts of Stable Diffusion keep averaged copies of the weights in the same file; inference reads the others.
    if any(name.startswith("model_ema.") for name in layout.tensors):
        warnings.append("the base's model_ema copies are left as they were")
    return Plan(layout, tensors, draft.matched, tuple(map(str, draft.unmatched)), draft.config, tuple(warnings))


class _PlanDraft:
    """Terms by tensor, collected from one adapter after the other; `of_ties` are those that are of all weights of a tie, and
    `heads` maps new tensors to those that lend them dtype and file."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.targets = WeightIndex(layout)
        self.terms: dict[str, list[Term]] = {}
        self.untied = UntiedWeights(layout, self.targets)
        self.of_ties: list[tuple[str, Term]] = []
        self.heads: dict[str, str] = {}
        self.unmatched: list[Change] = []
        self.unmatched_of: dict[str, None] = {}
        self.matched = 0
        self.config = self.untied.config
        self.leftovers: list[str] = []

    def add(self, adapter: Adapter, selection: Selection, strengths: Mapping[Module, float]) -> None:
        """Adds the terms of one adapter, and its modules without a target to `unmatched`."""
        # First the changes that are selected, each in the parts that the base stores; parts inherit the strength.
        chosen = [change for change in adapter.changes if selection.takes(change.module)]
        by_module = {**strengths}
        for change in chosen:
            by_module |= dict.fromkeys((part.module for part in change.per_expert), strengths[change.module])
        single = self.untied.without_equal_copies(chosen)
        self.matched += len(chosen) - len(single)
        taken = lay_experts(adapter, single, self.targets, self.layout)
        # Then the modules that the base does not know: one prefix must place all of them, as a wrapper adds or drops one.
        lost = {
            change.module
            for change in taken
            if not change.optional and not self.untied.places(change.module, change.parameter)
        }
        renamed = self.targets.find_wrapped(sorted(lost)) if lost else {}
        named = [(change, renamed.get(change.module, change.module)) for change in taken]
        # At last the terms. They are collected by adapter, since `require_no_overlap` forbids an adapter to change a row
        # twice while several adapters may well change the same row.
        mine: dict[str, list[Term]] = {}
        cls, head = class_with_head(adapter, self.layout), list[Change]()
        kept = self.untied.without_copies(adapter, named)
        self.matched += len(named) - len(kept)
        for change, module in kept:
            if cls and is_of_head(change, cls) and not self.untied.places(module, change.parameter):
                head.append(change)
            else:
                self._place(adapter, change, module, by_module[change.module], mine)
        # Of modules that the user chose, nobody expects that they are all.
        if len(chosen) == len(adapter.changes):
            self.leftovers += unreached_layers(adapter, mine, self.layout)
        for name, terms in mine.items():
            require_no_overlap(adapter, name, terms)
            self.terms.setdefault(name, []).extend(terms)
        if head:
            require_head(self.layout, cls, head)
            self._add_head(cls, head, by_module)

    def _new_shape(self, tensor: str, terms: Mapping[str, Sequence[Term]]) -> tuple[int, ...] | None:
        """The shape of the weight that `terms` put in the place of a tensor, or of the one that it is a copy of."""
        own = [term for term in terms.get(tensor, ()) if term.delta.replaces]
        shared = terms.get(self.untied.added.get(tensor, ""), ())
        own += [term for term in shared if term.delta.replaces and term.delta.acts_on_tied_head]
        return own[0].delta.shape if own else None

    def _add_head(self, name: str, head: Sequence[Change], strengths: Mapping[Module, float]) -> None:
        """Has the output store a head that only the adapter has, and its config name the class `name` that has it."""
        # The values come from the adapter alone: any weight lends the new ones its dtype and its file.
        source = next(tensor for tensor, (_, info) in self.layout.tensors.items() if info.dtype in FLOATS and info.shape)
        for change in head:
            tensor = head_tensor(change)
            self.heads[tensor] = source
            rows = change.delta.shape[0]
            term = Term(str(change), change.delta, strengths[change.module], 0, rows, transposed=False)
            self.terms.setdefault(tensor, []).append(term)
        self.matched += len(head)
        self.config |= head_config(self.layout, name, head)
        for tensor in unread_weights(self.layout, name):
            self.leftovers.append(f"{tensor} stays in the output, and {name}, which it now is, does not read it")

    def _place(
        self, adapter: Adapter, change: Change, module: Module, strength: float, terms: dict[str, list[Term]]
    ) -> None:
        """Adds the terms of a change, which the base calls `module`, to `terms` by tensor, or the change to `unmatched`."""
        settled = self.untied.settle(adapter, change, module)
        if not settled:
            if not change.optional:
                self.unmatched.append(change)
                self.unmatched_of[str(adapter.path)] = None
            return
        self.matched += 1
        for places in settled:
            tensor, shape = places[0].tensor, self._stored_info(places[0].tensor).shape
            # What a replaced weight gets on top of it has the new shape, as the LoRA of a vocabulary that grew.
            grown = self._new_shape(tensor, terms)
            if grown and len(places) == 1:
                shape, places = grown, (replace(places[0], stop=grown[0]),)  # noqa: PLW2901
            for name, term in terms_of(shape, self._fit(change, shape), places, strength):
                terms.setdefault(name, []).append(term)
        if is_of_all(adapter, change):
            tensor = settled[0][0].tensor
            self.of_ties += [(tensor, term) for term in terms[tensor] if term.change == str(change)]

    def _fit(self, change: Change, base: tuple[int, ...]) -> Change:
        """`change`, or where it is a FLUX control LoRA's on the input layer, `change` on that layer padded with zeros.

        Control LoRAs see twice the channels, and ComfyUI pads the weight (comfy/lora.py). In a diffusers folder a config
        would have to change with the shape, and a mismatch stays an error there.
        """
        with error_context(change):
            change = replace(change, delta=change.delta.fitted(base))
        delta, inputs = change.delta, change.module.path.endswith(CONTROL_INPUTS)
        if not inputs or not delta.resizable or self.layout.is_folder or delta.shape != (base[0], 2 * base[-1]):
            return change
        return replace(change, delta=Enlarge(delta, delta.shape))

    def tensors(self, dtype: str | None) -> dict[str, TensorPlan]:
        """Every tensor of the output: those of the base, then the heads that were untied."""
        plans = {}
        for name, (file, info) in self.layout.tensors.items():
            plans[name] = self._tensor(name, file, info, dtype)
        # What is of all weights of a tie is of the copies too that came to be after it.
        for tensor, term in self.of_ties:
            for name in self.untied.late_copies(tensor):
                if term not in self.terms.get(name, ()):
                    self.terms.setdefault(name, []).insert(0, term)
        for name, source in {**self.untied.added, **self.heads}.items():
            file, info = self.layout.tensors[source]
            plans[name] = self._tensor(name, file, info, dtype)
        return plans

    def _tensor(self, name: str, file: str, info: TensorInfo, dtype: str | None) -> TensorPlan:
        """One tensor of the output; raises `Unsupported` where terms meet a dtype that holds no weights."""
        terms = tuple(self.terms.get(name, ()))
        if terms and info.dtype not in FLOATS:
            raise Unsupported(f"{self.layout.root}: {name} is stored as {info.dtype}; an adapter cannot be added to it")
        stored = dtype if dtype and info.dtype in FLOATS else info.dtype
        shape = next((term.delta.shape for term in terms if grows(term, info)), info.shape)
        return TensorPlan(name, file, info, stored, shape, terms)

    def _stored_info(self, tensor: str) -> TensorInfo:
        """The base's header entry of a tensor, or of the one that a tensor of the output is a copy of."""
        return self.layout.info(self.untied.added.get(tensor, tensor))


def _unmatched_message(draft: _PlanDraft, adapters: Sequence[Adapter]) -> str:
    """The message of `UnmatchedModules`: the modules with their nearest names, and the adapter's likely architecture."""
    count = len(draft.unmatched)
    pairs = []
    for change in draft.unmatched[:5]:
        near = draft.targets.nearest(change.module)
        if change.parameter == BIAS and draft.targets.find(change.module):
            pairs.append(f"{change}: the base's layer has no bias, which lora_bias trained")
        else:
            pairs.append(f"{change} (nearest: {near})" if near else str(change))
    more = f" and {count - 5} more" if count > 5 else ""
    total = count + draft.matched
    whose = first_few(draft.unmatched_of)
    message = f"{whose}: {count} of {total} modules have no target in {draft.layout.root}: {'; '.join(pairs)}{more}"
    verdicts = {detect([(change.module, None) for change in adapter.changes]).title for adapter in adapters}
    families = (
        f"; the adapter looks like one for {first_few(sorted(verdicts))}" if verdicts - {"unknown", "undecided"} else ""
    )
    way_out = "`allow_unmatched=True` leaves them out" if draft.matched else "is the adapter for another model?"
    trained = next((change for change in draft.unmatched if change.delta.replaces), None)
    if draft.matched and trained:
        way_out += f", and loses {trained}, a trained weight: a base of the class that was trained has it"
    return f"{message}{families}; {way_out}"
