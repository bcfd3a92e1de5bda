"""`convert --to-lora` and `resize`: deltas as the best LoRA of some rank, error or size, and the error that this makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from torch import Tensor

from loratool.adapter.adapter import Adapter, Assumptions, Change, factor_workload, inputs_of
from loratool.adapter.approximate import (
    ApproximatedDeltas,
    ApproximatedModule,
    Approximation,
    error_of,
    fits_lora_file,
    keeps_its_rank,
)
from loratool.adapter.load import open_source
from loratool.adapter.same_format import contents_like_source, lora_tensors, read_unchanged, rescaled_biases
from loratool.base.base import BaseCheckpoint, open_base
from loratool.deltas.schema import WEIGHT
from loratool.errors import error_in_file
from loratool.files.adapter_writer import AdapterContents, contents_size, write_contents
from loratool.files.history import history_entry, input_record
from loratool.files.paths import path_of
from loratool.files.tensors import torch_dtype
from loratool.numbers.budgets import RankAllocator
from loratool.numbers.device_choice import open_devices
from loratool.numbers.ranks import NUMERICAL, Budget, RankCandidate, Rule
from loratool.numbers.settings import steady_arithmetic
from loratool.verbs.reports import Report, worst_of

LADDER: Final = (1, *(step for power in range(1, 15) for step in (2**power, 3 * 2 ** (power - 1))))
"""The ranks of a frontier: 1, then the powers of two and the middles between them: 2, 3, 4, 6, 8, 12, 16 …"""


@dataclass(frozen=True, slots=True)
class ResizeReport(Report):
    """What `resize` or `to_lora` did: every module that became a LoRA or got another rank, how many were kept, and the error
    over all modules that changed. `weighed` is the error with each module's square divided by the square of the weight's
    norm, where that was asked for."""

    out: str
    modules: tuple[ApproximatedModule, ...]
    kept: int
    error: float
    nbytes: int
    weighed: float | None = None

    @property
    def worst(self) -> ApproximatedModule | None:
        """The module with the largest error."""
        return worst_of(self.modules)


@steady_arithmetic()
def to_lora(
    adapter: Adapter | str | Path,
    out: str | Path,
    rule: Rule | None = None,
    *,
    dtype: str | None = None,
    base: str | Path | BaseCheckpoint | None = None,
    assume: Assumptions | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> ResizeReport:
    """Writes an adapter to `out` with every delta on a matrix or a kernel as a LoRA.

    A LoRA keeps its bytes. Kinds that depend on the weight (DoRA, OFT, (IA)³ …) need `base`. Errors are those of the factors
    as stored. Raises `LoratoolError`.
    """
    # Factors and errors are computed in float64, which Apple's GPUs lack.
    source = open_source(adapter, assume=assume)
    devices = open_devices(device, factor_workload([source]), doubles=True)
    work = Approximation(source, torch_dtype(dtype), fits_lora_file, open_base(base), devices=devices)
    return _approximate_and_write("convert", work, rule or Rule(), Path(out), overwrite=overwrite)


@steady_arithmetic()
def resize(
    adapter: Adapter | str | Path,
    out: str | Path,
    rule: Rule | Budget,
    *,
    dtype: str | None = None,
    base: str | Path | BaseCheckpoint | None = None,
    weigh: bool = False,
    assume: Assumptions | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> ResizeReport:
    """Writes an adapter to `out` with every LoRA, and every other kind as a LoRA, of the rank that `rule` gives.

    The best approximation at that rank (Eckart and Young 1936), from QR of the factors and the spectrum of their small core.
    A budget is shared over all modules; a module of which no rank is worth its bytes is dropped, and has rank 0 in the
    report. With `weigh`, a budget counts the error of each module relative to its weight in `base`.
    """
    source = open_source(adapter, assume=assume)
    devices = open_devices(device, factor_workload([source]), doubles=True)
    work = Approximation(source, torch_dtype(dtype), keeps_its_rank, open_base(base), devices=devices, weigh=weigh)
    report = _approximate_and_write("resize", work, rule, Path(out), overwrite=overwrite)
    if not weigh:
        return report
    # The report's modules and the worths are both in the order of `work.numbers`. Errors are relative: norms are weighed.
    worths = work.worth.values()
    return replace(
        report,
        weighed=error_of([replace(m, norm=m.norm * worth) for m, worth in zip(report.modules, worths, strict=True)]),
    )


def _approximate_and_write(
    command: str, work: Approximation, rule: Rule | Budget, out: Path, *, overwrite: bool
) -> ResizeReport:
    """Approximates deltas by `rule`, writes the adapter in its source's own spelling, and reports."""
    adapter = work.adapter
    # What is kept is read as it is stored, so that it keeps its bytes, and counts in a budget.
    kept, said = read_unchanged(adapter, work.kept), _history(command, adapter)
    with error_in_file(adapter.path):
        if isinstance(rule, Rule):
            done = work.approximate(rule)
        else:
            done = work.within(rule, lambda imagined: contents_size(_contents(said, work, imagined, kept)))
    nbytes = write_contents(
        _contents(said, work, done, kept), inputs_of([adapter], work.base), path_of(out), overwrite=overwrite
    )
    figures = tuple(figures for figures, _ in done.values())
    notes = (*adapter.warnings, *work.devices.warnings())
    return ResizeReport(str(out), figures, len(work.kept), error_of(figures), nbytes, warnings=notes)


