"""`extract`: the best low-rank adapter of W' − W₀, with its error measured and everything that is left out reported."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, get_args

from loratool._version import __version__
from loratool.adapter.selection import Selection
from loratool.adapter.write import require_folder_name, write_adapter
from loratool.archs import ARCHS, Arch
from loratool.base.base import BaseCheckpoint
from loratool.base.difference import difference_workload
from loratool.base.pairs import Pair, Pairing, pair_parameters
from loratool.deltas.schema import WEIGHT
from loratool.errors import LoratoolError, OutputError, ShapeMismatch, error_in_file, first_few, look_up
from loratool.files.layout import require_weights
from loratool.files.output import require_target
from loratool.files.paths import path_of
from loratool.files.tensors import torch_dtype
from loratool.formats.table import Format, format_named
from loratool.keys.resolve import archs_of_base, resolve_base_routes
from loratool.keys.routes import arch_without_table
from loratool.names import CONTAINER, VAE, Module
from loratool.numbers.device_choice import open_devices
from loratool.numbers.factor import Split
from loratool.numbers.ranks import Budget, Rule
from loratool.numbers.settings import steady_arithmetic
from loratool.numbers.threads import Progress
from loratool.verbs.extract.assemble import ExtractItem, assemble_changes
from loratool.verbs.extract.forms import EXPERTS, LORA, form_of, no_place
from loratool.verbs.extract.job import ExtractRun
from loratool.verbs.extract.journal import Journal
from loratool.verbs.extract.outcomes import ExtractedModule, Extraction, Outcome
from loratool.verbs.reports import Stopwatch, TimedReport, worst_of

DIFFERENCES: Final = ("diff", "diff_b", "w_norm", "b_norm")
"""Leaves of differences that are stored whole, which diffusers refuses and some other programs ignore."""
SIDEWAYS: Final = ("gpt_oss", "llama4", "llama4_text")
"""Models whose stacked experts are stored as (experts, in, out), which PEFT knows by their classes (is_transposed)."""
_QUANTISED: Final = "a difference to it is that of the quantisation; extract from the 16-bit originals"


@dataclass(frozen=True, slots=True)
class OmittedChange:
    """A change that the output does not hold: the reason, the parameter's ‖W' − W₀‖, and its share of the sum of squares
    over all parameters."""

    name: str
    why: str
    norm: float
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class ExtractReport(TimedReport):
    """What an extraction found: every parameter that changed and how the output holds the change, what is left out, and how
    many parameters did not change.

    `norm` is ‖W' − W₀‖ over all that was compared, and `error` the relative error of the output, which counts a change that
    is left out as wholly lost. With `dry_run`, `modules` are those that would be extracted if they changed, and `nbytes` is
    the largest size that the output may have (0: the rule tells no rank before it sees a spectrum).
    """

    out: str
    format: str
    arch: str
    modules: tuple[ExtractedModule, ...]
    left_out: tuple[OmittedChange, ...]
    unchanged: int
    excluded: int
    norm: float
    error: float
    nbytes: int
    dry_run: bool

    @property
    def worst(self) -> ExtractedModule | None:
        """The module with the largest relative error."""
        return worst_of(self.modules)


@steady_arithmetic()
def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    rule: Rule | Budget,
    *,
    to: str | None = None,
    arch: str | None = None,
    dtype: str | None = None,
    split: Split = "even",
    clamp: float | None = None,
    selection: Selection | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Writes to `out` the adapter that makes the checkpoint `tuned` of `base`, as well as the adapter's rank allows.

    Each checkpoint is a safetensors file, a folder of Hugging Face or one of diffusers; the names in both may differ by a
    prefix, or be those of one architecture in two namings. Differences are taken in float32. The best approximation at each
    rank is found by `krylov.truncated_svd`; `rule` says the rank of each module, or shares a budget over all. `to` is a
    format's name, `arch` names the base's architecture where the base's names fit several, `dtype` is that of the factors
    (None: as the tuned weights), `split` the side of the singular values, and `clamp` a quantile that kohya's tools cut at.
    `resume` goes on where an earlier run of the same settings was cut off.

    Raises `LoratoolError` and leaves nothing behind where the checkpoints are not of the same model, a number is not finite,
    nothing changed, or the output cannot be written.
    """
    stopwatch, out, selection = Stopwatch(), path_of(out), selection or Selection()
    stored = torch_dtype(dtype)
    look_up(dict.fromkeys(get_args(Split)), split, "split")
    if clamp is not None and not 0 < clamp <= 1:
        raise LoratoolError(f"`clamp={clamp:g}`: expected a quantile above 0, at most 1")
    weights = BaseCheckpoint(path_of(base)), BaseCheckpoint(path_of(tuned))
    for each in weights:
        require_weights(each.layout, _QUANTISED)
    pairing = pair_parameters(*weights, selection.takes)
    devices = open_devices(device, difference_workload(*weights, pairing.pairs))
    work = Extraction(*weights, devices, stored, split, clamp)
    job = replace(_plan_run(work, pairing.pairs, out, rule, to, arch, overwrite=overwrite), progress=progress)
    if dry_run:
        return _dry_run_report(job, pairing, out)
    settings = {"to": to, "arch": arch, "dtype": dtype, "split": split, "clamp": clamp, "selection": asdict(selection)}
    journal = Journal(out, _journal_key(job, {**settings, "device": device})) if resume else None
    job = replace(job, journal=journal)
    try:
        with error_in_file(weights[1].layout.root):
            report = _run_and_write(job, pairing, out, overwrite=overwrite)
    except LoratoolError as error:
        # An input that is wrong stays wrong, and its journal is of no use; a full disk may have room the next time.
        if journal and not isinstance(error, OutputError):
            journal.discard()
        raise
    if journal:
        journal.discard()
    return stopwatch.stop(report)


