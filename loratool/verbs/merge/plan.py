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
from loratool.errors import LoratoolError, UnmatchedModules, Unsupported, error_in_file, first_few
from loratool.files.header import BITS, TensorInfo
from loratool.files.layout import Layout
from loratool.files.tensors import FLOATS
from loratool.keys.detect import detect
from loratool.keys.places import EMBEDDING_STEMS, HEAD, WeightIndex, WeightRows
from loratool.names import Module
from loratool.verbs.merge.terms import Term, grows, require_no_overlap, terms_of


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
    warnings = [f"{name} is not part of the model and is left out of the output" for name in layout.left_out]
    # Training scripts of Stable Diffusion keep averaged copies of the weights in the same file; inference reads the others.
    if any(name.startswith("model_ema.") for name in layout.tensors):
        warnings.append("the base's model_ema copies are left as they were")
    return Plan(layout, tensors, draft.matched, tuple(map(str, draft.unmatched)), draft.config, tuple(warnings))


class _PlanDraft:
    """Terms by tensor, collected from one adapter after the other; `added` maps an untied head to its embedding."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.targets = WeightIndex(layout)
        self.terms: dict[str, list[Term]] = {}
        self.added: dict[str, str] = {}
        self.unmatched: list[Module] = []
        self.unmatched_of: dict[str, None] = {}
        self.matched = 0
        self.config: dict[str, Any] = {}

    def add(self, adapter: Adapter, selection: Selection, strengths: Mapping[Module, float]) -> None:
        """Adds the terms of one adapter, and its modules without a target to `unmatched`."""
        # First the changes that are selected, each in the parts that the base stores; parts inherit the strength.
        taken: list[Change] = []
        by_module = dict(strengths)
        for change in adapter.changes:
            if selection.takes(change.module):
                stored = self._as_stored(change)
                by_module |= dict.fromkeys((part.module for part in stored), strengths[change.module])
                taken += stored
        # Then the modules that the base does not know: one prefix must place all of them, as a wrapper adds or drops one.
        lost = {
            change.module for change in taken if not change.optional and not self._places(change.module, change.parameter)
        }
        renamed = self.targets.find_wrapped(sorted(lost)) if lost else {}
        # At last the terms. They are collected by adapter, since `check_overlap` forbids an adapter to change a row twice
        # while several adapters may well change the same row.
        mine: dict[str, list[Term]] = {}
        for change in self._untied_changes(adapter, taken):
            module = renamed.get(change.module, change.module)
            places = self._places(module, change.parameter)
            if not places:
                if not change.optional:
                    self.unmatched.append(change.module)
                    self.unmatched_of[str(adapter.path)] = None
                continue
            self.matched += 1
            base = self._stored_info(places[0].tensor)
            fitted = self._fit(change, base.shape)
            for name, term in terms_of(base.shape, fitted, places, by_module[change.module]):
                mine.setdefault(name, []).append(term)
        for name, terms in mine.items():
            require_no_overlap(adapter, name, terms)
            self.terms.setdefault(name, []).extend(terms)

    def _fit(self, change: Change, base: tuple[int, ...]) -> Change:
        """`change`, or where it is a FLUX control LoRA's on the input layer, `change` on that layer padded with zeros.

        Control LoRAs see twice the channels, and ComfyUI pads the weight (comfy/lora.py). In a diffusers folder a config
        would have to change with the shape, and a mismatch stays an error there.
        """
        delta, inputs = change.delta, change.module.path.endswith(CONTROL_INPUTS)
        if not inputs or not delta.resizable or self.layout.is_folder or delta.shape != (base[0], 2 * base[-1]):
            return change
        return replace(change, delta=Enlarge(delta, delta.shape))

    def _as_stored(self, change: Change) -> tuple[Change, ...]:
        """The change itself, or one change for each expert where the base stores the experts' weights one by one."""
        together = not change.per_expert or self._places(change.module, change.parameter)
        return (change,) if together else change.per_expert

    def tensors(self, dtype: str | None) -> dict[str, TensorPlan]:
        """Every tensor of the output: those of the base, then the heads that were untied."""
        plans = {}
        for name, (file, info) in self.layout.tensors.items():
            plans[name] = self._tensor(name, file, info, dtype)
        for name, source in self.added.items():
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
        # Of the kinds that reshape a weight, a replaced one has grown by tokens (PEFT's modules_to_save on an embedding).
        if shape != info.shape and any(term.delta.replaces for term in terms):
            self.config["vocab_size"] = shape[0]
        return TensorPlan(name, file, info, stored, shape, terms)

    def _untied_changes(self, adapter: Adapter, changes: list[Change]) -> list[Change]:
        """The changes to apply. A change of a tied embedding unties the head, which did not see that change in training.

        Where the adapter itself is tied (PEFT's ensure_weight_tying), head and embedding stay one, and the head's copy of
        the change is left out.
        """
        for ending in EMBEDDING_STEMS:
            embedding = ending.removesuffix(".weight")
            # Trained rows of single tokens act on the head too: PEFT ties them wherever the model does.
            inputs = [
                change for change in changes if change.module.path.endswith(embedding) and not change.delta.acts_on_tied_head
            ]
            outputs = [change for change in changes if change.module.path.endswith(HEAD)]
            places = self.targets.find(inputs[0].module) if inputs else ()
            if not places or not self.targets.tied_embedding:
                continue
            if adapter.tied:
                self.matched += len(outputs)
                return [change for change in changes if change not in outputs]
            self._untie(places[0].tensor)
        return changes

    def _places(self, module: Module, parameter: str) -> tuple[WeightRows, ...]:
        """The places of `module` in the base; a head that is tied, and so not stored, has one like the embedding's."""
        found = self.targets.find(module, parameter)
        embedding = self.targets.tied_embedding if not found and module.path.endswith(HEAD) else None
        return (WeightRows(f"{HEAD}.weight", 0, self.layout.info(embedding).shape[0]),) if embedding else found

    def _stored_info(self, tensor: str) -> TensorInfo:
        """The base's header entry of a tensor. For a head that is tied, that of the embedding; the call unties the head."""
        embedding = self.targets.tied_embedding
        if tensor not in self.layout.tensors and embedding:
            self._untie(embedding)
        return self.layout.info(self.added.get(tensor, tensor))

    def _untie(self, embedding: str) -> None:
        """Has the output store a head of its own, which begins as a copy of the embedding."""
        self.added[f"{HEAD}.weight"] = embedding
        self.config["tie_word_embeddings"] = False


def _unmatched_message(draft: _PlanDraft, adapters: Sequence[Adapter]) -> str:
    """The message of `UnmatchedModules`: the modules with their nearest names, and the adapter's likely architecture."""
    count = len(draft.unmatched)
    pairs = []
    for module in draft.unmatched[:5]:
        near = draft.targets.nearest(module)
        pairs.append(f"{module} (nearest: {near})" if near else str(module))
    more = f" and {count - 5} more" if count > 5 else ""
    total = count + draft.matched
    whose = first_few(draft.unmatched_of)
    message = f"{whose}: {count} of {total} modules have no target in {draft.layout.root}: {'; '.join(pairs)}{more}"
    verdicts = {detect([(change.module, None) for change in adapter.changes]).title for adapter in adapters}
    families = (
        f"; the adapter looks like one for {first_few(sorted(verdicts))}" if verdicts - {"unknown", "undecided"} else ""
    )
    way_out = "`allow_unmatched=True` leaves them out" if draft.matched else "is the adapter for another model?"
    return f"{message}{families}; {way_out}"
