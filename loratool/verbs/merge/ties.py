"""Weights that are one in memory and stop being one in a merge: which tensors the output stores of its own, and what config
then says so."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from loratool.adapter.adapter import Adapter, Change
from loratool.archs.memory import name_on_disk
from loratool.deltas.relations import same_bytes
from loratool.deltas.schema import BIAS
from loratool.errors import first_few
from loratool.files.layout import Layout
from loratool.files.tensors import TensorFile
from loratool.keys.places import Tie, WeightIndex
from loratool.keys.rows import Places, WeightRows
from loratool.names import Module, flat


def is_of_all(adapter: Adapter, change: Change) -> bool:
    """Whether a change is one of all weights of a tie, and unties none of them."""
    # A bias that is tied (BERT's `predictions.bias` and `predictions.decoder.bias`) is of one layer under two names.
    return change.delta.acts_on_tied_head or adapter.tied or change.parameter == BIAS


class UntiedWeights:
    """The weights of a base that a merge unties: `added` maps the output's new tensors to those that they are copies of, and
    `config` has the entries of config.json that change."""

    def __init__(self, layout: Layout, targets: WeightIndex) -> None:
        self.layout, self.targets = layout, targets
        self.added: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        self.forced: dict[Tie, None] = {}
        self._equal: dict[Tie, bool] = {}

    def places(self, module: Module, parameter: str) -> Places:
        """The places of a weight in the output: of one that the base stores only under its twin's name, those of the tensor
        that will be its own. Empty where the base has no such weight."""
        if found := self.targets.find(module, parameter):
            return found
        tie = self.targets.tie_of(module, parameter)
        # Of what the file stores several times with other numbers, nobody knows whose twin the weight is.
        if tie is None or not self._is_one(tie):
            return ()
        return (self._virtual(tie, self._member(tie, module, parameter)),)

    def settle(self, adapter: Adapter, change: Change, module: Module) -> Sequence[Places]:
        """The places that a change of `module` goes to, each of which gets all of it; the weights tied to it are untied,
        unless the change is one of all of them. Empty where the base has no such weight."""
        places, tie = self.places(module, change.parameter), self.targets.tie_of(module, change.parameter)
        if tie is None or not places:
            return [places] if places else []
        if self._holds(tie) and is_of_all(adapter, change):
            return [(self._rows(tensor),) for tensor in dict.fromkeys([*tie.stored.values(), *self._own(tie)])]
        # Of a weight that is stored twice with other numbers, the config is wrong already.
        if tie.weights.said or len(tie.stored) < len(tie.members):
            self.untie(tie, self._member(tie, module, change.parameter))
        return [places]

    def without_equal_copies(self, changes: Sequence[Change]) -> list[Change]:
        """The changes without those of a head that the base ties, where they are the embedding's once more.

        PEFT stores both; what is one stays one, unless one of the two was trained further."""
        whole = [change for change in changes if change.delta.replaces or change.delta.acts_on_tied_head]
        further = {change.module for change in changes if not (change.delta.replaces or change.delta.acts_on_tied_head)}
        alone = [change for change in whole if change.module not in further]
        stored = [change for change in alone if self.targets.find(change.module, change.parameter)]
        kept, left_out = set[int](), set[int]()
        for change in alone:
            if not self.targets.find(change.module, change.parameter):
                same = [other for other in stored if same_bytes(other.delta, change.delta)]
                kept |= {id(other) for other in same}
                left_out |= {id(change)} if same else set()
        return [
            replace(change, delta=change.delta.shared()) if id(change) in kept else change
            for change in changes
            if id(change) not in left_out
        ]

    def without_copies(self, adapter: Adapter, changes: Sequence[tuple[Change, Module]]) -> list[tuple[Change, Module]]:
        """The changes, without those that an adapter of tied weights (PEFT's ensure_weight_tying) has once more for each
        twin."""
        if not adapter.tied:
            return list(changes)
        kept: dict[tuple[Tie, str], Module] = {}
        # The first of the weights that are stored speaks for all.
        for change, module in sorted(changes, key=lambda item: not self.targets.find(item[1], item[0].parameter)):
            if (tie := self.targets.tie_of(module, change.parameter)) and self._holds(tie):
                kept.setdefault((tie, change.parameter), module)
        return [
            (change, module)
            for change, module in changes
            if (tie := self.targets.tie_of(module, change.parameter)) is None
            or kept.get((tie, change.parameter), module) == module
        ]

    def warnings(self) -> Iterator[str]:
        """What programs may make of weights that the class ties whatever its config says."""
        for tie in self.forced:
            names = first_few(sorted(self._name(tie, member) for member in tie.members))
            yield f"{names} are one in this class, and no longer here: transformers 5 reads them apart, 4 does not"

    def late_copies(self, tensor: str) -> Iterator[str]:
        """The output's tensors that are copies of `tensor`, by the tie of both."""
        return (name for name, source in self.added.items() if source == tensor)

    def untie(self, tie: Tie, member: tuple[str, str]) -> None:
        """Has the output store the weights of a tie one by one, and its config say so."""
        whole = [tie] if tie.weights.always else [other for other in self.targets.ties if self._same_config(other, tie)]
        for each in whole:
            for name in each.members:
                # Where a config cannot untie, a program unties what it finds stored with other numbers.
                if name not in each.stored and (not tie.weights.always or name == member):
                    self.added[self._name(each, name)] = next(iter(each.stored.values()))
        if tie.weights.always:
            self.forced[tie] = None
            self.added |= self._kept(tie, member)
            return
        for entries in tie.weights.entries:
            self._set(entries)

    def _kept(self, tie: Tie, member: tuple[str, str]) -> Mapping[str, str]:
        """Where the changed weight is the one that the file stores, the twins, which keep the weight as it was."""
        if member not in tie.stored:
            return {}
        return {self._name(tie, name): tie.stored[member] for name in tie.members if name not in tie.stored}

    def _same_config(self, one: Tie, other: Tie) -> bool:
        return bool(set(one.weights.entries) & set(other.weights.entries))

    def _set(self, entries: Sequence[str]) -> None:
        """Sets the entry of config.json that `entries` lead to, to false."""
        *outer, last = entries
        here = self.config
        there: Any = self.layout.config
        for name in outer:
            there = there.get(name, {})
            here = here.setdefault(name, copy.deepcopy(there))
        here[last] = False

    def _holds(self, tie: Tie) -> bool:
        """Whether a tie is one: of what is stored twice, the config must say so and the numbers be the same."""
        return self._is_one(tie) and (len(tie.stored) < 2 or bool(tie.weights.said))

    def _is_one(self, tie: Tie) -> bool:
        """Whether all that the file stores of a tie has the same numbers."""
        if tie not in self._equal:
            self._equal[tie] = self._is_equal(list(tie.stored.values()))
        return self._equal[tie]

    def _is_equal(self, names: Sequence[str]) -> bool:
        if len(names) < 2:
            return True
        found = []
        for name in names:
            file, info = self.layout.tensors[name]
            with TensorFile(self.layout.files[file]) as source:
                found.append(source.read(info))
        return all(each.dtype == found[0].dtype and torch.equal(each, found[0]) for each in found[1:])

    def _member(self, tie: Tie, module: Module, parameter: str) -> tuple[str, str]:
        """The member of a tie that a module is, by its path or by the path with another prefix."""
        paths = [flat(path) for path in self.targets.paths_in_memory(module.path)]
        return next((path, parameter) for path in paths if (path, parameter) in tie.members)

    def _name(self, tie: Tie, member: tuple[str, str]) -> str:
        return name_on_disk(self.layout.config, tie.members[member])

    def _virtual(self, tie: Tie, member: tuple[str, str]) -> WeightRows:
        rows = self._rows(next(iter(tie.stored.values())))
        return WeightRows(self._name(tie, member), rows.start, rows.stop, rows.transposed)

    def _rows(self, tensor: str) -> WeightRows:
        own = self.targets.own[self.added.get(tensor, tensor)]
        return WeightRows(tensor, own.start, own.stop, own.transposed)

    def _own(self, tie: Tie) -> Iterator[str]:
        """The tensors that the output stores of its own for members of a tie."""
        names = {self._name(tie, member) for member in tie.members}
        return (name for name in self.added if name in names)
