"""`edit`: an adapter without some of its modules, and with others at another strength; all else stays what it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from loratool import __version__
from loratool.adapter import Adapter, Change, Stored, load
from loratool.archs import ARCHS, Arch
from loratool.archs.blocks import LENGTHS, block_of
from loratool.deltas import Delta
from loratool.deltas.base import times
from loratool.detect import is_language_model
from loratool.errors import InvalidAdapter, LoratoolError, NeedsBase, Unsupported, about, some
from loratool.formats.leaves import CONTAINER, spelled
from loratool.formats.table import LLM
from loratool.names import Module
from loratool.ops.checking import EXACT, difference, found_in
from loratool.ops.choosing import explained
from loratool.ops.comparing.adapters import norm_of
from loratool.ops.packing import STALE
from loratool.ops.rewriting import METADATA_KEY
from loratool.ops.saving import Contents, as_they_were, one_or_dynamic, write
from loratool.ops.spelling import pattern_of, whole_number
from loratool.ops.strengths import Strength
from loratool.routes import as_named

OF_CONFIG: Final = frozenset({"lora", "embedding", "full"})
"""Kinds whose scale is in the config of PEFT's LoRA: that of a bias is its module's."""


@dataclass(frozen=True, slots=True)
class EditOptions:
    """What to change: globs of modules to `drop`, or the only ones to `keep`; globs to `scale`, with factors; a `strength`
    for blocks and components. A glob matches a module's name in the file, its path, or its block (IN04, OUT*)."""

    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    scale: tuple[tuple[str, float], ...] = ()
    strength: Strength = field(default_factory=Strength)
    arch: str | None = None
    allow_pickle: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Edited:
    """One module: its block, ‖ΔW‖ before (None where only its weight could tell), and the factor it got: 0 if dropped."""

    name: str
    block: str
    norm: float | None
    factor: float


@dataclass(frozen=True, slots=True)
class Block:
    """One block: how many modules it has, its share of ‖ΔW‖² before and after, and the factors of its modules."""

    name: str
    modules: int
    before: float
    after: float
    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class EditReport:
    """What an edit did, or with `dry_run` would do; `unmeasured` modules are of kinds whose norm depends on the weight."""

    out: str
    arch: str
    modules: tuple[Edited, ...]
    blocks: tuple[Block, ...]
    unmeasured: int
    nbytes: int
    dry_run: bool
    warnings: tuple[str, ...] = ()

    @property
    def dropped(self) -> int:
        return sum(module.factor == 0 for module in self.modules)

    @property
    def scaled(self) -> int:
        return sum(module.factor not in (0, 1) for module in self.modules)


def edit(path: str | Path, out: str | Path | None, options: EditOptions | None = None) -> EditReport:
    """Writes the adapter at `path` to `out` without the modules that are dropped, and with the others at their factors.

    Every tensor that no factor is for keeps its bytes. A factor goes into alpha, a tensor's or the config's, and where there
    is none into the factors. Raises `LoratoolError`, and writes nothing, where a glob matches no module, nothing is left, or
    a kind has no exact multiple without its base.
    """
    options = options or EditOptions()
    adapter = load(path, allow_pickle=options.allow_pickle)
    modules = list(dict.fromkeys(change.module for change in adapter.changes))
    arch, blocks = _blocks(adapter, modules, options)
    factors = _factors(modules, blocks, arch, options)
    report = _report(adapter, arch, blocks, factors, options)
    unnamed = options.strength.unnamed(modules, arch)
    if unnamed:
        shown = some(map(str, unnamed), 2)
        note = f"{len(unnamed)} modules are in blocks that the vector has no number for, and keep their strength: {shown}"
        report = replace(report, warnings=(*report.warnings, note))
    if options.dry_run or out is None:
        return replace(report, dry_run=True)
    target = Path(out).expanduser()
    nbytes = _written(adapter, factors, target, options)
    return replace(report, out=str(target), nbytes=nbytes)


def _blocks(adapter: Adapter, modules: Sequence[Module], options: EditOptions) -> tuple[Arch, dict[Module, str]]:
    """The architecture, and each module's block in it."""
    if options.arch:
        found = [next(arch for arch in ARCHS if arch.name == options.arch)]
    elif is_language_model(modules):
        found = [as_named(modules, LLM, "a language model")]
    else:
        found = explained([adapter]) or [as_named(modules, "unknown", "a model without a table")]
    # Look-alikes that have a vector of this length have the same blocks.
    length = len(options.strength.vector)
    arch = next((arch for arch in found if length in LENGTHS.get(arch.name, ())), found[0])
    return arch, {module: block_of(arch, module) for module in modules}


