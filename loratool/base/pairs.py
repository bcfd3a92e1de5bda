"""Which parameters of two checkpoints are the same, whatever the tensors' names and however they are stacked or cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from loratool.base.base import BaseCheckpoint
from loratool.deltas.schema import WEIGHT
from loratool.errors import LoratoolError, UnmatchedModules, first_few
from loratool.files.layout import Layout
from loratool.files.tensors import DTYPES, FLOATS
from loratool.keys.detect import detect
from loratool.keys.places import inputs_of, module_of
from loratool.keys.rows import WeightRows
from loratool.names import EMA, WHOLE, Module

BUFFERS: Final = re.compile(
    r"(?:.*\.)?(?:position_ids|inv_freq|freqs|logit_scale|num_batches_tracked|pos_embed\.pos_embed)"
    r"|betas|alphas_cumprod\w*|(?:sqrt|log|posterior)_\w+|denoiser\.sigmas|model_ema\..*"
)
"""Tensors that some writers store and others leave out: tables that follow from the config, the noise schedules of
diffusion, and averaged copies of the weights."""

Takes = Callable[[Module, str], bool]
"""Whether a parameter of a module ("weight" or "bias") is wanted: `Selection.takes`."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A parameter of both checkpoints, under the base's name in memory, with its places and its shape in each checkpoint; a
    `raw` one is named like its tensor, and is neither the weight nor the bias of a module."""

    module: Module
    parameter: str
    base: tuple[WeightRows, ...]
    tuned: tuple[WeightRows, ...]
    shape: tuple[int, ...]
    tuned_shape: tuple[int, ...]
    raw: bool

    def __str__(self) -> str:
        return self.module.stem if self.parameter == WEIGHT else f"{self.module.stem}.{self.parameter}"


@dataclass(frozen=True, slots=True)
class Pairing:
    """The pairs that are wanted, the names of those that are not, and warnings of what only one checkpoint has."""

    pairs: tuple[Pair, ...]
    excluded: tuple[str, ...]
    warnings: tuple[str, ...]


def pair_parameters(base: BaseCheckpoint, tuned: BaseCheckpoint, takes: Takes) -> Pairing:
    """Pairs the parameters of `base` and `tuned` that `takes` lets through.

    Raises `UnmatchedModules` where one checkpoint lacks a parameter of a component that both have.
    """
    # By the base's names, behind another prefix, by the tuned checkpoint's names, as a tied head: each step is for what the
    # steps before it left in `lost`, and an exact name must never lose to a guess.
    draft = _PairingDraft(base, tuned)
    for name in base.layout.tensors:
        draft.add(name)
    draft.add_lost()
    for name in tuned.layout.tensors:
        draft.add_reverse(name)
    draft.add_ties()
    notes = (*draft.leftovers(takes), *draft.unequal())
    pairs = [pair for pair in draft.pairs if takes(pair.module, pair.parameter)]
    if not pairs:
        raise LoratoolError("nothing is left: `Selection(include=)` and `exclude=` leave no parameter of either")
    excluded = tuple(str(pair) for pair in draft.pairs if not takes(pair.module, pair.parameter))
    return Pairing(tuple(pairs), excluded, notes)


class _PairingDraft:
    """Pairs as they are found; `lost`, the base's tensors without a partner, and `met`, the tuned ones that have one."""

    def __init__(self, base: BaseCheckpoint, tuned: BaseCheckpoint) -> None:
        self.base, self.tuned = base, tuned
        self.pairs: list[Pair] = []
        self.lost: dict[str, tuple[Module, str]] = {}
        self.met: set[str] = set()
        self.named: set[str] = set()

    def add(self, name: str) -> None:
        """Looks for a tensor of the base in the tuned checkpoint, under the same name, or for what it is in memory."""
        # Averaged copies (model_ema) are not the model's weights, and tensors that are no floats are left to `unequal`.
        if module_of(name)[0].component == EMA or self.base.layout.info(name).dtype not in FLOATS:
            return
        direct = self.tuned.targets.own.get(name)
        for memory, mine in self.base.targets.in_memory(name):
            module, parameter = module_of(memory)
            # PEFT looks for modules in memory, some of which are rows of a tensor, or several tensors.
            same = direct and mine == (self.base.targets.own[name],)
            theirs = (direct,) if direct and same else self.tuned.targets.find(module, parameter)
            if not theirs:
                self.lost[name] = module, parameter
            elif memory not in self.named:
                self.named.add(memory)
                self._pair(memory, module, parameter, mine, theirs)

    def add_lost(self) -> None:
        """Tries the tensors without a partner behind one prefix that places them all: wrappers move a whole model."""
        renamed = self.tuned.targets.find_wrapped({module for module, _ in self.lost.values()})
        for name, (module, parameter) in list(self.lost.items()):
            theirs = self.tuned.targets.find(renamed[module], parameter) if module in renamed else ()
            if theirs:
                self._pair(name, module, parameter, (self.base.targets.own[name],), theirs)
                del self.lost[name]

    def add_reverse(self, name: str) -> None:
        """Looks for a tensor of the tuned checkpoint in the base, for namings that the index knows in one direction only."""
        # A base in Meta's naming of Llama has places for Hugging Face's names, a tuned one of Hugging Face none for Meta's.
        module, parameter = module_of(name)
        if name in self.met or not self.lost:
            return
        mine = self.base.targets.find(module, parameter)
        if mine and any(place.tensor in self.lost for place in mine):
            self._pair(name, module, parameter, mine, (self.tuned.targets.own[name],))
            for place in mine:
                self.lost.pop(place.tensor, None)

    def add_ties(self) -> None:
        """Pairs the weights that a checkpoint, or both, stores only under the name of another weight that is tied to it."""
        # PEFT changes each of them alone, so that a change of both takes an adapter of both.
        for name in dict.fromkeys(
            name for side in (self.base, self.tuned) for tie in side.targets.ties for name in tie.names
        ):
            module, parameter = module_of(name)
            mine, theirs = self.base.targets.find(module, parameter), self.tuned.targets.find(module, parameter)
            if mine and theirs:
                continue
            here = mine or self.base.targets.find_twin(module, parameter)
            there = theirs or self.tuned.targets.find_twin(module, parameter)
            if here and there:
                self._pair(name, Module(WHOLE, module.path, module.path), parameter, here, there)
                for place in here:
                    self.lost.pop(place.tensor, None)

    def leftovers(self, takes: Takes) -> Iterator[str]:
        """Warnings of the components that one checkpoint lacks as a whole.

        Raises `UnmatchedModules` where a checkpoint lacks weights of a component that both have, or shares none at all.
        """
        rest = {name: module_of(name) for name in self.tuned.layout.tensors if name not in self.met}
        # A component may have another name on either side, so that each side counts the shared ones under its own.
        common = {pair.module.component for pair in self.pairs}
        theirs = {module_of(name)[0].component for name in self.met}
        sides = ((self.base, self.tuned, self.lost, common), (self.tuned, self.base, rest, theirs))
        for mine, other, lost, shared in sides:
            left = {name: found for name, found in lost.items() if takes(*found) and not BUFFERS.fullmatch(name)}
            missing = [name for name, (module, _) in left.items() if module.component in shared and _is_weight(mine, name)]
            if missing or not shared:
                raise UnmatchedModules(_unlike(mine.layout, other.layout, missing or list(left)))
            for component in sorted({module.component for module, _ in left.values()} - shared):
                what = component or "model of this kind"
                yield f"{other.layout.root} has no {what} under the names of {mine.layout.root}: taken to be the same"

    def unequal(self) -> Iterator[str]:
        """A warning of the tensors under the same name that are no floats and differ."""
        common = [name for name in self.base.layout.tensors if name in self.tuned.layout.tensors]
        whole = [name for name in common if self.base.layout.info(name).dtype not in FLOATS]
        unlike = [name for name in whole if not _is_same(self.base, self.tuned, name)]
        if unlike:
            yield f"{first_few(unlike, 3)} hold no floating-point numbers and differ; no adapter holds that"

    def _pair(
        self, name: str, module: Module, parameter: str, base: tuple[WeightRows, ...], tuned: tuple[WeightRows, ...]
    ) -> None:
        """Adds the pair of what is called `name`, and its tuned tensors to `met`."""
        self.met.update(place.tensor for place in tuned)
        shapes = self.base.shape(base), self.tuned.shape(tuned)
        self.pairs.append(Pair(module, parameter, base, tuned, *shapes, raw=module.stem == name))


def _is_same(base: BaseCheckpoint, tuned: BaseCheckpoint, name: str) -> bool:
    """Whether a tensor is the same in both checkpoints; of dtypes that torch lacks, only dtype and shape are compared."""
    one, other = base.layout.info(name), tuned.layout.info(name)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.dtype not in DTYPES or torch.equal(base.checkpoint[name], tuned.checkpoint[name])


def _is_weight(weights: BaseCheckpoint, name: str) -> bool:
    """Whether a tensor is one of floats and no averaged copy."""
    return weights.layout.info(name).dtype in FLOATS and module_of(name)[0].component != EMA


def _unlike(mine: Layout, other: Layout, missing: list[str]) -> str:
    """The message of `UnmatchedModules`, with both architectures where they differ."""
    models = [detect(inputs_of(layout)).title for layout in (mine, other)]
    of = f" ({models[0]} and {models[1]})" if models[0] != models[1] else ""
    return (
        f"{other.root}: lacks {first_few(missing)} of {mine.root}{of}; both must be the same model, "
        "or leave out what only one of them has, with `Selection(exclude=)`"
    )