History = Callable[[float], dict[str, str]]
"""Gives the metadata that tells of a command, from the error that the command made."""


def _history(command: str, adapter: Adapter) -> History:
    """The history of `adapter` with `command` on top."""
    # A budget asks for the metadata many times, but the input is hashed once, here. The error's width is fixed, so that a
    # size that was found with one error holds with another.
    made_of = [input_record(adapter.path, adapter.file)]
    return lambda error: history_entry(command, made_of, adapter.metadata, error=f"{error:.4e}")


def _contents(said: History, work: Approximation, done: ApproximatedDeltas, kept: Mapping[str, Tensor]) -> AdapterContents:
    """The tensors, metadata and config to write: what is kept, and the new LoRA."""
    tensors = dict(kept)
    # PEFT scales a bias beside a LoRA as the factors. New factors have scale 1, so the old scale goes into the bias.
    tensors |= rescaled_biases(work.kept, {figures.name for figures, _ in done.values()})
    for number, (figures, delta) in done.items():
        if figures.rank:
            tensors |= lora_tensors(Change(work.adapter.changes[number].module, WEIGHT, delta))
    ranks = [figures.rank for figures, _ in done.values() if figures.rank]
    contents = contents_like_source(work.adapter, tensors, work.kept, ranks)
    error = error_of([figures for figures, _ in done.values()])
    return replace(contents, metadata={**contents.metadata, **said(error)})


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """What one rank for all modules comes to: the bytes of the output, the relative error over all modules, and the error of
    the worst module. `shared` is the error over all where the same bytes are spent where each saves most."""

    rank: int
    nbytes: int
    error: float
    worst: float
    shared: float


@dataclass(frozen=True, slots=True)
class FrontierReport(Report):
    """The error at each size, before factors are rounded to a dtype, for an adapter of that ‖ΔW‖ (`norm`)."""

    modules: int
    norm: float
    choices: tuple[FrontierPoint, ...]


@steady_arithmetic()
def frontier(
    adapter: Adapter | str | Path,
    *,
    dtype: str | None = None,
    base: str | Path | BaseCheckpoint | None = None,
    assume: Assumptions | None = None,
    device: str = "cpu",
) -> FrontierReport:
    """The size and error of an adapter at ranks from 1 to the largest that any module has. All figures are in the spectra;
    nothing is written. Raises `LoratoolError`."""
    adapter = open_source(adapter, assume=assume)
    devices = open_devices(device, factor_workload([adapter]), doubles=True)
    work = Approximation(adapter, torch_dtype(dtype), keeps_its_rank, open_base(base), devices=devices)
    kept, said = read_unchanged(adapter, work.kept), _history("resize", adapter)
    spectra = work.offers(dict.fromkeys(work.numbers, Rule()))
    # The allocator asks for spectra again as it goes, and gets those that are known in full; its budget sets no bound here,
    # since `within_bytes` is told the bytes.
    market = RankAllocator(work.numbers, lambda rules: {number: spectra[number] for number in rules}, Budget(nbytes=1))
    total = math.sqrt(market.total)

    def size(ranks: Mapping[int, int]) -> int:
        """The bytes of an output whose modules have these ranks."""
        return contents_size(_contents(said, work, work.placeholders(ranks), kept))

    def choice(rank: int) -> FrontierPoint:
        """One rank for all modules, as far as they have so much, against a budget of the same bytes."""
        ranks = {number: min(rank, _effective(offer)) for number, offer in spectra.items()}
        left = {number: _missing_at(spectra[number], rank) for number, rank in ranks.items()}
        nbytes = size(ranks)
        spent = market.within_bytes(nbytes, size)
        shared = math.hypot(*(_missing_at(offer, spent.get(number, 0)) for number, offer in spectra.items()))
        worst = max(left[number] / math.sqrt(offer.total) for number, offer in spectra.items() if offer.total)
        return FrontierPoint(rank, nbytes, math.hypot(*left.values()) / total, worst, shared / total)

    largest = max(map(_effective, spectra.values()), default=0)
    ranks = [rank for rank in LADDER if rank < largest] + [largest] if total else []
    return FrontierReport(len(spectra), total, tuple(map(choice, ranks)), warnings=adapter.warnings)


def _effective(offer: RankCandidate) -> int:
    """How many singular values of a module are above the noise of float32 arithmetic."""
    return int((offer.sigma > NUMERICAL * offer.sigma[:1]).sum())


def _missing_at(offer: RankCandidate, rank: int) -> float:
    """‖ΔW − LoRA‖ of a module at `rank`: the norm of the singular values that are left out."""
    return float(offer.sigma[rank:].norm())
