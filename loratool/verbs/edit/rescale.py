"""An adapter at new strengths, module by module, in its file's own spelling: a number goes where the scale is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loratool.adapter.adapter import Adapter, Change, files_of
from loratool.adapter.load import LazyAdapter
from loratool.adapter.same_format import read_unchanged, rescale_metadata, with_targets_of
from loratool.adapter.verify import EXACT, delta_at, relative_difference
from loratool.deltas.base import Delta, scale_exactly
from loratool.errors import InvalidAdapter, NeedsBase, Unsupported, error_context, first_few
from loratool.files.adapter_writer import AdapterContents, write_contents
from loratool.files.history import history_entry, input_record
from loratool.formats.leaves import parse_key
from loratool.formats.peft_writer import with_scale
from loratool.names import CONTAINER, Module


def write_edited(
    adapter: Adapter, factors: Mapping[Module, float], out: Path, history: Mapping[str, Any], *, overwrite: bool
) -> int:
    """Writes `adapter` with each module's ΔW times its number in `factors`, modules at 0 left out, and returns the bytes;
    `history` is what the user asked for, which the metadata keeps.

    Raises `LoratoolError`, and writes nothing, where a kind has no exact multiple, or the written file does not hold the
    expected deltas.
    """
    kept = [change for change in adapter.changes if factors[change.module]]
    # What the file must hold is computed on the deltas, apart from how its tensors are changed below: one checks the other.
    expected = [(change, _scale_change(change, factors[change.module])) for change in kept]
    # Start from the file's own bytes, put each number where the scale is, then make config and metadata true again.
    tensors = read_unchanged(adapter, kept)
    config = dict(adapter.config) if adapter.config else None
    for change, factor in ((change, factors[change.module]) for change in kept):
        if factor != 1:
            with error_context(change):
                _apply(adapter, change, factor, tensors, config)
    # PEFT would make fresh factors for target_modules that the file no longer has.
    if config is not None and len(kept) < len(adapter.changes):
        _require_whole_wrappers(adapter, kept)
        config = with_targets_of(config, kept)
    metadata = rescale_metadata(adapter, kept, factors)
    metadata |= history_entry("edit", [input_record(adapter.path, adapter.file)], adapter.metadata, **history)
    contents = AdapterContents(tensors, metadata, config)

    def check(written: Path) -> None:
        with LazyAdapter(written) as again:
            _compare(expected, again)

    return write_contents(contents, files_of([adapter]), out, overwrite=overwrite, check=check)


def _require_whole_wrappers(adapter: Adapter, kept: Sequence[Change]) -> None:
    """Raises `Unsupported` where some stacked parameters of a module go and others stay: PEFT wraps them in each other, and
    the names of their tensors depend on how many there are."""
    parts: dict[str, set[bool]] = {}
    there = {change.module for change in kept if change.delta.stacked}
    for change in adapter.changes:
        if change.delta.stacked:
            parts.setdefault(change.module.path.rpartition(".")[0], set()).add(change.module in there)
    torn = [module for module, fates in parts.items() if len(fates) > 1]
    if torn:
        raise Unsupported(
            f"{first_few(torn)}: PEFT wraps stacked parameters of one module in each other; drop all of them or none"
        )


def _scale_change(change: Change, factor: float) -> Delta:
    """The delta of `factor` · ΔW; raises `NeedsBase` where a multiple is no delta of the same kind."""
    if factor == 1:
        return change.delta
    try:
        return change.delta.scaled(factor)
    except NeedsBase as error:
        raise NeedsBase(
            f"{change}: what a multiple of a delta of kind {change.delta.kind} is only its weight tells; "
            "`combine(base=BASE)` of it at that strength computes it"
        ) from error


def _apply(
    adapter: Adapter, change: Change, factor: float, tensors: dict[str, Tensor], config: dict[str, Any] | None
) -> None:
    """Puts `factor` where the change keeps its scale: an alpha tensor of its own, the config, or else its factors."""
    # An alpha of its own is tried first: changing it leaves the bytes of the factors alone.
    by_leaf = {found.leaf: key for key in change.keys if (found := parse_key(key))}
    alpha = by_leaf.get("alpha")
    # Where both sides of a LoKr are whole, alpha is ignored.
    if alpha is not None and alpha in adapter.alphas and change.delta.scale is not None:
        tensors[alpha] = scale_exactly(adapter.alphas[alpha], factor)
    elif config and config.get("peft_type") == "LORA" and change.delta.scaled_by_config:
        config |= _scale_config(change, factor, config)
    else:
        tensors |= _fold_scale(change, factor, by_leaf)


def _scale_config(change: Change, factor: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's config with the alpha of one module times `factor`; unchanged for a module's bias."""
    # A bias has no factors: PEFT gives it the scale of its module's, which the change of the weight sets.
    down = next((tensor for leaf, tensor in change.delta.leaves().items() if leaf.endswith("down")), None)
    if down is None or change.delta.scale is None:
        return dict(config)
    path = change.stem.removeprefix(CONTAINER)
    return with_scale(config, path, change.delta.rank or len(down), change.delta.scale * factor)


def _fold_scale(change: Change, factor: float, by_leaf: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors, by key, that `factor` goes into; raises `Unsupported` where the kind has no place for one."""
    delta: Any = change.delta
    before = delta.leaves()
    # The delta's own scale stays where the file keeps it (a config, an alpha): `factor` alone is folded in.
    after = replace(delta, scale=factor).folded().leaves() if "scale" in delta.__slots__ else {}
    # Folding returns the same object for a leaf that it leaves alone.
    changed = {leaf: tensor for leaf, tensor in after.items() if tensor is not before[leaf]}
    if not changed or not changed.keys() <= by_leaf.keys():
        raise Unsupported(f"a delta of kind {delta.kind} has no place for a factor; `to_lora()` makes a LoRA of it")
    return {by_leaf[leaf]: tensor for leaf, tensor in changed.items()}


def _compare(expected: Sequence[tuple[Change, Delta]], again: LazyAdapter) -> None:
    """Raises `InvalidAdapter` where a delta of the written file is not the expected one."""
    for change, delta in expected:
        with error_context(change):
            back = delta_at(again, change.stem, change)
            error = relative_difference(delta, back) if back else math.inf
            # Not `>`: NaN is an error too.
            if not error <= EXACT:
                raise InvalidAdapter(f"differs by {error:.2e} when it is read back: nothing is written")
