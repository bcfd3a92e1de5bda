"""Stacked experts brought to how a base stores them: turned as its stacks lie, or cut to its experts one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratool.adapter.adapter import Adapter, Change
from loratool.archs.classes import is_stack_transposed
from loratool.deltas.base import Delta
from loratool.deltas.schema import WEIGHT
from loratool.errors import AmbiguousFile, ShapeMismatch
from loratool.files.layout import Layout
from loratool.formats.peft import FIRST_AXIS, FLAGGED_FIRST
from loratool.keys.places import WeightIndex
from loratool.keys.stacks import has_inputs_first, is_held_inputs_first, model_types
from loratool.names import Module


@dataclass(frozen=True, slots=True)
class _Stack:
    """A change of stacked experts and where the base has them: the `tensor` of the stack (None: one by one, or not at all),
    and the `shape` of that stack or of one expert's matrix (empty: the base has none)."""

    change: Change
    delta: Delta
    tensor: str | None
    shape: tuple[int, ...]

    def turns(self) -> set[bool]:
        """Whether the factors fit as they are (False) and turned (True)."""
        own = self.delta.shape[1:]
        return {turned for turned, sides in ((False, own), (True, own[::-1])) if sides == self.shape[-2:]}

    def change_at(self, turned: bool) -> tuple[Change, ...]:
        """The change, or the changes of single experts, with the factors turned or not."""
        delta = self.delta.turn() if turned else self.delta
        if self.tensor is None:
            experts = zip(self.change.per_expert, delta.per_expert(), strict=True)
            return tuple(replace(each, delta=lora) for each, lora in experts) if self.shape else (self.change,)
        # A stack of two dimensions (DBRX) is a matrix to PEFT.
        return (replace(self.change, delta=delta if len(self.shape) == 3 else delta.per_expert()[0], per_expert=()),)


def lay_experts(adapter: Adapter, changes: Sequence[Change], targets: WeightIndex, layout: Layout) -> list[Change]:
    """`changes` with those of stacked experts as the base stores them.

    Raises `ShapeMismatch` where the base has another number of experts, and `AmbiguousFile` where neither shapes nor the
    adapter's version of PEFT and the model's class tell which way round the factors are.
    """
    stacks = {id(change): _find_stack(change, targets, layout) for change in changes if change.delta.stacked}
    # One rule laid all factors of an adapter to their axes: those that are not square tell for those that are.
    seen = {next(iter(fits)) for stack in stacks.values() if len(fits := stack.turns()) == 1}
    found: list[Change] = []
    for change in changes:
        stack = stacks.get(id(change))
        if stack is None:
            found.append(change)
            continue
        fits = stack.turns()
        turned = next(iter(fits), False) if len(fits) < 2 else next(iter(seen)) if len(seen) == 1 else None
        found += stack.change_at(_turned_by_class(adapter, stack, layout) if turned is None else turned)
    return found


def _find_stack(change: Change, targets: WeightIndex, layout: Layout) -> _Stack:
    """Where the base has the experts of a change; raises `ShapeMismatch` where it has another number of them."""
    delta = change.delta
    if places := targets.find(change.module, change.parameter):
        shape = layout.info(places[0].tensor).shape
        # Several places are those of parts that the base has in place of a stack.
        if len(places) == 1:
            _require_experts(change, delta.experts, shape[0] if len(shape) == 3 else 1, layout)
            return _Stack(change, delta, places[0].tensor, shape)
    first = targets.find(change.per_expert[0].module, WEIGHT)
    if not first:
        return _Stack(change, delta, None, ())
    count = delta.experts
    block, _, name = change.module.path.rpartition(".")
    while targets.find(_expert_of(change.module, block, count, name), WEIGHT):
        count += 1
    held = sum(bool(targets.find(each.module, WEIGHT)) for each in change.per_expert)
    _require_experts(change, delta.experts, count if held == delta.experts else held, layout)
    inputs = first[0].matrix_of(layout.info(first[0].tensor).shape)[-1]
    return _Stack(change, delta, None, (sum(place.rows for place in first), inputs))


def _expert_of(module: Module, block: str, expert: int, name: str) -> Module:
    return replace(module, path=f"{block}.{expert}.{name}")


def _require_experts(change: Change, mine: int, theirs: int, layout: Layout) -> None:
    if mine != theirs:
        raise ShapeMismatch(
            f"{change}: has {mine} experts, {layout.root} has {theirs}: the adapter is for another model; "
            "`Selection(exclude=)` leaves them out"
        )


def _turned_by_class(adapter: Adapter, stack: _Stack, layout: Layout) -> bool:
    """Whether the factors of square experts are turned, by the version of PEFT and the model's class; raises
    `AmbiguousFile`."""
    rule, square = stack.delta.stack_rule, f"{stack.change}: its experts are square, and their factors fit either way round"
    if not rule:
        raise AmbiguousFile(
            f"{square}; write the version of PEFT that trained it into adapter_config.json, as peft_version: versions from "
            "0.19.1 on lay the factors to other axes than those before"
        )
    if rule == FIRST_AXIS:
        return True
    types = model_types(layout)
    stored = has_inputs_first(layout, stack.tensor) if stack.tensor else False
    # Without a class, a stack that lies as most do is taken for one of most classes; any other needs to be known.
    if not types and stored is not False:
        raise AmbiguousFile(
            f"{square}, which the model's class decides; put its config.json beside the weights of {layout.root}, and name "
            "the folder"
        )
    path = stack.change.module.path
    flagged, held = bool(is_stack_transposed(layout.config, path)), is_held_inputs_first(layout, path)
    turned = flagged == (rule == FLAGGED_FIRST)
    # Some files hold stacks the other way round than the model does in memory (Qwen3-VL-MoE).
    return turned != (held != (held if stored is None else stored))
