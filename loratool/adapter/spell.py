"""Spells renamed changes as the tensors of a format: each delta in a form that the format has leaves for, with its alpha
where the format keeps alphas."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loratool.adapter.adapter import ONLY_PEFT, Adapter
from loratool.adapter.rename import RenamedDelta
from loratool.archs.llm import is_embedding
from loratool.deltas.base import Delta
from loratool.deltas.schema import CONSTRAINT, WEIGHT, DeltaSpec, explain
from loratool.errors import LoratoolError, Unsupported, error_context
from loratool.formats.peft import wrapping
from loratool.formats.table import FOLDED, TENSOR, Format
from loratool.names import CONTAINER


@dataclass(slots=True)
class FormatTensors:
    """The tensors of an adapter in a format. `ranks` and `scales`, by the prefix and path of each module of low rank, are
    for formats that keep alphas elsewhere; `whole` are the paths of weights that are stored whole, `stacked` those of
    stacked parameters; `dora` says of each module of low rank whether it has a magnitude."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[tuple[str, str], int] = field(default_factory=dict)
    scales: dict[tuple[str, str], float | None] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    stacked: list[str] = field(default_factory=list)
    dora: list[bool] = field(default_factory=list)


def spell_adapter(moved: Sequence[RenamedDelta], target: Format, adapter: Adapter) -> FormatTensors:
    """Spells the deltas of `moved` as `target` does; raises `Unsupported` for a delta that `target` has no place for."""
    result = FormatTensors()
    matrices = {(item.prefix, item.path) for item in moved if item.parameter == "weight" and not item.delta.replaces}
    for item in moved:
        stem = target.stem(item.prefix, _holder(item, moved))
        with error_context(" + ".join(str(source) for source in item.sources)):
            # First the form, then the scale: whether it must go into the factors depends on what leaves they are.
            delta = _fit(item, target)
            part = _part(delta)
            # An alpha beside factors without a rank is ignored; PEFT's bias shares that of its module's factors.
            unheld = part.rank is None and not part.kind.module_alpha
            if target.alpha == FOLDED or unheld:
                delta = delta.folded()
            named = {
                target.key(_wrap(item, stem, target, matrices), leaf): tensor for leaf, tensor in delta.leaves().items()
            }
            # An orthogonal delta's alpha is its constraint, which nothing else can hold.
            beside = target.alpha == TENSOR or (part.kind.alpha == CONSTRAINT and "alpha" in target.leaves)
            if beside and (alpha := _alpha(item, delta, part, adapter)) is not None:
                named[target.key(stem, "alpha")] = alpha
            if twice := named.keys() & result.tensors.keys():
                raise LoratoolError(f"{min(twice)} would be written twice")
        result.tensors |= named
        if item.delta.stacked:
            result.stacked.append(item.path)
            result.ranks[item.prefix, item.path] = item.delta.rank or 0
            result.scales[item.prefix, item.path] = delta.scale
        elif part.rank is not None and item.parameter == "weight":
            key = item.prefix, item.path
            result.ranks[key], result.scales[key] = part.rank, delta.scale
            result.dora.append(part.magnitude is not None)
        elif item.delta.replaces and item.parameter == "weight":
            result.whole.append(item.path)
    return result


def _wrap(item: RenamedDelta, stem: str, target: Format, matrices: Container[tuple[str, str]]) -> str:
    """The stem of a value that replaces another: where PEFT wraps the module, its bias is that of the `base_layer`."""
    inside = item.delta.replaces and item.parameter == "bias" and (item.prefix, item.path) in matrices
    return f"{stem}.base_layer" if inside and target.whole == CONTAINER else stem


def _holder(item: RenamedDelta, moved: Sequence[RenamedDelta]) -> str:
    """The path of the module that holds a delta's tensors: for stacked experts the owner of the parameter, with a
    `base_layer` for each wrapper that PEFT puts around it (`formats.peft.PeftConfig.parameter_of`)."""
    if not item.delta.stacked:
        return item.path
    module = item.path.rpartition(".")[0]
    beside = [other.path for other in moved if other.delta.stacked and other.path.startswith(f"{module}.")]
    beside.sort(key=wrapping)
    return module + ".base_layer" * (len(beside) - 1 - beside.index(item.path))


def _fit(item: RenamedDelta, target: Format) -> Delta:
    """The first form of a delta that the format has leaves for; raises `Unsupported` where it has none."""
    # The leaves are those of a LoRA; the config alone says that they are not.
    if item.delta.stacked and not target.folder:
        raise Unsupported(ONLY_PEFT)
    forms = [form for form in item.delta.equivalent_forms() if form.leaves().keys() <= target.leaves.keys()]
    if not forms:
        label = _part(item.delta).label
        way_out = "`rule=Rule()` makes a LoRA of it" if has_lora(item.parameter, item.delta) else "merge it"
        raise Unsupported(f"{target.title} has no place for a delta of kind {label}; {way_out}, or choose another format")
    # PEFT looks for an embedding's factors under names of their own.
    embedding = is_embedding(item.path) and "embedding_up" in target.leaves
    return next((form for form in forms if embedding == form.of_embedding), forms[0])


def has_lora(parameter: str, delta: Delta) -> bool:
    """Whether a LoRA can stand for a change: not for that of a bias, nor for a value that is put in a weight's place."""
    return parameter == WEIGHT and delta.becomes_lora


def _part(delta: Delta) -> DeltaSpec:
    """The schema's description of a delta, by its leaves."""
    return explain({leaf: tuple(tensor.shape) for leaf, tensor in delta.leaves().items()})[0]


def _alpha(item: RenamedDelta, delta: Delta, part: DeltaSpec, adapter: Adapter) -> Tensor | None:
    """The alpha to stand beside the factors: the source's own tensor where that still holds, else an alpha that gives the
    same scale; None for a delta without a scale or a rank."""
    stored = [adapter.alphas[key] for source in item.sources for key in source.keys if key in adapter.alphas]
    unchanged = len(item.sources) == 1 and item.sources[0].delta.scale == delta.scale
    if stored and unchanged and part.rank == _part(item.sources[0].delta).rank:
        return stored[0]
    if delta.scale is None or part.rank is None or item.parameter != "weight":
        return None
    # In the dtype of the source's alpha, or of the factors, where that is exact: a rounded alpha would be another scale.
    exact = torch.tensor(delta.scale * part.rank, dtype=torch.float64)
    narrow = exact.to(stored[0].dtype if stored else next(iter(delta.leaves().values())).dtype)
    return narrow if narrow.double() == exact else exact.float()
