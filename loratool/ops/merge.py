"""`merge`: W' = W + Σ strength · ΔW into a checkpoint of any size, in memory that does not grow with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from loratool import __version__
from loratool.adapter import Adapter, Unsaid, load
from loratool.header import DTYPE_OPTIONS, read_json
from loratool.layout import open_layout, require_weights
from loratool.ops.plan import Choice, Plan, check_strength, make_plan
from loratool.ops.rewriting import OutputFile, Progress, rewritten_files, run
from loratool.ops.streaming import Measure, Rounding
from loratool.output import Output, copy_file
from loratool.workers import peak_bytes

LOST: Final = "an adapter added to it would be lost in rounding: merge into the 16-bit original, then quantise that once"
WEAK: Final = 0.9
"""Realised strength under which rounding has taken so much of an adapter that it is worth a warning."""


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter and how strongly to merge it."""

    adapter: Adapter | str | Path
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did, or with `dry_run` would do.

    `realised_strength` is ⟨stored change, ΔW⟩ / ‖ΔW‖², `unchanged` the share of touched weights that rounding left as
    they were; both come from the share `sampled` of the touched weights, and are None when nothing was computed.
    """

    out: str
    adapters: tuple[tuple[str, float], ...]
    matched: int
    unmatched: tuple[str, ...]
    changed: tuple[str, ...]
    copied: int
    nbytes: int
    realised_strength: float | None
    unchanged: float | None
    sampled: float
    seconds: float
    peak_bytes: int
    dry_run: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How to merge: which modules, how strongly per component, and how results are stored."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    components: Mapping[str, float] = field(default_factory=dict)
    dtype: str | None = None
    stochastic: bool = False
    seed: int = 0
    allow_unmatched: bool = False
    allow_pickle: bool = False
    unsaid: Unsaid = field(default_factory=Unsaid)
    overwrite: bool = False
    dry_run: bool = False


def merge(
    base: str | Path,
    adapters: Sequence[Source | str | Path],
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges `adapters` into the checkpoint `base` and writes the result to `out`.

    `base` is a safetensors file, or a folder of Hugging Face or diffusers; `out` becomes of the same make, with every
    other file of the folder beside it. Each weight is computed in float32 and rounded once to the dtype it is stored in.
    Raises `LoratoolError` and leaves nothing behind where a module has no target, a shape does not fit, a value is not
    finite, or the output cannot be written.
    """
    started = time.monotonic()
    options = options or Options()
    layout = open_layout(Path(base).expanduser())
    require_weights(layout, LOST)
    loaded = [_loaded(source, options) for source in adapters]
    dtype = DTYPE_OPTIONS[options.dtype] if options.dtype else None
    plan = make_plan(layout, loaded, dtype=dtype, allow_unmatched=options.allow_unmatched)
    target = Path(out).expanduser()
    measure = Measure()
    if not options.dry_run:
        measure = _write(plan, loaded, target, options, progress)
    report = _report(plan, loaded, target, measure, options.dry_run)
    return replace(report, seconds=time.monotonic() - started, peak_bytes=peak_bytes())


def _loaded(source: Source | str | Path, options: Options) -> tuple[Adapter, Choice]:
    source = source if isinstance(source, Source) else Source(source)
    adapter = source.adapter
    if not isinstance(adapter, Adapter):
        adapter = load(adapter, allow_pickle=options.allow_pickle, unsaid=options.unsaid)
    strength = check_strength(source.strength, str(adapter.path))
    return adapter, Choice(strength, options.include, options.exclude, options.components)


def _write(
    plan: Plan,
    adapters: Sequence[tuple[Adapter, Choice]],
    target: Path,
    options: Options,
    progress: Progress | None,
) -> Measure:
    layout = plan.layout
    inputs = [layout.root, *(adapter.path for adapter, _ in adapters)]
    rewritten = rewritten_files(plan)
    needed = sum(tensor.nbytes for tensor in plan.tensors.values()) + (1 << 20)
    with Output(target, folder=layout.is_folder, overwrite=options.overwrite, nbytes=needed, inputs=inputs) as output:
        for name in (*layout.other_files(), *(file for file in layout.files if file not in rewritten)):
            copy_file(layout.root / name, output.path(name))
        _write_configs(plan, output, options)
        with ExitStack() as stack:
            files = [OutputFile(plan, file, tensors, output, stack) for file, tensors in rewritten.items()]
            measure = run(files, Rounding(options.stochastic, options.seed), progress)
            for opened in files:
                opened.finish(_provenance(adapters, options, measure))
        output.commit()
    return measure