def _run_and_write(job: ExtractRun, pairing: Pairing, out: Path, *, overwrite: bool) -> ExtractReport:
    """Computes all outcomes, writes the adapter that they make, and reports; raises `LoratoolError` where there is none."""
    outcomes = job.run()
    changes, lost = assemble_changes(job.items, outcomes, job.work)
    # Before anything is written: where nothing can be, the error quotes what the report says.
    report = _report(job, pairing, out, outcomes, lost)
    inputs = job.work.base.layout, job.work.tuned.layout
    if not changes:
        raise LoratoolError(_nothing(report, *(each.root for each in inputs)))
    adapter = job.adapter(changes, outcomes, lost)
    written = write_adapter(adapter, job.target, job.routes, out, inputs=inputs, overwrite=overwrite)
    return replace(report, nbytes=written.nbytes)


def _journal_key(job: ExtractRun, settings: Mapping[str, object]) -> str:
    """All that outcomes depend on: the files, the rule and the settings."""
    # A file's identity (device, inode, size, time of change) costs no second reading of both checkpoints, as a hash would.
    files = [
        [str(header.path), header.identity]
        for weights in (job.work.base, job.work.tuned)
        for header in weights.layout.files.values()
    ]
    document = {"version": __version__, "files": files, "rule": asdict(job.rule), "settings": settings}
    return json.dumps(document, default=str)


def _plan_run(
    work: Extraction,
    pairs: Sequence[Pair],
    out: Path,
    rule: Rule | Budget,
    to: str | None,
    arch: str | None,
    *,
    overwrite: bool,
) -> ExtractRun:
    """The run as it is planned, with everything checked that can be checked before a tensor is read."""
    base, tuned = work.base, work.tuned
    # No format of adapters has a place for a VAE: its changes are reported as left out, and need no route.
    modules = list(dict.fromkeys(pair.module for pair in pairs if pair.module.component != VAE))
    found = archs_of_base(base.layout, modules, arch)
    target = format_named(to or _usual(found[0], base))
    if target.whole == CONTAINER and base.layout.config.get("architectures") and not arch:
        # PEFT uses transformers' own names. A CLIP alone fits the tables of several models, which name it differently.
        found = [
            arch_without_table(
                modules, found[0].name, found[0].title if len(found) == 1 else f"the model in {base.layout.root.name}"
            )
        ]
    require_folder_name(target, out)
    inputs = [base.layout, tuned.layout]
    require_target(out, folder=target.folder, overwrite=overwrite, inputs=inputs)
    model, routes, reasons = resolve_base_routes(modules, found, target)
    # A bias beside one of these weights is a layer's, and any other bias is a norm's: formats have a leaf for each.
    matrices = {pair.module.stem for pair in pairs if len(pair.shape) > 1 and pair.parameter == WEIGHT and not pair.raw}
    items = tuple(_item(base, pair, target, matrices, reasons) for pair in pairs)
    _require_alike(items, (base, tuned))
    return ExtractRun(work, items, rule, model, target, routes)


def _usual(arch: Arch, base: BaseCheckpoint) -> str:
    """The name of the format that a model's users expect: PEFT for models that transformers saved or that have no table,
    kohya for image models in one file, diffusers for those in a folder."""
    if arch not in ARCHS or base.layout.config.get("architectures"):
        return "peft"
    return "diffusers" if base.layout.is_folder else "kohya"


def _item(
    base: BaseCheckpoint, pair: Pair, target: Format, matrices: Container[str], reasons: Mapping[Module, str]
) -> ExtractItem:
    """The item of one pair: the form in which `target` holds the change, or the reason why it cannot."""
    form, what = form_of(pair, target, matrices)
    if form == EXPERTS and base.layout.config.get("model_type") in SIDEWAYS:
        return ExtractItem(
            pair, None, "PEFT takes its stacked experts to be stored as (in, out), which is not looked into here"
        )
    if form is None or pair.module.component == VAE:
        return ExtractItem(pair, None, no_place(pair, target, what))
    return ExtractItem(pair, None, reasons[pair.module]) if pair.module in reasons else ExtractItem(pair, form)


