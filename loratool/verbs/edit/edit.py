"""`edit`: an adapter without some of its modules, and with others at another strength; all else keeps its bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loratool.adapter.adapter import Adapter
from loratool.adapter.load import open_source
from loratool.adapter.strengths import Strength, architecture_of
from loratool.archs import Arch
from loratool.archs.blocks import block_of
from loratool.deltas.relations import norm_of
from loratool.errors import LoratoolError, error_context, error_in_file, first_few
from loratool.files.paths import path_of
from loratool.names import Module
from loratool.numbers.settings import steady_arithmetic
from loratool.text import natural
from loratool.verbs.edit.rescale import write_edited
from loratool.verbs.reports import Report


@dataclass(frozen=True, slots=True)
class EditRequest:
    """What the user asks an edit to change: globs of modules to `drop`, or of the only modules to `keep`; globs to `scale`,
    with factors; a `strength` for blocks and components."""

    drop: tuple[str, ...]
    keep: tuple[str, ...]
    scale: tuple[tuple[str, float], ...]
    strength: Strength

    @property
    def history(self) -> dict[str, Any]:
        """The options that the user gave, by name, for the history in the metadata."""
        asked = {
            "drop": self.drop,
            "keep": self.keep,
            "scale": self.scale,
            "parts": dict(self.strength.parts),
            "blocks": self.strength.vector,
        }
        return {name: value for name, value in asked.items() if value}


@dataclass(frozen=True, slots=True)
class EditedModule:
    """One module: its block, ‖ΔW‖ before the edit (None where only the weight could tell), and its factor, 0 if dropped."""

    name: str
    block: str
    norm: float | None
    factor: float


@dataclass(frozen=True, slots=True)
class BlockShare:
    """One block: its number of modules, its share of the adapter's ‖ΔW‖² before and after, and its modules' factors."""

    name: str
    modules: int
    before: float
    after: float
    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class EditReport(Report):
    """What an edit did, or with `dry_run` would do; `unmeasured` counts modules whose ‖ΔW‖ depends on the weight."""

    out: str
    arch: str
    modules: tuple[EditedModule, ...]
    blocks: tuple[BlockShare, ...]
    unmeasured: int
    nbytes: int
    dry_run: bool

    @property
    def dropped(self) -> int:
        return sum(module.factor == 0 for module in self.modules)

    @property
    def scaled(self) -> int:
        return sum(module.factor not in (0, 1) for module in self.modules)


@steady_arithmetic()
def edit(
    adapter: Adapter | str | Path,
    out: str | Path | None = None,
    *,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    scale: Mapping[str, float] | Iterable[tuple[str, float]] = (),
    strength: Strength | float = 1.0,
    arch: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> EditReport:
    """Writes to `out` an adapter without the modules that are dropped, and with the others at their factors.

    `drop` are globs of modules to leave out, `keep` globs of the only modules that stay, `scale` globs with numbers, and
    `strength` weighs blocks and components. A glob matches a module's name in the file, its path, or its block (IN04, OUT*).
    Tensors of modules that nothing scales keep their bytes. The number goes into alpha, the file's or the config's, and
    where there is none into the module's factors. Without `out`, and with `dry_run`, nothing is written.

    Raises `LoratoolError`, and writes nothing, where a glob matches no module, nothing is left, or a kind has no exact
    multiple without its base.
    """
    adapter = open_source(adapter)
    full = strength if isinstance(strength, Strength) else Strength(strength)
    if isinstance(drop, str) or isinstance(keep, str):
        raise LoratoolError("`drop=` and `keep=` take several globs: a tuple, not one string")
    scaled = scale.items() if isinstance(scale, Mapping) else scale
    run = EditRequest(tuple(drop), tuple(keep), tuple(scaled), full)
    modules = adapter.modules
    found = architecture_of(adapter, modules, arch, len(full.vector))
    blocks = {module: block_of(found, module) for module in modules}
    factors = _factors(modules, blocks, found, run)
    report = _report(adapter, found, blocks, factors)
    # The vectors of 12 and 17 name only blocks with attention; a LoCon has modules in the others too.
    unnamed = full.modules_without_block(modules, found)
    if unnamed:
        shown = first_few(map(str, unnamed), 2)
        note = f"{len(unnamed)} modules are in blocks that the vector has no number for, and keep their strength: {shown}"
        report = replace(report, warnings=(*report.warnings, note))
    if dry_run or out is None:
        return replace(report, dry_run=True)
    target = path_of(out)
    with error_in_file(adapter.path):
        nbytes = write_edited(adapter, factors, target, run.history, overwrite=overwrite)
    return replace(report, out=str(target), nbytes=nbytes)


def _factors(modules: Sequence[Module], blocks: Mapping[Module, str], arch: Arch, run: EditRequest) -> dict[Module, float]:
    """The number that each module's ΔW is multiplied by; 0 drops the module."""
    # Strengths come first and are replaced by 0 where a module is dropped; `scale` then multiplies what is left, so that
    # the order in which a user gives options does not matter.
    factors = run.strength.of(modules, arch)
    # Globs are matched even where their answer is not needed: one that matches nothing is a typing error.
    kept = _match_modules(modules, blocks, run.keep, "keep")
    dropped = _match_modules(modules, blocks, run.drop, "drop")
    for module in modules:
        if module in dropped or (run.keep and module not in kept):
            factors[module] = 0.0
    for glob, factor in run.scale:
        if not math.isfinite(factor):
            raise LoratoolError(f"`scale=({glob!r}, {factor})`: expected a finite number")
        for module in _match_modules(modules, blocks, (glob,), "scale"):
            factors[module] *= factor
    if not any(factors.values()):
        raise LoratoolError("nothing is left: every module is dropped")
    return factors


