"""`check`: whether an adapter loads in a program and does there what it does here, and what would help if not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.adapter.adapter import Adapter, Change, require_unchanged
from loratool.adapter.load import load_listing
from loratool.adapter.spell import has_lora
from loratool.deltas.base import scale_or_one
from loratool.deltas.relations import norm_of
from loratool.errors import LoratoolError, first_few
from loratool.files.layout import Layout, open_layout
from loratool.files.paths import path_of
from loratool.formats.consumers import GLOBAL_SCALE, SHARED_SCALE, Consumer, consumer_kind, consumer_named
from loratool.formats.peft import PeftConfig
from loratool.formats.table import format_named
from loratool.keys.detect import is_language_model
from loratool.keys.identify import archs_of_adapters, format_of
from loratool.keys.listing import read_listing
from loratool.numbers.settings import steady_arithmetic
from loratool.verbs.merge.plan import MergeInput, make_plan
from loratool.verbs.reports import Report

REFUSED: Final = "refused"
"""The program does not load the adapter, or not all of it."""
DIFFERENT: Final = "different"
"""The adapter loads, and does something else than it is meant to."""
COSTLY: Final = "costly"
"""The adapter loads and does the same, at a price such as memory."""
NOTE: Final = "note"
"""What the user has to know to load the adapter; nothing is wrong with it."""

VERDICTS: Final = {
    REFUSED: "does not load",
    DIFFERENT: "loads, and is not the same",
    COSTLY: "loads, at a price",
}
"""The verdict that each level of finding leads to, the gravest first: the first level found decides."""
SAME: Final = "loads, and is the same"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a program makes of an adapter: its `level`, `what` it is, the `way` out, whether `fix` goes that way
    (`fixable`), and the names of the modules concerned. `lost` is ‖ΔW‖ of what a fix leaves out."""

    level: str
    what: str
    way: str
    fixable: bool = True
    modules: tuple[str, ...] = ()
    lost: float = 0.0


@dataclass(frozen=True, slots=True)
class CheckReport(Report):
    """What a program makes of an adapter, by the program's source files (`source`); after a fix also what was `done`, its
    relative `error`, ‖ΔW‖ of what was left out (`lost`), and the bytes written.

    `good` says that the adapter loads as it is, does the same, and costs nothing; `verdict` says so in words.
    """

    path: str
    target: str
    source: str
    verdict: str
    good: bool
    findings: tuple[Finding, ...]
    out: str | None = None
    done: tuple[str, ...] = ()
    error: float = 0.0
    lost: float = 0.0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class CheckContext:
    """An adapter, the program that is to load it, and the layout of its base where one is given: what a rule looks at."""

    adapter: Adapter
    consumer: Consumer
    base: Layout | None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.adapter.config

    @property
    def language(self) -> bool:
        return is_language_model([change.module for change in self.adapter.changes])

    def loras(self) -> Iterator[tuple[Change, int, float]]:
        """Each change that is a pair of factors, or one for each expert, with its rank and its scale."""
        for change in self.adapter.changes:
            if change.delta.rank is not None:
                yield change, change.delta.rank or 0, scale_or_one(change.delta.scale)


def check(adapter: Adapter | str | Path, program: str, *, base: str | Path | None = None) -> CheckReport:
    """Says what `program` (see `CONSUMERS`) makes of an adapter, by rules read from the program's source; with
    `base`, also whether that model has all of the adapter's modules. Raises `LoratoolError` where the adapter cannot be
    read."""
    path = adapter.path if isinstance(adapter, Adapter) else adapter
    if not isinstance(adapter, Adapter):
        found = read_listing(path_of(adapter))
        if (config := found.configs.get("")) and config.refusal:
            return _report(path, consumer_named(program), tuple(_unread_config(config, consumer_named(program))), ())
        adapter = load_listing(found)
    report = check_adapter(adapter, path, program, open_layout(path_of(base)) if base else None)
    # Rules look at tensors long after the header was read: a file replaced meanwhile makes the report worthless.
    require_unchanged([adapter])
    return report


@steady_arithmetic()
def check_adapter(adapter: Adapter, path: str | Path, program: str, base: Layout | None) -> CheckReport:
    """`check` of an adapter that is loaded already."""
    context = CheckContext(adapter, consumer_named(program), base)
    # An adapter for another sort of model breaks every other rule too, and none of those findings would help.
    findings = tuple(_unlike_model(context)) or tuple(finding for rule in _RULES for finding in rule(context))
    return _report(path, context.consumer, findings, context.adapter.warnings)