def _factors(
    modules: Sequence[Module], blocks: Mapping[Module, str], arch: Arch, options: EditOptions
) -> dict[Module, float]:
    """What each module is multiplied by; 0 drops it."""
    factors = options.strength.of(modules, arch)
    kept = _matched(modules, blocks, options.keep, "--keep")
    dropped = _matched(modules, blocks, options.drop, "--drop")
    for module in modules:
        if module in dropped or (options.keep and module not in kept):
            factors[module] = 0.0
    for glob, factor in options.scale:
        if not math.isfinite(factor):
            raise LoratoolError(f"--scale {glob}={factor}: expected a finite number")
        for module in _matched(modules, blocks, (glob,), "--scale"):
            factors[module] *= factor
    if not any(factors.values()):
        raise LoratoolError("nothing is left: every module is dropped")
    return factors


def _matched(modules: Iterable[Module], blocks: Mapping[Module, str], globs: Sequence[str], option: str) -> set[Module]:
    """The modules that any of the globs matches; raises `LoratoolError` for one that matches none."""
    found: set[Module] = set()
    for glob in globs:
        mine = {m for m in modules if any(fnmatchcase(name, glob) for name in (m.stem, m.path, blocks[m]))}
        if not mine:
            raise LoratoolError(
                f"{option} {glob}: matches no module; --dry-run shows the blocks, inspect --modules the names"
            )
        found |= mine
    return found


def _report(
    adapter: Adapter, arch: Arch, blocks: Mapping[Module, str], factors: Mapping[Module, float], options: EditOptions
) -> EditReport:
    norms: dict[Module, float | None] = {}
    for change in adapter.changes:
        before = norms.get(change.module, 0.0)
        mine = norm_of(change.delta) if change.delta.additive and not change.apart else None
        norms[change.module] = None if before is None or mine is None else math.hypot(before, mine)
    modules = [Edited(str(module), blocks[module], norms[module], factor) for module, factor in factors.items()]
    return EditReport(
        out="",
        arch=arch.title,
        modules=tuple(modules),
        blocks=tuple(_shares(modules)),
        unmeasured=sum(norm is None for norm in norms.values()),
        nbytes=0,
        dry_run=options.dry_run,
        warnings=adapter.notes,
    )


def _shares(modules: Sequence[Edited]) -> Iterator[Block]:
    """Blocks in the order in which they first occur by name, numbers as numbers."""
    before = math.fsum((module.norm or 0.0) ** 2 for module in modules)
    after = math.fsum(((module.norm or 0.0) * module.factor) ** 2 for module in modules)
    by_block: dict[str, list[Edited]] = {}
    for module in modules:
        by_block.setdefault(module.block, []).append(module)
    for name in sorted(by_block, key=_natural):
        mine = by_block[name]
        squares = math.fsum((module.norm or 0.0) ** 2 for module in mine)
        left = math.fsum(((module.norm or 0.0) * module.factor) ** 2 for module in mine)
        factors = tuple(sorted({module.factor for module in mine}))
        yield Block(name, len(mine), squares / before if before else 0.0, left / after if after else 0.0, factors)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers inside names by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _written(adapter: Adapter, factors: Mapping[Module, float], out: Path, options: EditOptions) -> int:
    kept = [change for change in adapter.changes if factors[change.module]]
    expected = [(change, _scaled(change, factors[change.module])) for change in kept]
    tensors = as_they_were(adapter, kept)
    config = dict(adapter.config) if adapter.config else None
    for change, factor in ((change, factors[change.module]) for change in kept):
        if factor != 1:
            with about(change):
                _apply(adapter, change, factor, tensors, config)
    if config is not None and len(kept) < len(adapter.changes):
        config |= _targets(adapter, kept, config)
    contents = Contents(tensors, _metadata(adapter, kept, factors, options), config)

    def check(written: Path) -> None:
        with Stored(written) as again:
            _compare(expected, again)

    return write(contents, [adapter.path], out, overwrite=options.overwrite, check=check)