def _match_modules(
    modules: Iterable[Module], blocks: Mapping[Module, str], globs: Sequence[str], option: str
) -> set[Module]:
    """The modules that any of the globs matches; raises `LoratoolError` for one that matches none."""
    found: set[Module] = set()
    for glob in globs:
        mine = {m for m in modules if any(fnmatchcase(name, glob) for name in (m.stem, m.path, blocks[m]))}
        if not mine:
            raise LoratoolError(
                f"`{option}={glob!r}`: matches no module; `dry_run=True` shows the blocks, `inspect()` the names"
            )
        found |= mine
    return found


def _report(adapter: Adapter, arch: Arch, blocks: Mapping[Module, str], factors: Mapping[Module, float]) -> EditReport:
    # A module may have several changes (weight, bias), whose squares add up; one of them unknown makes the sum unknown.
    norms: dict[Module, float | None] = {}
    for change in adapter.changes:
        before = norms.get(change.module, 0.0)
        with error_context(change):
            mine = norm_of(change.delta) if change.delta.additive and not change.per_expert else None
        norms[change.module] = None if before is None or mine is None else math.hypot(before, mine)
    modules = [EditedModule(str(module), blocks[module], norms[module], factor) for module, factor in factors.items()]
    return EditReport(
        out="",
        arch=arch.title,
        modules=tuple(modules),
        blocks=tuple(_shares(modules)),
        unmeasured=sum(norm is None for norm in norms.values()),
        nbytes=0,
        dry_run=False,
        warnings=adapter.warnings,
    )


def _shares(modules: Sequence[EditedModule]) -> Iterator[BlockShare]:
    """The share of each block, sorted by name with numbers by their value."""
    before = math.fsum((module.norm or 0.0) ** 2 for module in modules)
    after = math.fsum(((module.norm or 0.0) * module.factor) ** 2 for module in modules)
    by_block: dict[str, list[EditedModule]] = {}
    for module in modules:
        by_block.setdefault(module.block, []).append(module)
    for name in sorted(by_block, key=natural):
        mine = by_block[name]
        squares = math.fsum((module.norm or 0.0) ** 2 for module in mine)
        left = math.fsum(((module.norm or 0.0) * module.factor) ** 2 for module in mine)
        factors = tuple(sorted({module.factor for module in mine}))
        yield BlockShare(name, len(mine), squares / before if before else 0.0, left / after if after else 0.0, factors)