def _report(path: str | Path, consumer: Consumer, findings: tuple[Finding, ...], warnings: tuple[str, ...]) -> CheckReport:
    """The report of what was found, with the verdict that follows from it."""
    levels = {finding.level for finding in findings}
    return CheckReport(
        path=str(path),
        target=consumer.title,
        source=consumer.source,
        verdict=next((words for level, words in VERDICTS.items() if level in levels), SAME),
        good=levels <= {NOTE},
        findings=findings,
        warnings=warnings,
    )


def _unread_config(config: PeftConfig, consumer: Consumer) -> Iterator[Finding]:
    """Findings on an adapter that is not computed here: PEFT reads all that it writes, and others read its LoRA alone."""
    if consumer.name == "peft":
        yield Finding(NOTE, f"is not looked into: {config.refusal}", "load it with PEFT itself", False)
    elif not config.is_lora:
        yield Finding(REFUSED, f"has peft_type {config.kind}; {consumer.title} loads LoRA alone", config.refusal, False)
    else:
        yield Finding(REFUSED, config.refusal, "load it with PEFT", False)


def norm_or_zero(change: Change) -> float:
    """‖ΔW‖ of a change, or 0 where that depends on the weight or replaces it."""
    return norm_of(change.delta) if change.delta.additive else 0.0


def kind_of(change: Change) -> str:
    """The kind of a change, as the rows of `CONSUMERS` name it."""
    delta = change.delta
    return consumer_kind(delta.kind, change.parameter, len(delta.shape), shares_scale=delta.shares_scale)


def _unlike_model(context: CheckContext) -> Iterator[Finding]:
    # None: the program (PEFT) loads adapters of every sort of model.
    wants = context.consumer.language
    if wants is not None and wants != context.language:
        what, other = ("an image model", "language models") if wants else ("a language model", "image and video models")
        yield Finding(
            REFUSED, f"is for {what}; {context.consumer.title} loads adapters of {other}", "use another program", False
        )


def _other_format(context: CheckContext) -> Iterator[Finding]:
    try:
        # Keys that are in no one format are a finding here, not an error.
        own = format_of(context.adapter.keys).name
    except LoratoolError:
        own = ""
    if own not in context.consumer.reads:
        called = f"is in {format_named(own).title}'s format" if own else "is in no one format"
        what = f"{called}, which {context.consumer.title} does not read"
        yield Finding(REFUSED, what, f"`convert(to={context.consumer.writes!r})`")
    elif context.consumer.unread and (names := context.consumer.unread.get(own)):
        # diffusers converts kohya's names by one function per architecture, and has none for some (unread).
        mine = [arch.title for arch in archs_of_adapters([context.adapter.keys]) if arch.name in names.split()]
        if mine:
            what = f"is in {format_named(own).title}'s format, which {context.consumer.title} does not read for {mine[0]}"
            yield Finding(REFUSED, what, f"`convert(to={context.consumer.writes!r})`")


def _other_arch(context: CheckContext) -> Iterator[Finding]:
    found = archs_of_adapters([context.adapter.keys])
    if context.consumer.archs and found and not any(arch.name in context.consumer.archs for arch in found):
        what = f"is for {found[0].title}, which {context.consumer.title} does not know"
        yield Finding(REFUSED, what, "use another program", False)


def _other_kinds(context: CheckContext) -> Iterator[Finding]:
    by_kind: dict[str, list[Change]] = {}
    for change in context.adapter.changes:
        if kind_of(change) not in context.consumer.kinds:
            by_kind.setdefault(kind_of(change), []).append(change)
    # The row's kinds are those of PEFT's LoRA; a config of another peft_type has PEFT load its own tuner (LoHa, OFT …).
    own_tuner = context.consumer.name == "peft" and context.config.get("peft_type") not in (None, "LORA")
    for kind, changes in by_kind.items():
        if own_tuner:
            continue
        names = tuple(str(change) for change in changes)
        # One change stands for all of its kind: whether a LoRA can take its place depends on the kind and the parameter.
        if changes[0].delta.stacked:
            # Neither left out nor made LoRA of: a stack has no LoRA, and is the most of what was trained.
            what = f"has LoRA on {len(changes)} stacks of experts, which {context.consumer.title} does not have"
            yield Finding(REFUSED, what, "merge it into its base", False, names)
            continue
        gone = not has_lora(changes[0].parameter, changes[0].delta)
        lost = math.hypot(*map(norm_or_zero, changes)) if gone else 0.0
        title = WORDS.get(kind, kind)
        if gone:
            way = "leave it out"
        elif all(change.delta.additive for change in changes):
            way = f"make LoRA of it: `convert(to={context.consumer.writes!r}, rule=Rule())`"
        else:
            way = f"make LoRA of it: `convert(to={context.consumer.writes!r}, rule=Rule(), base=BASE)`"
        yield Finding(REFUSED, f"has {title}, which {context.consumer.title} does not have", way, True, names, lost)


