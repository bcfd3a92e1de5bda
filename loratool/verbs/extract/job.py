"""One extraction as a job: everything settled before a tensor is read, then run by a rule or within a budget."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from loratool.adapter.adapter import Adapter, Change
from loratool.adapter.approximate import placeholder_lora
from loratool.adapter.write import new_metadata, size_in_format
from loratool.archs import Arch
from loratool.deltas.base import Delta
from loratool.deltas.full import Full, Replace
from loratool.errors import Unsupported
from loratool.files.history import history_entry
from loratool.formats.peft_writer import base_facts
from loratool.formats.table import Format
from loratool.keys.routes import Route
from loratool.names import Module
from loratool.numbers.budgets import RankAllocator, within_error
from loratool.numbers.ranks import Budget, RankCandidate, Rule
from loratool.numbers.threads import Progress, progress_counter, run_all
from loratool.verbs.extract.assemble import ExtractItem, assemble_changes
from loratool.verbs.extract.forms import BESIDE_LORA, EXPERTS, LORA, REPLACED
from loratool.verbs.extract.journal import Journal
from loratool.verbs.extract.outcomes import ExtractedModule, Extraction, Outcome, Task

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ExtractRun:
    """Every item with its form, the rule or the budget, and the route of each module to the format."""

    work: Extraction
    items: tuple[ExtractItem, ...]
    rule: Rule | Budget
    arch: Arch
    target: Format
    routes: Mapping[Module, Route]
    progress: Progress | None = None
    journal: Journal | None = None

    def run(self) -> dict[int, Outcome]:
        """The outcome of every item that changed, by number; raises `LoratoolError`."""
        numbers = range(len(self.items))
        if isinstance(self.rule, Rule):
            return self._outcomes(dict.fromkeys(numbers, self.rule))
        if any(item.form == EXPERTS for item in self.items):
            raise Unsupported(
                "a budget cannot be shared with stacked experts; give `Rule('rank', ...)` or `Rule('max_error', ...)`, "
                "or leave them out with `Selection(exclude=)`"
            )
        # Within a budget, what has no rank comes first: whatever it takes is spent in any case. The allocator then looks at
        # the spectra of all matrices, which are factorised at the ranks that it settles on.
        others = self._outcomes({number: Rule() for number in numbers if self.items[number].form != LORA})
        market = RankAllocator([number for number in numbers if self.items[number].form == LORA], self._offers, self.rule)
        if self.rule.nbytes is not None:
            return others | self._at(market.within_bytes(self.rule.nbytes, partial(self.size, others)), market)
        return self._within_error(others, market, self.rule.error or 0.0)

    def size(self, others: Mapping[int, Outcome], ranks: Mapping[int, int]) -> int:
        """The bytes of an output that holds `others` and LoRA of these ranks."""
        outcomes = {**others, **{number: self.placeholder(number, rank) for number, rank in ranks.items()}}
        changes, lost = assemble_changes(self.items, outcomes, self.work)
        return size_in_format(self.adapter(changes, outcomes, lost), self.target, self.routes)

    def placeholder(self, number: int, rank: int) -> Outcome:
        """The outcome of an item before it is computed: a delta with sizes and no numbers, or none for a LoRA of rank 0."""
        pair, form = self.items[number].pair, self.items[number].form
        # One number, expanded to every shape below: sizes are counted from headers, and take no memory.
        nothing = torch.zeros(1, dtype=self.work.stored_as(pair))
        delta: Delta | None = None
        if form == LORA and rank:
            rank = min(rank, pair.shape[0], math.prod(pair.shape[1:]))
            delta = placeholder_lora(pair.shape, rank, nothing)
        elif form in REPLACED:
            delta = Replace(nothing.expand(pair.tuned_shape), form)
        elif form and form not in (LORA, EXPERTS):
            delta = Full(nothing.expand(pair.shape), form, 1.0 if form == BESIDE_LORA else None)
        return Outcome(delta, ExtractedModule(str(pair), form or "", rank if form == LORA else 0, 0.0, 0.0, 0.0, 0.0, None))

    def adapter(self, changes: Sequence[Change], outcomes: Mapping[int, Outcome], lost: Mapping[int, str]) -> Adapter:
        """The adapter to write, with its metadata, and with what PEFT's config says of the base."""
        layout = self.work.base.layout
        ranks = [outcome.figures.rank for number, outcome in outcomes.items() if number not in lost and outcome.figures.rank]
        metadata = self._provenance(outcomes, lost) | new_metadata(self.target, ranks)
        about = base_facts(layout.config, str(layout.root))
        return Adapter(layout.root, tuple(changes), metadata, config=about)

    def _within_error(self, others: Mapping[int, Outcome], market: RankAllocator, error: float) -> dict[int, Outcome]:
        """The outcomes of the fewest bytes whose total error is at most `error`, rounding included."""
        whole = market.total + math.fsum(outcome.figures.norm**2 for outcome in others.values())
        # The rest loses this much at any rank, and leaves so much less for the matrices.
        lost = _left(others)

        def spent(allowed: float) -> dict[int, Outcome]:
            return {**others, **self._at(market.within_error(max(allowed - lost, 0.0)), market)}

        return within_error(error, whole, spent, _left)

    def _at(self, ranks: Mapping[int, int], market: RankAllocator) -> dict[int, Outcome]:
        """The outcomes of all matrices at these ranks; a matrix that got none is only measured."""
        return self._outcomes({number: Rule("rank", ranks[number]) if number in ranks else None for number in market.offers})

    def _outcomes(self, rules: Mapping[int, Rule | None]) -> dict[int, Outcome]:
        """The outcomes by these rules, in the order of the items: from the journal where it has them, else computed."""
        kept = {number: self._kept_outcome(number, rule) for number, rule in rules.items()}
        rest = {number: rule for number, rule in rules.items() if kept[number] is None}

        # Called by the thread that computed the outcome, as soon as it has: an interruption loses only work under way.
        def done(number: int, outcome: Outcome) -> None:
            if self.journal:
                self.journal.put(_key(number, rules[number]), outcome)

        found = self._each(rest, self.work.outcomes, done)
        return dict(sorted({**{number: each for number, each in kept.items() if each}, **found}.items()))

    def _kept_outcome(self, number: int, rule: Rule | None) -> Outcome | None:
        """The outcome that an interrupted run left in the journal; None without one."""
        return self.journal.get(_key(number, rule)) if self.journal else None

    def _offers(self, rules: Mapping[int, Rule]) -> dict[int, RankCandidate]:
        """The spectra of items, each as far as its rule looks."""
        return self._each(rules, self.work.offers)

    def _each(
        self,
        rules: Mapping[int, Rule | None],
        compute: Callable[[Sequence[Task], torch.device], list[_T | None]],
        done: Callable[[int, _T], None] = lambda number, result: None,
    ) -> dict[int, _T]:
        """The results of `compute` by item, in the order of the items and without those that are None. Work begins with the
        largest items, and takes those of one shape together where the device gains by it."""
        found: dict[int, _T] = {}
        sizes = {number: self.work.nbytes(self.items[number].pair) for number in rules}
        batches = self._batches(rules)
        add = progress_counter(sum(sizes.values()), self.progress)

        def piece(numbers: Sequence[int]) -> list[_T | None]:
            tasks = [Task(self.items[number].pair, self.items[number].form, rules[number]) for number in numbers]
            results = self.work.devices.run_batch(str(tasks[0].pair), tasks, compute)
            for number, result in zip(numbers, results, strict=True):
                if result is not None:
                    done(number, result)
            return results

        # `run_all` calls this from one thread alone, so neither `found` nor the counter needs a lock.
        def count_batch(index: int, results: list[_T | None]) -> None:
            for number, result in zip(batches[index], results, strict=True):
                if result is not None:
                    found[number] = result
            add(sum(sizes[number] for number in batches[index]))

        pieces = (partial(piece, numbers) for numbers in batches)
        run_all(pieces, count_batch, threading.Event(), threads=self.work.devices.threads)
        return {number: found[number] for number in sorted(found)}

    def _batches(self, rules: Mapping[int, Rule | None]) -> list[list[int]]:
        """Numbers of items, the largest first, and those of one shape and rule together."""

        def size(number: int) -> int:
            return self.work.nbytes(self.items[number].pair)

        def alike(number: int) -> tuple[object, ...]:
            rule = rules[number]
            return size(number), self.items[number].pair.shape, self.items[number].form, rule and rule.expected_rank

        # The largest first, so that no thread begins the longest piece when the others end.
        ordered = sorted(rules, key=lambda number: -size(number))
        # Bytes of the difference, which is in float32.
        return self.work.devices.batches(ordered, alike, lambda number: 4 * math.prod(self.items[number].pair.shape))

    def _provenance(self, outcomes: Mapping[int, Outcome], lost: Mapping[int, str]) -> dict[str, str]:
        """A short account of the run for the metadata: without times or paths, so that equal runs write equal bytes, and
        with numbers of fixed width, so that its length is known before the numbers are."""
        held = {str(self.items[number].pair): outcome.figures for number, outcome in outcomes.items() if number not in lost}
        document = {
            "base": self.work.base.layout.root.name[:100],
            "tuned": self.work.tuned.layout.root.name[:100],
            "rule": dict(_rule(self.rule)),
            "columns": ["held", "rank", "norm", "error"],
            "modules": {
                name: f"{figures.held} {figures.rank} {figures.norm:.4e} {figures.error:.4e}"
                for name, figures in held.items()
            },
            "left_out": {str(self.items[number].pair): f"{outcomes[number].figures.norm:.4e}" for number in lost},
        }
        return history_entry("extract", (), {}, **document)


def _key(number: int, rule: Rule | None) -> str:
    """The journal's key of an outcome: of one item there is an outcome for each rule that was tried."""
    return f"{number}-{rule.method if rule else 'none'}-{rule.value if rule else 0:g}"


def _left(outcomes: Mapping[int, Outcome]) -> float:
    """The sum of squares that outcomes leave out."""
    return math.fsum((outcome.figures.error * outcome.figures.norm) ** 2 for outcome in outcomes.values())


def _rule(rule: Rule | Budget) -> Iterator[tuple[str, float]]:
    """The rule or the budget as the metadata names it."""
    if isinstance(rule, Rule):
        yield rule.method, rule.value
    elif rule.nbytes is not None:
        yield "size", rule.nbytes
    elif rule.error is not None:
        yield "total_error", rule.error
