"""`check --fix`: an adapter that a program takes as it is meant, and what making it took."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from loratool.adapter.adapter import Adapter, Change, inputs_of
from loratool.adapter.approximate import ApproximatedModule, approximate_adapter, error_of
from loratool.adapter.load import open_source
from loratool.adapter.spell import has_lora
from loratool.adapter.write import write_adapter
from loratool.base.base import BaseCheckpoint, open_base
from loratool.deltas.base import Delta, scale_or_one
from loratool.errors import LoratoolError, error_in_file
from loratool.files.history import history_entry, input_record
from loratool.files.paths import path_of
from loratool.formats.consumers import OWN_SCALE, SHARED_SCALE, Consumer, consumer_named
from loratool.formats.peft_writer import without_saved
from loratool.formats.table import format_named
from loratool.keys.resolve import Hints, resolve_routes
from loratool.numbers.ranks import Rule
from loratool.numbers.settings import steady_arithmetic
from loratool.verbs.check.check import REFUSED, CheckReport, check_adapter, kind_of, norm_or_zero


@steady_arithmetic()
def fix(
    adapter: Adapter | str | Path,
    program: str,
    out: str | Path,
    *,
    base: str | Path | BaseCheckpoint | None = None,
    overwrite: bool = False,
) -> CheckReport:
    """Writes to `out` an adapter that `program` loads and takes as it is meant, and says what that took: other
    kinds become LoRA, what the program has no place for is left out and its norm reported, scales go into the factors, ranks
    are filled up.

    Raises `LoratoolError`, and writes nothing, where no such adapter can be made.
    """
    path = adapter.path if isinstance(adapter, Adapter) else adapter
    adapter = open_source(adapter)
    weights = open_base(base)
    layout = weights.layout if weights else None
    report = check_adapter(adapter, path, program, layout)
    # What no rewriting mends: another sort of model, an unknown architecture, the wrong base, too large a rank.
    final = [finding.what for finding in report.findings if finding.level == REFUSED and not finding.fixable]
    if final:
        raise LoratoolError(f"{path}: {final[0]}")
    consumer, done, lost = consumer_named(program), list[str](), 0.0
    # Three steps in this order: leave out what no LoRA can stand for, make LoRA of what else the program lacks, and only
    # then unify scales and ranks, since the new LoRAs have scales and ranks of their own.
    adapter, gone = _leave_out(adapter, consumer)
    if gone:
        lost = math.hypot(*map(norm_or_zero, gone))
        done.append(f"left out {len(gone)} changes of {_kinds(gone)}, with ‖ΔW‖ = {lost:.4g}")
    odd = [change for change in adapter.changes if kind_of(change) not in consumer.kinds]
    converted: list[ApproximatedModule] = []
    if odd:
        # Rule() keeps every singular value above float32's noise, so that only rounding is lost.
        adapter, converted = approximate_adapter(adapter, Rule(), base=weights)
        done.append(f"made LoRA of {_kinds(odd)}")
    adapter, words = _unify_scales(adapter, consumer)
    done += words
    error = error_of(converted)
    with error_in_file(path):
        form = format_named(consumer.writes)
        _, routes = resolve_routes([adapter.keys], form, Hints(None, None, layout))
        said = history_entry(
            "check --fix", [input_record(adapter.path, adapter.file)], adapter.metadata, target=program, error=error
        )
        adapter = replace(adapter, metadata={**adapter.metadata, **said})
        out = path_of(out)
        written = write_adapter(adapter, form, routes, out, inputs=inputs_of([adapter], weights), overwrite=overwrite)
    return replace(
        report, out=str(out), done=(f"spelled it as {form.title}", *done), error=error, lost=lost, nbytes=written.nbytes
    )


def _leave_out(adapter: Adapter, consumer: Consumer) -> tuple[Adapter, list[Change]]:
    """The adapter without the changes that the program has no place for and no LoRA can stand for, and those changes.

    Raises `LoratoolError` where nothing else is left.
    """
    gone = [
        change
        for change in adapter.changes
        if not has_lora(change.parameter, change.delta) and kind_of(change) not in consumer.kinds
    ]
    kept = tuple(change for change in adapter.changes if change not in gone)
    if not kept:
        raise LoratoolError(f"{adapter.path}: nothing of it has a place in {consumer.title}")
    # A loader would look for modules_to_save and biases that the config still names.
    return (replace(adapter, changes=kept, config=without_saved(adapter.config)) if gone else adapter), gone


def _unify_scales(adapter: Adapter, consumer: Consumer) -> tuple[Adapter, list[str]]:
    """The adapter with ranks and scales as the program reads them (one scale, and one rank where the program divides by each
    module's own), and what was done, in words."""
    factored = [change.delta for change in adapter.changes if change.delta.rank is not None]
    ranks, scales = {delta.rank or 0 for delta in factored}, {scale_or_one(delta.scale) for delta in factored}
    most, done = max(ranks, default=0), list[str]()
    # Beyond vLLM's usual rank the next step is allotted anyway; below, filling up would only cost bytes.
    rank = next((step for step in consumer.ranks if step >= most > consumer.usual_rank), most)
    # A program with one alpha for all modules can hold one scale only; 1 is the one that every module can have.
    if consumer.scale != OWN_SCALE and len(scales) > 1:
        done.append("folded alpha into the factors")
        adapter = _each(adapter, lambda delta: delta.folded().scaled(1.0))
    # llama.cpp divides that alpha by each module's rank: only equal ranks give equal scales. Zeros change no ΔW.
    if ranks != {rank} and (consumer.scale == SHARED_SCALE or rank > most):
        done.append(f"filled ranks up to {rank}")
        adapter = _each(adapter, lambda delta: delta.padded(rank))
    return adapter, done


def _each(adapter: Adapter, made: Callable[[Delta], Delta]) -> Adapter:
    """The adapter with `made` of every pair of factors, and of those of stacked experts, in its place."""
    changes = (
        replace(change, delta=made(change.delta)) if change.delta.rank is not None else change for change in adapter.changes
    )
    return replace(adapter, changes=tuple(changes))


def _kinds(changes: Sequence[Change]) -> str:
    return ", ".join(sorted({kind_of(change) for change in changes}))
