"""What the tensors of an adapter hold: norms and spectra from the factors, NaN or Inf, and factors that are all zero."""

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
from loratool.numbers.settings import steady_arithmetic


@dataclass(frozen=True, slots=True)
class ModuleValues:
    """One delta measured: ‖ΔW‖_F, the largest singular value of ΔW, the effective rank, and a `remark` on bad numbers."""

    norm: float
    largest: float
    effective_rank: float
    remark: str = ""


@steady_arithmetic()
def measure(found: AdapterListing) -> dict[str, ModuleValues]:
    """Reads every tensor of the adapter once, module by module; the result's keys are the names that `inspect` lists."""
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
        # `inspect` names what is wrong with the module; here there is only nothing to measure.
        return ()


def _measure_part(
    found: AdapterListing, group: ModuleLeaves, part: DeltaSpec, file: TensorFile, alphas: Mapping[str, float | None]
) -> ModuleValues:
    tensors = {leaf: file.read(group.leaves[leaf]) for leaf in part.leaves if leaf != "alpha"}
    # Before any arithmetic: LAPACK's SVD fails on numbers that are not finite.
    remark = _remark(tensors)
    if remark.startswith("NaN"):
        return ModuleValues(float("nan"), float("nan"), float("nan"), remark)
    try:
        delta = build_part(part, tensors, found.given_for(group, part, alphas, Given()))
        factors = delta.factors()
        # A full difference, or a LoKr of whole sides, has no pair of factors: its norm is cheap, its spectrum is not.
        if factors is None:
            return ModuleValues(float(delta.dense().double().norm()), 0.0, 0.0, remark)
        # ‖ΔW‖ is the root of the sum of squared singular values, so one small SVD tells all three figures.
        sigma = singular_values(*factors)
    except LoratoolError as error:
        return ModuleValues(0.0, 0.0, 0.0, str(error))
    return ModuleValues(float(sigma.norm()), float(sigma.max()), effective_rank(sigma), remark)


def _remark(tensors: Mapping[str, Tensor]) -> str:
    # As float32: torch has no isfinite for float8 dtypes such as float8_e4m3fn.
    bad = [leaf for leaf, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
    if bad:
        return f"NaN or Inf in {', '.join(bad)}"
    zero = [leaf for leaf, tensor in tensors.items() if not bool((tensor.float() != 0).any())]
    return f"all zero: {', '.join(zero)}" if zero else ""
