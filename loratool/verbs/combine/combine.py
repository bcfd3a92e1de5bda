"""`combine`: Σ wᵢ ΔWᵢ of several adapters as one, exactly or at a lower rank, or what a method for merging models makes of
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from loratool.adapter.adapter import Adapter, files_of
from loratool.adapter.approximate import Converted, error_of
from loratool.adapter.load import load
from loratool.adapter.strengths import Strength
from loratool.adapter.write import common_metadata, require_room, write_as
from loratool.base.base import open_base
from loratool.deltas.methods import METHODS, merged
from loratool.deltas.sums import Merge
from loratool.errors import LoratoolError
from loratool.files.header import DTYPE_OPTIONS
from loratool.files.history import METADATA_KEY, entry, named
from loratool.files.output import check_target
from loratool.formats.table import format_named
from loratool.keys.identify import format_of
from loratool.keys.resolve import choose_common
from loratool.names import Module
from loratool.numbers.devices import lanes
from loratool.numbers.ranks import Budget, Rule
from loratool.verbs.combine.adapter_sum import Combining, MergeAt, as_sum

SUM: Final = "sum"


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter and how strongly it counts."""

    adapter: Adapter | str | Path
    strength: Strength = field(default_factory=Strength)


@dataclass(frozen=True, slots=True)
class CombineOptions:
    """How to combine: `to`, a format's name (None: that of the first adapter), `arch` where their names fit several, a
    `method` of `deltas.methods` with its density and seed, the dtype of factors, and the base for kinds that are no sums."""

    to: str | None = None
    arch: str | None = None
    method: str = SUM
    density: float = 0.5
    seed: int = 0
    dtype: str | None = None
    base: str | Path | None = None
    allow_pickle: bool = False
    device: str = "cpu"
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class CombineReport:
    """What was combined: `common` is how many modules several adapters change, `ranks` those of the output's factors.

    `lowered` are the modules that a rule, or a dtype, made an approximation of, and `error` what that leaves out of all of
    them; without one the sum is exact.
    """

    out: str
    format: str
    arch: str
    method: str
    adapters: tuple[tuple[str, float], ...]
    modules: int
    common: int
    ranks: Mapping[int, int]
    dtypes: Mapping[str, int]
    lowered: tuple[Converted, ...]
    error: float
    nbytes: int
    warnings: tuple[str, ...] = ()

    @property
    def worst(self) -> Converted | None:
        """The module with the largest error."""
        return max(self.lowered, key=lambda module: module.error, default=None)


def combine(
    parts: Sequence[Part | str | Path],
    out: str | Path,
    rule: Rule | Budget | None = None,
    options: CombineOptions | None = None,
) -> CombineReport:
    """Writes to `out` one adapter that does what `parts` do together, each at its strength, whatever their formats, ranks,
    kinds and dtypes are: exactly, with ranks that add, or as well as the ranks that `rule` gives allow.

    Raises `LoratoolError`, and writes nothing, where they are for different models, where a kind depends on its weight and
    there is no base, and where the output's format has no place for a sum.
    """
    options, out = options or CombineOptions(), Path(out).expanduser()
    given = [part if isinstance(part, Part) else Part(part) for part in parts]
    if not given:
        raise LoratoolError("there is nothing to combine: name at least one adapter")
    if options.method != SUM and METHODS[options.method].dense and rule is None:
        raise LoratoolError(
            f"--method {options.method} makes ΔW of full rank; say how much of it to keep: --rank, --max-error, --size …"
        )
    combining, sources = _collected(given, out, options)

    made_of = [
        named(source.path, source.file, strength=part.strength.value) for source, part in zip(sources, given, strict=True)
    ]

    def described(adapter: Adapter, error: float = 0.0) -> Adapter:
        said = dict(_history(options)) | ({} if rule is None else {"error": f"{error:.4e}"})
        before = sources[0].metadata if len(sources) == 1 else {}
        return replace(adapter, metadata=_metadata(sources, adapter) | entry("combine", made_of, before, **said))

    dtype = DTYPE_OPTIONS[options.dtype] if options.dtype else None
    combined, lowered = combining.made(sources, rule, dtype, described)
    combined = described(combined, error_of(lowered))
    inputs = files_of(sources)
    written = write_as(
        combined, combining.target, combining.ways_of(combined), out, inputs=inputs, overwrite=options.overwrite
    )
    return _report(combining, combined, given, options, lowered, out, written.nbytes)