def _write_configs(plan: Plan, output: Output, options: Options) -> None:
    """Rewrites the copies of shard indexes and config.json where the tensors are no longer those of the base."""
    layout = plan.layout
    added = {name: tensor.file for name, tensor in plan.tensors.items() if name not in layout.tensors}
    for name, weight_map in layout.indexes.items():
        mine = [tensor for tensor in plan.tensors.values() if tensor.file in _files_of(weight_map, name)]
        total = sum(tensor.nbytes for tensor in mine)
        if added or total != sum(tensor.source.nbytes for tensor in mine):
            document = read_json(layout.root / name)
            document["weight_map"] = dict(sorted({**weight_map, **added}.items()))
            document["metadata"] = {**(document.get("metadata") or {}), "total_size": total}
            output.path(name).write_text(json.dumps(document, indent=2) + "\n")
    config = layout.config()
    dtypes = {key: options.dtype for key in ("torch_dtype", "dtype") if options.dtype and key in config}
    if config and (plan.config or dtypes):
        output.path("config.json").write_text(json.dumps({**config, **plan.config, **dtypes}, indent=2) + "\n")


def _files_of(weight_map: Mapping[str, str], index: str) -> set[str]:
    folder = index.rpartition("/")[0]
    return {f"{folder}/{shard}" if folder else shard for shard in weight_map.values()}


def _provenance(adapters: Sequence[tuple[Adapter, Choice]], options: Options, measure: Measure) -> str:
    """A short account for the output's metadata, without times or paths, so that equal runs write equal bytes."""
    document: dict[str, Any] = {
        "version": __version__,
        "command": "merge",
        "adapters": [{"name": adapter.path.name[:100], "strength": choice.strength} for adapter, choice in adapters[:20]],
        "round": f"stochastic, seed {options.seed}" if options.stochastic else "nearest",
        "realised_strength": _figure(measure.along, measure.wanted),
        "unchanged": _figure(measure.unchanged, measure.elements),
    }
    return json.dumps(document)


def _figure(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None


def _report(
    plan: Plan, adapters: Sequence[tuple[Adapter, Choice]], target: Path, measure: Measure, dry_run: bool
) -> MergeReport:
    touched = sum(tensor.source.numel for tensor in plan.changed)
    strength = measure.along / measure.wanted if measure.wanted else None
    unchanged = measure.unchanged / measure.elements if measure.elements else None
    notes = [note for adapter, _ in adapters for note in adapter.notes]
    return MergeReport(
        out=str(target),
        adapters=tuple((str(adapter.path), choice.strength) for adapter, choice in adapters),
        matched=plan.matched,
        unmatched=plan.unmatched,
        changed=tuple(tensor.name for tensor in plan.changed),
        copied=sum(not tensor.touched for tensor in plan.tensors.values()),
        nbytes=sum(tensor.nbytes for tensor in plan.tensors.values()),
        realised_strength=strength,
        unchanged=unchanged,
        sampled=measure.elements / touched if touched else 0.0,
        seconds=0.0,
        peak_bytes=0,
        dry_run=dry_run,
        warnings=(*notes, *plan.warnings, *_warnings(plan, measure, strength)),
    )


def _warnings(plan: Plan, measure: Measure, strength: float | None) -> Iterator[str]:
    if plan.unmatched:
        yield f"{len(plan.unmatched)} modules have no target and were left out, the first is {plan.unmatched[0]}"
    if measure.elements and not measure.wanted:
        yield "the adapters change nothing: every ΔW that was measured is zero"
    if strength is not None and strength < WEAK:
        share = measure.unchanged / measure.elements
        yield (
            f"rounding left {share:.0%} of the touched weights unchanged, and the adapters act at {strength:.2f} of their "
            "strength; try --dtype float32, or --round stochastic"
        )
