"""`inspect`: what a file is, and why, from its header alone. No torch, unless values are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import InvalidAdapter
from loratool.files.adapter_files import is_adapter_folder
from loratool.files.header import Header
from loratool.files.history import history_steps
from loratool.files.layout import INDEX_SUFFIX, PIPELINE, SINGLE_NAMES, Layout, open_layout
from loratool.files.paths import path_of
from loratool.formats.recognise import refusal, trainer
from loratool.keys.detect import Detection, detect
from loratool.keys.listing import AdapterListing, ModuleLeaves, open_input
from loratool.keys.places import inputs_of
from loratool.names import base_component
from loratool.text import histogram, size
from loratool.verbs.inspect.describe import describe_format, leaves_of, summarise_metadata, suspicions

if TYPE_CHECKING:
    from loratool.verbs.inspect.values import ModuleValues


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One delta of one module: the shape of the weight where the leaves tell it, rank, alpha, scale (alpha over rank, or
    over the rank's root for rsLoRA; 1 without an alpha), and what its tensors hold (`values`), if they were read."""

    name: str
    component: str
    kind: str
    shape: tuple[int, ...] | None
    rank: int | None
    alpha: float | None
    scale: float | None
    dtype: str
    nbytes: int
    values: ModuleValues | None = None


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What `inspect` finds in an adapter. `nbytes` counts its tensors alone; `share` is the number of its parameters over
    those of the weights that it changes, or of the whole base where one is given; `history` is what loratool did to the
    file, the last command first, and `peft_type` the tuner that PEFT's config names."""

    path: str
    format: str
    peft_type: str | None
    trainer: str | None
    arch: Detection
    components: Mapping[str, int]
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[str, int]
    dtypes: Mapping[str, int]
    nbytes: int
    parameters: int
    share: float | None
    metadata: Mapping[str, str]
    history: tuple[Mapping[str, Any], ...]
    suspicions: tuple[str, ...]
    modules: tuple[ModuleReport, ...]
    what: str = "adapter"

    def lines(self) -> Iterator[tuple[str, str]]:
        """(name, text) of what the adapter is made up of: its modules, kinds, ranks, alphas and bytes."""
        if self.modules:
            yield "modules", histogram(self.components)
            yield "kinds", histogram(self.kinds)
        if self.ranks:
            yield "rank", histogram(self.ranks)
            yield "alpha", histogram(self.alphas)
        yield "size", f"{size(self.nbytes)} in {histogram(self.dtypes)}"


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What `inspect` finds in a base checkpoint."""

    path: str
    format: str
    arch: Detection
    components: Mapping[str, int]
    dtypes: Mapping[str, int]
    nbytes: int
    parameters: int
    tensors: int
    files: tuple[str, ...]
    metadata: Mapping[str, str]
    history: tuple[Mapping[str, Any], ...]
    suspicions: tuple[str, ...]
    what: str = "checkpoint"


def inspect(path: str | Path, *, values: bool = False, base: str | Path | None = None) -> AdapterReport | CheckpointReport:
    """Says what the adapter or checkpoint at `path` is; with `values`, reads its tensors too (this imports torch).

    With `base`, a checkpoint, an adapter's `share` is of all parameters of that base. Raises `LoratoolError`.
    """
    return inspect_input(open_input(path_of(path)), values=values, base=base)


def inspect_input(
    found: AdapterListing | Layout, *, values: bool = False, base: str | Path | None = None
) -> AdapterReport | CheckpointReport:
    """The report of `inspect` on an adapter or a checkpoint whose header was read already."""
    if isinstance(found, Layout):
        return _checkpoint(found)
    whole = sum(info.numel for _, info in open_layout(path_of(base)).tensors.values()) if base else None
    return inspect_adapter(found, whole, values=values)


def adapters_in(folder: Path) -> list[Path] | None:
    """The adapters in a folder that only keeps them, by name; None for a model's folder, an adapter's, or a file."""
    if not folder.is_dir() or is_adapter_folder(folder):
        return None
    names = {entry.name for entry in folder.iterdir()}
    if names & {*SINGLE_NAMES, PIPELINE, "config.json"} or any(name.endswith(INDEX_SUFFIX) for name in names):
        return None
    found = [entry for entry in folder.iterdir() if entry.suffix == ".safetensors" or is_adapter_folder(entry)]
    # One safetensors file alone in a folder is taken for a checkpoint's, as `open_layout` reads such a folder.
    if not found or (len(found) == 1 and found[0].is_file()):
        return None
    return sorted(found, key=lambda entry: entry.name.casefold())


def inspect_adapter(found: AdapterListing, whole: int | None = None, *, values: bool = False) -> AdapterReport:
    """The report of `inspect` on an adapter whose header was read already; `whole` is its base's number of parameters."""
    tensors = found.header.tensors.values()
    verdict = detect([(group.module, group.width) for group in found.groups], found.header.metadata)
    measured = _measure(found) if values else {}
    modules, problems = _modules(found, measured)
    # An alpha is a setting and not trained, whatever tensor it stands in.
    parameters = sum(info.numel for leaf, info in leaves_of(found) if leaf != "alpha")
    touched = sum(prod(module.shape) for module in modules if module.shape)
    return AdapterReport(
        path=str(found.path),
        format=describe_format(found),
        peft_type=next((config.kind for config in found.configs.values()), None),
        trainer=trainer(found.header.metadata),
        arch=verdict,
        components=Counter(group.module.component or "model" for group in found.groups),
        kinds=Counter(module.kind for module in modules),
        ranks=dict(sorted(Counter(module.rank for module in modules if module.rank is not None).items())),
        alphas=Counter(_alpha_text(module.alpha) for module in modules if module.rank is not None),
        dtypes=Counter(info.dtype for info in tensors),
        nbytes=sum(info.nbytes for info in tensors),
        parameters=parameters,
        share=parameters / (whole or touched) if whole or touched else None,
        metadata=summarise_metadata(found.header.metadata),
        history=tuple(history_steps(found.header.metadata)),
        # A layout that is not read has modules that only seem broken.
        suspicions=(*(problems if not refusal(found.header.tensors) else ()), *suspicions(found)),
        modules=modules,
    )