def _collected(parts: Sequence[Part], out: Path, options: CombineOptions) -> tuple[Combining, list[Adapter]]:
    """What all parts change, and the adapters without their changes, so that nothing holds these twice."""
    adapters = [_loaded(part.adapter, options) for part in parts]
    target = format_named(options.to) if options.to else format_of(adapters[0].keys)
    require_room(target, out)
    inputs = [adapter.path for adapter in adapters]
    check_target(out, folder=target.folder, overwrite=options.overwrite, inputs=inputs)
    names = [adapter.keys for adapter in adapters]
    base = open_base(options.base)
    arch, ways = choose_common(names, target, options.arch, base.layout if base else None)
    on = lanes(options.device, doubles=True)
    combining = Combining(target, arch, ways, _merge_at(options), base, on)
    for number, (adapter, part) in enumerate(zip(adapters, parts, strict=True)):
        combining.add(number, adapter, part.strength)
    return combining, [replace(adapter, changes=()) for adapter in adapters]


def _merge_at(options: CombineOptions) -> MergeAt:
    if options.method == SUM:
        return as_sum

    def at(module: Module, owners: Sequence[int]) -> Merge:
        seeds = [f"{options.seed}/{module}/{owner}" for owner in owners]
        return partial(merged, method=options.method, density=options.density, seeds=seeds)

    return at


def _report(
    combining: Combining,
    combined: Adapter,
    parts: Sequence[Part],
    options: CombineOptions,
    lowered: Sequence[Converted],
    out: Path,
    nbytes: int,
) -> CombineReport:
    leaves = [leaf for change in combined.changes for leaf in change.delta.leaves().values()]
    alone = ["no module is changed by two of the adapters"] if len(parts) > 1 and not combining.common else []
    return CombineReport(
        out=str(out),
        format=combining.target.title,
        arch=combining.arch.title,
        method=options.method,
        adapters=tuple((str(_path(part.adapter)), part.strength.value) for part in parts),
        modules=len({change.module for change in combined.changes}),
        common=combining.common,
        ranks=Counter(_ranks(combined)),
        dtypes=Counter(str(leaf.dtype).removeprefix("torch.") for leaf in leaves),
        lowered=tuple(lowered),
        error=error_of(lowered),
        nbytes=nbytes,
        warnings=(
            *combining.warnings,
            *combining.lanes.notes(),
            *(["no module is changed by two of the adapters"] if alone else []),
        ),
    )


def _path(adapter: Adapter | str | Path) -> Path:
    return adapter.path if isinstance(adapter, Adapter) else Path(adapter)


def _loaded(adapter: Adapter | str | Path, options: CombineOptions) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else load(adapter, allow_pickle=options.allow_pickle)


def _metadata(sources: Sequence[Adapter], whole: Adapter) -> dict[str, str]:
    """What the sources say alike, made true of the whole, without their histories."""
    return {key: value for key, value in common_metadata(sources, whole).items() if key != METADATA_KEY}


def _ranks(adapter: Adapter) -> list[int]:
    """The ranks of its LoRA."""
    return [change.delta.rank or 0 for change in adapter.changes if change.delta.resizable]


def _history(options: CombineOptions) -> Iterator[tuple[str, Any]]:
    yield "method", options.method
    if options.method != SUM:
        yield "density", options.density
        yield "seed", options.seed
