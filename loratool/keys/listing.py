"""From an adapter's header to its modules and their leaves: every key is accounted for, no tensor is read. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratool.deltas.schema import WEIGHT, Part, explain
from loratool.errors import InvalidAdapter, InvalidConfig, LoratoolError, Unsupported, some
from loratool.files.adapter_files import PICKLE_SUFFIXES, locate
from loratool.files.header import ADAPTER_HEADER_BYTES, Header, TensorInfo, read_header, read_json, read_scalars
from loratool.formats.leaves import SHARED, spelled
from loratool.formats.peft import PeftConfig, from_metadata
from loratool.formats.recognise import folds_whole_weights, refusal
from loratool.names import ADAPTER_PREFIXES, CONTAINER, Module, adapter_component

WIDE: Final = ("down", "hada_w1_b", "diff", "b2")
"""Leaves whose second dimension is the input's."""
MARKS: Final = {"LOHA": "hada_", "LOKR": "lokr_", "IA3": "ia3_", "VERA": "vera_"}
"""How the leaves of PEFT's tuners begin, where they are no one else's."""
PASSENGERS: Final = ("bundle_emb.", "_aux.")
"""Tensors that travel with an adapter and change no weight: bundled textual inversions, and notes of slider tools."""


@dataclass(frozen=True, slots=True)
class Group:
    """One module of an adapter: its leaves with their tensors, and who spells them so."""

    module: Module
    leaves: Mapping[str, TensorInfo]
    families: frozenset[str]

    def parts(self) -> tuple[Part, ...]:
        """The deltas these leaves make up; raises `InvalidAdapter`."""
        return explain({leaf: info.shape for leaf, info in self.leaves.items()})

    @property
    def width(self) -> int | None:
        """The width of its weight's input, where a factor shows it."""
        shown = next((self.leaves[leaf] for leaf in WIDE if leaf in self.leaves), None)
        return shown.shape[1] if shown and len(shown.shape) > 1 and "hada_t1" not in self.leaves else None

    def name_of(self, part: Part) -> str:
        """What a delta of this module is called in reports."""
        return str(self.module) if part.kind.parameter == WEIGHT else f"{self.module} (bias)"


@dataclass(frozen=True, slots=True)
class AdapterKeys:
    """The names in an adapter, whoever has it: the listing of its file, or the adapter in memory.

    `modules` maps each module to the width of its weight's input, None where no shape tells it, and `keys` to the names of
    its tensors in the file.
    """

    path: Path
    modules: Mapping[Module, int | None]
    keys: Mapping[Module, tuple[str, ...]]
    metadata: Mapping[str, str]
    has_config: bool


@dataclass(frozen=True, slots=True)
class Listing:
    """An adapter as its header and config describe it."""

    path: Path
    header: Header
    groups: tuple[Group, ...]
    passengers: tuple[str, ...]
    unexplained: tuple[str, ...]
    problems: tuple[str, ...]
    configs: Mapping[str, PeftConfig]

    def config(self, module: Module) -> PeftConfig | None:
        """The config that speaks of `module`: the folder's, or its component's in diffusers' metadata."""
        component = module.stem.partition(".")[0]
        return self.configs.get("") or self.configs.get(component)

    @property
    def keys(self) -> AdapterKeys:
        """The names in the file."""
        return AdapterKeys(
            self.path,
            {group.module: group.width for group in self.groups},
            {group.module: tuple(info.name for info in group.leaves.values()) for group in self.groups},
            self.header.metadata,
            has_config=bool(self.configs),
        )

    def alphas(self) -> dict[str, float | None]:
        """The alphas that the file itself holds, by tensor name; None for one that is not a single number."""
        infos = [group.leaves["alpha"] for group in self.groups if "alpha" in group.leaves]
        return dict(read_scalars(self.header, infos))

    @property
    def lacks_config(self) -> bool:
        """Whether its names are PEFT's, whose scale stands in a config, and there is none."""
        return not self.configs and any(group.module.stem.startswith(CONTAINER) for group in self.groups)

    @property
    def prefix_counts(self) -> Counter[str]:
        return Counter(_prefix(group.module.stem) for group in self.groups)


def read_listing(path: Path) -> Listing:
    """Lists the adapter at `path`, a safetensors file or a PEFT folder; raises `LoratoolError`."""
    weights, config = locate(path)
    if weights.suffix in PICKLE_SUFFIXES:
        raise Unsupported(
            f"{weights}: a pickle can run code when it is opened; load it with PEFT and save_pretrained it as safetensors, "
            "or pass --allow-pickle if you trust where it comes from"
        )
    return listing(path, read_header(weights, ADAPTER_HEADER_BYTES), config)