def _measure(found: AdapterListing) -> Mapping[str, ModuleValues]:
    # Imported here, so that looking at headers never waits for torch.
    from loratool.verbs.inspect.values import measure

    return measure(found)


def _modules(found: AdapterListing, measured: Mapping[str, ModuleValues]) -> tuple[tuple[ModuleReport, ...], list[str]]:
    modules: list[ModuleReport] = []
    problems: list[str] = []
    scalars = _scalars(found, problems)
    for group in found.groups:
        try:
            parts = group.parts()
        except InvalidAdapter as error:
            # A broken module is shown as a suspicion: `inspect` is what people ask when a file is broken.
            problems.append(f"{group.module}: {error}")
            continue
        for part in parts:
            infos = [group.leaves[leaf] for leaf in part.leaves]
            name = group.name_of(part)
            alpha, scale = _alpha(found, group, part.rank, scalars)
            modules.append(
                ModuleReport(
                    name=name,
                    component=group.module.component,
                    kind=part.label,
                    shape=part.shape,
                    rank=part.rank,
                    alpha=alpha,
                    scale=scale,
                    dtype="+".join(sorted({info.dtype for leaf, info in group.leaves.items() if leaf != "alpha"})),
                    nbytes=sum(info.nbytes for info in infos),
                    values=measured.get(name),
                )
            )
    return tuple(modules), problems


def _scalars(found: AdapterListing, problems: list[str]) -> dict[str, float]:
    """The finite alphas that the file itself holds, by tensor name; of the others `problems` gets a sentence each."""
    scalars = {}
    for name, value in found.alphas().items():
        if value is None or not isfinite(value):
            problems.append(f"{name}: alpha is {'not one number' if value is None else value}")
        else:
            scalars[name] = value
    return scalars


def _alpha(
    found: AdapterListing, group: ModuleLeaves, rank: int | None, scalars: Mapping[str, float]
) -> tuple[float | None, float | None]:
    """(alpha, scale) of a module, by the file's own alpha, else by the config's; (None, None) where there is no rank."""
    info = group.leaves.get("alpha")
    if rank is None:
        return None, None
    if info is not None:
        alpha = scalars.get(info.name)
        return alpha, None if alpha is None else alpha / rank
    config = found.config(group.module)
    if config is None or config.alpha_of(group.module.path) is None:
        return None, 1.0
    return config.alpha_of(group.module.path), config.scale(group.module.path, rank)


def _checkpoint(layout: Layout) -> CheckpointReport:
    tensors = [info for _, info in layout.tensors.values()]
    components = Counter(_component(name) for name in layout.tensors)
    return CheckpointReport(
        path=str(layout.root),
        format=_layout_name(layout),
        arch=_checkpoint_arch(layout),
        components=components,
        dtypes=Counter(info.dtype for info in tensors),
        nbytes=sum(info.nbytes for info in tensors),
        parameters=sum(info.numel for info in tensors),
        tensors=len(tensors),
        files=tuple(layout.files),
        metadata=summarise_metadata(_first_metadata(layout.files.values())),
        history=tuple(history_steps(_first_metadata(layout.files.values()))),
        suspicions=(
            *(why for why in [refusal(layout.tensors)] if why),
            *_quantisation_of(layout),
            *(f"{name} is not part of the model and is left alone" for name in layout.left_out),
        ),
    )


def _quantisation_of(layout: Layout) -> Iterator[str]:
    """A note of how a checkpoint is quantised, if its config says so."""
    if said := layout.config.get("quantization_config"):
        method = said.get("quant_method") if isinstance(said, Mapping) else None
        yield f"is quantised{f' ({method})' if isinstance(method, str) else ''}, by its config.json"


def _layout_name(layout: Layout) -> str:
    if not layout.is_folder:
        return "one safetensors file"
    # diffusers keeps each component in a folder of its own.
    if len({name.rpartition("/")[0] for name in layout.files}) > 1:
        return "diffusers folder"
    return f"{len(layout.files)} shards with an index" if layout.indexes else "folder with one safetensors file"


def _checkpoint_arch(layout: Layout) -> Detection:
    config = layout.config
    # transformers writes model_type into the config.json of every model; diffusers' folders have _class_name instead.
    if isinstance(config.get("model_type"), str):
        return Detection("llm", config["model_type"], "config.json says so (model_type)")
    return detect(inputs_of(layout), _first_metadata(layout.files.values()))


def _component(name: str) -> str:
    component, prefix, _ = base_component(name)
    return component or prefix or "model"


def _first_metadata(headers: Iterable[Header]) -> Mapping[str, str]:
    return next((header.metadata for header in headers if header.metadata), {})


def _alpha_text(alpha: float | None) -> str:
    return "none" if alpha is None else f"{alpha:g}"