def _other_scales(context: CheckContext) -> Iterator[Finding]:
    """Finds modules whose scale in the program, by the program's own formula, is not the adapter's."""
    if context.consumer.scale not in (GLOBAL_SCALE, SHARED_SCALE) or not context.config:
        return
    config = PeftConfig.parse(context.config, str(context.adapter.path))
    # Both programs read lora_alpha of the config alone, and no alpha_pattern. Of rsLoRA's root only vLLM knows
    # (peft_helper.py), and a zero alpha means scale 1 to llama.cpp alone (llama-adapter.h).
    alpha, rank = config.alpha or 0.0, config.rank or 1
    rooted = context.consumer.scale == GLOBAL_SCALE and config.rslora
    wrong: list[str] = []
    worst = 1.0
    for change, own, scale in context.loras():
        per = math.sqrt(rank) if rooted else rank if context.consumer.scale == GLOBAL_SCALE else own
        theirs = alpha / per if alpha or context.consumer.scale == GLOBAL_SCALE else 1.0
        if not math.isclose(theirs, scale, rel_tol=1e-6):
            wrong.append(str(change))
            # Both quotients, since half the strength is as wrong as twice the strength.
            worst = max(worst, theirs / scale if scale else math.inf, scale / theirs if theirs else math.inf, key=abs)
    if wrong:
        strength = f"{len(wrong)} modules act at another strength, {worst:.3g} times at worst"
        what = f"{context.consumer.title} takes {context.consumer.scale}: {strength}"
        yield Finding(DIFFERENT, what, "fold alpha into the factors, and give all one rank", True, tuple(wrong))


def _unread_metadata(context: CheckContext) -> Iterator[Finding]:
    # diffusers keeps alphas in this entry; who ignores it takes a file without alpha tensors at scale 1.
    if context.consumer.ignores_metadata and "lora_adapter_metadata" in context.adapter.metadata:
        wrong = [str(change) for change, _, scale in context.loras() if scale != 1.0]
        if wrong:
            what = f"{context.consumer.title} does not read alphas from metadata: {len(wrong)} modules act at strength 1"
            yield Finding(DIFFERENT, what, f"`convert(to={context.consumer.writes!r})`", True, tuple(wrong))


def _ranks(context: CheckContext) -> Iterator[Finding]:
    ranks = {rank for _, rank, _ in context.loras()}
    if not context.consumer.ranks or not ranks:
        return
    largest = max(ranks)
    if largest > context.consumer.ranks[-1]:
        what = f"has rank {largest}; {context.consumer.title} takes {context.consumer.ranks[-1]} at most"
        yield Finding(REFUSED, what, f"`resize(rule=Rule('rank', {context.consumer.ranks[-1]}))`", False)
        return
    # --max-lora-rank takes vLLM's steps only, and memory is allotted for all of a step: what is above the rank is wasted.
    step = next(step for step in context.consumer.ranks if step >= largest)
    if largest != step and largest > context.consumer.usual_rank:
        what = f"has rank {largest}, none that --max-lora-rank takes: memory for {step} is allotted"
        yield Finding(
            COSTLY,
            what,
            f"fill it up to {step}: `resize(rule=Rule('rank', {largest}, steps=CONSUMERS['vllm'].ranks, pad=True))`",
        )
    if step > context.consumer.usual_rank:
        what = f"needs --max-lora-rank {step}; without it ranks end at {context.consumer.usual_rank}"
        yield Finding(NOTE, what, f"start {context.consumer.title} with --max-lora-rank {step}", False)


def _unlike_base(context: CheckContext) -> Iterator[Finding]:
    if context.base is None:
        return
    try:
        # The plan of a merge looks for the same targets, and computes nothing.
        plan = make_plan(context.base, [MergeInput(context.adapter)], allow_unmatched=True)
    except LoratoolError as error:
        yield Finding(REFUSED, str(error), "use the base that it was made for", False)
        return
    if plan.unmatched:
        what = f"{len(plan.unmatched)} modules have no place in {context.base.root}: {first_few(plan.unmatched, 3)}"
        yield Finding(DIFFERENT, what, "use the base that it was made for", False, plan.unmatched)


_RULES: Final[tuple[Callable[[CheckContext], Iterator[Finding]], ...]] = (
    _other_arch, _other_format, _other_kinds, _other_scales, _unread_metadata, _ranks, _unlike_base,
)  # fmt: skip
"""The rules for every adapter that is of the program's sort of model; their order is that of the findings."""
WORDS: Final = {
    "full": "full differences", "replace": "whole weights (modules_to_save)", "lora bias": "biases (lora_bias)",
    "tokens": "trained tokens", "dora": "DoRA", "bias": "biases", "norm": "norms",
}  # fmt: skip
"""What people call a kind, where its own name says too little."""