def listing(path: Path, header: Header, config: Path | None) -> Listing:
    """Sorts the keys of `header` into modules; what cannot be sorted is listed, not raised."""
    leaves: dict[str, dict[str, TensorInfo]] = {}
    families: dict[str, set[str]] = {}
    passengers, unexplained, problems = [], [], []
    for name, info in header.tensors.items():
        found = spelled(name)
        if name.startswith(PASSENGERS):
            passengers.append(name)
        elif found is None:
            unexplained.append(name)
        elif found.leaf in leaves.setdefault(found.stem, {}):
            problems.append(f"{found.stem}: has {found.leaf} twice, in two spellings")
        else:
            leaves[found.stem][found.leaf] = info
            families.setdefault(found.stem, set()).add(found.family)
    unexplained = [name for name in unexplained if name not in SHARED and not _ia3_weight(name, header, leaves)]
    _complete(leaves, header)
    groups = tuple(
        Group(Module(*adapter_component(stem), stem), leaves[stem], frozenset(families[stem])) for stem in sorted(families)
    )
    return Listing(
        path, header, groups, tuple(passengers), tuple(unexplained), tuple(problems), _configs(header, config, groups)
    )


def _complete(leaves: dict[str, dict[str, TensorInfo]], header: Header) -> None:
    """Gives modules what their own keys do not say: projections that all share, and that a lone factor is a difference."""
    shared = {leaf: header.tensors[name] for name, leaf in SHARED.items() if name in header.tensors}
    differences = folds_whole_weights(header.metadata)
    for of_module in leaves.values():
        if "vera_lambda_b" in of_module:
            of_module.update(shared)
        if differences and of_module.keys() == {"down"}:
            of_module["diff"] = of_module.pop("down")


def _ia3_weight(name: str, header: Header, leaves: dict[str, dict[str, TensorInfo]]) -> bool:
    """LyCORIS calls the vector of (IA)³ plainly `weight`, which only the `on_input` beside it tells from a base's."""
    stem = name.removesuffix(".weight")
    if not name.endswith(".weight") or "on_input" not in leaves.get(stem, {}):
        return False
    leaves[stem]["ia3_weight"] = header.tensors[name]
    return True


def require_adapter(found: Listing) -> None:
    """Raises `InvalidAdapter` unless every tensor is explained and there is a delta at all, `Unsupported` by the config."""
    name = found.path
    for config in found.configs.values():
        if config.refusal:
            raise Unsupported(f"{config.where}: {config.refusal}")
    if why := refusal(found.header.tensors):
        raise Unsupported(f"{name}: {why}")
    if not found.groups:
        full = "; this looks like a full checkpoint" if found.header.tensors else ": it has no tensors"
        raise InvalidAdapter(f"{name}: not an adapter{full}")
    if found.problems:
        raise InvalidAdapter(f"{name}: {found.problems[0]}")
    if found.unexplained:
        count, first = len(found.unexplained), found.unexplained[0]
        raise InvalidAdapter(
            f"{name}: {count} of {len(found.header.tensors)} tensors are not explained by any kind of delta, "
            f"the first is {first!r}; `loratool inspect` lists them"
        )


def _configs(header: Header, config: Path | None, groups: tuple[Group, ...]) -> Mapping[str, PeftConfig]:
    if config is None:
        return from_metadata(header.metadata, str(header.path))
    parsed = PeftConfig.parse(read_json(config), str(config))
    dora = any({"magnitude", "dora_scale"} & group.leaves.keys() for group in groups)
    if parsed.dora and not dora:
        raise LoratoolError(f"{config}: use_dora is true, but no tensor holds a magnitude")
    marks = {kind for group in groups for leaf in group.leaves for kind, mark in MARKS.items() if leaf.startswith(mark)}
    if marks and parsed.kind not in marks and parsed.kind in {*MARKS, "LORA"}:
        raise InvalidConfig(f"{config}: peft_type is {parsed.kind}, but the tensors are those of {some(sorted(marks))}")
    if groups and not marks and parsed.kind in MARKS and any("down" in group.leaves for group in groups):
        raise InvalidConfig(f"{config}: peft_type is {parsed.kind}, but the tensors are those of LORA")
    return {"": parsed}


def _prefix(stem: str) -> str:
    if stem.startswith(CONTAINER):
        return CONTAINER
    return next((prefix for prefix, _ in ADAPTER_PREFIXES if stem.startswith(prefix)), "")
