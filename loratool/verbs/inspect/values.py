"""What the tensors of an adapter hold: norms and spectra from the factors, NaN, and factors that are all zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.deltas.registry import build_part
from loratool.deltas.schema import DeltaSpec, Given
from loratool.errors import LoratoolError
from loratool.files.tensors import TensorFile
from loratool.keys.listing import AdapterListing, ModuleLeaves
from loratool.numbers.linalg import effective_rank, singular_values


@dataclass(frozen=True, slots=True)
class ModuleValues:
    """One delta measured: ‖ΔW‖_F, its largest singular value, its effective rank, and what is wrong with it, if anything."""

    norm: float
    largest: float
    effective_rank: float
    remark: str = ""


def measure(found: AdapterListing) -> dict[str, ModuleValues]:
    """Reads every tensor of the adapter once, module by module; keys are names as `inspect` lists them."""
    alphas = found.alphas()
    measured = {}
    with TensorFile(found.header) as file:
        for group in found.groups:
            for part in _parts(group):
                measured[group.name_of(part)] = _measure_part(found, group, part, file, alphas)
    return measured


def _parts(group: ModuleLeaves) -> tuple[DeltaSpec, ...]:
    try:
        return group.parts()
    except LoratoolError:
        return ()


def _measure_part(
    found: AdapterListing, group: ModuleLeaves, part: DeltaSpec, file: TensorFile, alphas: Mapping[str, float | None]
) -> ModuleValues:
    tensors = {leaf: file.read(group.leaves[leaf]) for leaf in part.leaves if leaf != "alpha"}
    remark = _remark(tensors)
    if remark.startswith("NaN"):
        return ModuleValues(float("nan"), float("nan"), float("nan"), remark)
    try:
        delta = build_part(part, tensors, found.given(group, part, alphas, Given()))
        factors = delta.factors()
        if factors is None:
            return ModuleValues(float(delta.dense().double().norm()), 0.0, 0.0, remark)
    except LoratoolError as error:
        return ModuleValues(0.0, 0.0, 0.0, str(error))
    sigma = singular_values(*factors)
    return ModuleValues(float(sigma.norm()), float(sigma.max()), effective_rank(sigma), remark)


def _remark(tensors: Mapping[str, Tensor]) -> str:
    bad = [leaf for leaf, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
    if bad:
        return f"NaN or Inf in {', '.join(bad)}"
    zero = [leaf for leaf, tensor in tensors.items() if not bool((tensor.float() != 0).any())]
    return f"all zero: {', '.join(zero)}" if zero else ""