def _targets(adapter: Adapter, kept: Sequence[Change], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a PEFT config says of which modules there are, for those that are kept."""
    by_kind: dict[str, set[str]] = {"replace": set(), "experts": set(), "": set()}
    for change in kept:
        kind = change.delta.kind if change.delta.kind in by_kind else ""
        by_kind[kind].add(change.stem.removeprefix(CONTAINER))
    saved = {"modules_to_save": sorted(by_kind["replace"] - by_kind[""]) or None} if config.get("modules_to_save") else {}
    if config.get("target_parameters"):
        _require_whole_wrappers(adapter, by_kind["experts"])
        saved["target_parameters"] = sorted(by_kind["experts"]) or None
    return {"target_modules": sorted(by_kind[""]), **saved}


def _require_whole_wrappers(adapter: Adapter, kept: set[str]) -> None:
    """Raises `Unsupported` where some of a module's stacked parameters go and some stay: PEFT wraps them in each other, and
    their names say how many there are."""
    parts: dict[str, set[bool]] = {}
    for change in adapter.changes:
        if change.delta.kind == "experts":
            parts.setdefault(change.module.path.rpartition(".")[0], set()).add(change.module.path in kept)
    torn = [module for module, fates in parts.items() if len(fates) > 1]
    if torn:
        raise Unsupported(
            f"{some(torn)}: PEFT wraps stacked parameters of one module in each other; drop all of them or none"
        )


def _scaled(change: Change, factor: float) -> Delta:
    """The delta at its factor; raises `NeedsBase` where that is no delta of its kind."""
    if factor == 1:
        return change.delta
    try:
        return change.delta.scaled(factor)
    except NeedsBase as error:
        raise NeedsBase(
            f"{change}: what a multiple of a delta of kind {change.delta.kind} is only its weight tells; "
            "combine FILE:STRENGTH --base BASE computes it"
        ) from error


def _apply(
    adapter: Adapter, change: Change, factor: float, tensors: dict[str, Tensor], config: dict[str, Any] | None
) -> None:
    """Puts a factor where the change's scale is kept: an alpha of its own, the config's, or else its factors."""
    by_leaf = {found.leaf: key for key in change.keys if (found := spelled(key))}
    alpha = by_leaf.get("alpha")
    # Where both sides of a LoKr are whole, alpha is ignored.
    if alpha is not None and alpha in adapter.alphas and change.delta.scale is not None:
        tensors[alpha] = times(adapter.alphas[alpha], factor)
    elif config and config.get("peft_type") == "LORA" and change.delta.kind in OF_CONFIG:
        config["alpha_pattern"] = _alpha_pattern(change, factor, config)
    else:
        tensors |= _folded(change, factor, by_leaf)


def _alpha_pattern(change: Change, factor: float, config: Mapping[str, Any]) -> dict[str, float]:
    """PEFT's alphas, with that of one module before all others; its bias has the alpha of its factors."""
    before: dict[str, float] = config.get("alpha_pattern") or {}
    down = next((tensor for leaf, tensor in change.delta.leaves().items() if leaf.endswith("down")), None)
    if down is None or change.delta.scale is None:
        return before
    rank = len(down)
    pattern = pattern_of(_path(change.module))
    alpha = change.delta.scale * factor * (math.sqrt(rank) if config.get("use_rslora") else rank)
    return {pattern: whole_number(alpha), **{key: value for key, value in before.items() if key != pattern}}


def _folded(change: Change, factor: float, by_leaf: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a delta that a factor goes into."""
    delta: Any = change.delta
    before = delta.leaves()
    after = replace(delta, scale=factor).folded().leaves() if "scale" in delta.__slots__ else {}
    changed = {leaf: tensor for leaf, tensor in after.items() if tensor is not before[leaf]}
    if not changed or not changed.keys() <= by_leaf.keys():
        raise Unsupported(f"a delta of kind {delta.kind} has no place for a factor; convert --to-lora makes a LoRA of it")
    return {by_leaf[leaf]: tensor for leaf, tensor in changed.items()}


def _path(module: Module) -> str:
    return module.stem.removeprefix(CONTAINER)


def _metadata(
    adapter: Adapter, kept: Sequence[Change], factors: Mapping[Module, float], options: EditOptions
) -> dict[str, str]:
    """The file's own metadata, with what it says of alpha made true and without a hash that is no longer right, and what was
    done."""
    metadata = {key: value for key, value in adapter.metadata.items() if key != STALE[0]}
    if "ss_network_alpha" in metadata and any(factors[change.module] != 1 for change in kept):
        loras = [change for change in kept if "down" in change.delta.leaves() and change.delta.scale is not None]
        alphas = [c.delta.scale * len(c.delta.leaves()["down"]) * factors[c.module] for c in loras if c.delta.scale]
        metadata["ss_network_alpha"] = one_or_dynamic(alphas)
    asked = {"drop": options.drop, "keep": options.keep, "scale": options.scale, "parts": dict(options.strength.parts)}
    vector = {"blocks": options.strength.vector} if options.strength.vector else {}
    given = {name: value for name, value in (asked | vector).items() if value}
    return metadata | {METADATA_KEY: json.dumps({"version": __version__, "command": "edit", **given})}


def _compare(expected: Sequence[tuple[Change, Delta]], again: Stored) -> None:
    """Raises `InvalidAdapter` where what was written is not what it should be."""
    for change, delta in expected:
        with about(change):
            back = found_in(again, change.stem, change)
            error = difference(delta, back) if back else math.inf
            if not error <= EXACT:
                raise InvalidAdapter(f"differs by {error:.2e} when it is read back: nothing is written")