def _require_alike(items: Sequence[ExtractItem], weights: tuple[BaseCheckpoint, BaseCheckpoint]) -> None:
    """Raises `ShapeMismatch` for parameters of unlike shapes, except for vocabularies of unlike length."""
    # More or fewer rows alone are another vocabulary, which is saved whole; a LoRA cannot change the shape of a weight.
    unlike = [
        f"{pair} is {list(pair.shape)} in {weights[0].layout.root} and {list(pair.tuned_shape)} in {weights[1].layout.root}"
        for item in items
        if (pair := item.pair).shape != pair.tuned_shape and (pair.shape[1:] != pair.tuned_shape[1:] or item.form == LORA)
    ]
    if unlike:
        raise ShapeMismatch(
            f"{first_few(unlike, 3)}; both must be the same model, or leave these out with `Selection(exclude=)`"
        )


def _report(
    job: ExtractRun, pairing: Pairing, out: Path, outcomes: Mapping[int, Outcome], lost: Mapping[int, str]
) -> ExtractReport:
    """The report of `outcomes`, of which `lost` has the reason for each that is left out; the output's size is not in it."""
    squares = {number: outcome.figures.norm**2 for number, outcome in outcomes.items()}
    whole = math.fsum(squares.values())
    held = [outcome.figures for number, outcome in outcomes.items() if number not in lost]
    # Errors of different parameters add up as squares: those measured on what is held, and the whole of what is left out.
    missing = math.fsum((figures.error * figures.norm) ** 2 for figures in held) + math.fsum(
        squares[number] for number in lost
    )
    left_out = [
        OmittedChange(
            str(job.items[number].pair), why, outcomes[number].figures.norm, squares[number] / whole if whole else 0.0
        )
        for number, why in lost.items()
    ]
    return ExtractReport(
        out=str(out),
        format=job.target.title,
        arch=job.arch.title,
        modules=tuple(held),
        left_out=tuple(sorted(left_out, key=lambda item: -item.norm)),
        unchanged=len(job.items) - len(outcomes),
        excluded=len(pairing.excluded),
        norm=math.sqrt(whole),
        error=math.sqrt(missing / whole) if whole else 0.0,
        nbytes=0,
        device=job.work.devices.title,
        device_reason=job.work.devices.why,
        dry_run=False,
        warnings=(*pairing.warnings, *_read_by_few(held), *job.work.devices.warnings()),
    )


def _read_by_few(held: Sequence[ExtractedModule]) -> Iterator[str]:
    """A warning where biases and norms are held as differences, which few programs read."""
    count = sum(figures.held in DIFFERENCES for figures in held)
    if count:
        yield (
            f"{count} biases and norms are held as differences (diff_b, w_norm), which ComfyUI, A1111 and LyCORIS read; "
            "diffusers refuses the file, others ignore them: `Selection(exclude=('*.bias', '*norm*'))` leaves them out"
        )


def _dry_run_report(job: ExtractRun, pairing: Pairing, out: Path) -> ExtractReport:
    """The report of an extraction in which every parameter changed, from the headers alone."""
    outcomes = {number: job.placeholder(number, _rank(job, item)) for number, item in enumerate(job.items)}
    lost = {number: item.why for number, item in enumerate(job.items) if not item.form}
    # Rules that look at a spectrum give no rank yet, and without every rank there is no size.
    known = all(outcome.delta for number, outcome in outcomes.items() if number not in lost)
    report = _report(job, pairing, out, outcomes, lost)
    return replace(report, nbytes=job.size(outcomes, {}) if known else 0, dry_run=True)


def _rank(job: ExtractRun, item: ExtractItem) -> int:
    """The rank that an item will have, where the rule gives one before it sees a spectrum; else 0."""
    rule = job.rule.of(item.pair.shape) if isinstance(job.rule, Rule) else None
    return int(rule.value) if rule and rule.method == "rank" else 0


def _nothing(report: ExtractReport, base: Path, tuned: Path) -> str:
    """The message where there is nothing to write: nothing differs, or why nothing that differs can be held."""
    if not report.left_out:
        return f"{tuned}: nothing differs from {base} in the {report.unchanged} parameters that were compared"
    reasons: dict[str, list[str]] = {}
    for left in report.left_out:
        reasons.setdefault(left.why, []).append(left.name)
    why = "; ".join(f"{first_few(names, 2)}: {why}" for why, names in reasons.items())
    return f"{tuned}: differs from {base}, but nothing of it can be written as {report.format}: {why}"
