"""From an adapter's header to its modules and their leaves: every key is accounted for, no tensor is read. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Final

from loratool.deltas.schema import CONSTRAINT, IGNORED, KINDS, OVER_RANK, WEIGHT, DeltaSpec, Given, explain
from loratool.errors import InvalidAdapter, InvalidConfig, LoratoolError, Unsupported, first_few
from loratool.files.adapter_files import AdapterFile, is_adapter_folder, open_adapter
from loratool.files.header import Header, TensorInfo, read_scalars
from loratool.files.layout import Layout, layout_of_file, open_layout
from loratool.formats.leaves import OF_NO_EFFECT, SHARED_KEYS, SPELLED, ParsedKey, adapter_name, parse_key
from loratool.formats.peft import PeftConfig, TargetParameter, from_metadata
from loratool.formats.recognise import folds_whole_weights, refusal
from loratool.names import ADAPTER_PREFIXES, CONTAINER, Module, adapter_component

OWN_LEAVES: Final = frozenset(leaf for kind in KINDS for leaf in kind.required | kind.optional) - SPELLED
"""Leaves that no table of spellings has: files call these leaves what the row of their kind does."""
WIDE: Final = ("down", "hada_w1_b", "diff", "b2")
"""Leaves whose second dimension is the input's."""
MARKS: Final = {"LOHA": "hada_", "LOKR": "lokr_", "IA3": "ia3_", "VERA": "vera_"}
"""How the leaves of PEFT's tuners begin, for tuners whose leaves no other tuner has."""
EXTRAS: Final = ("bundle_emb.", "_aux.")
"""Tensors that travel with an adapter and change no weight: bundled textual inversions, and notes of slider tools."""


@dataclass(frozen=True, slots=True)
class ModuleLeaves:
    """A module of an adapter: its leaves with what the header says of their tensors, and the families that spell them so."""

    module: Module
    leaves: Mapping[str, TensorInfo]
    families: frozenset[str]

    def parts(self) -> tuple[DeltaSpec, ...]:
        """The deltas that the leaves make up; raises `InvalidAdapter`."""
        return explain({leaf: info.shape for leaf, info in self.leaves.items()})

    @property
    def width(self) -> int | None:
        """The width of the input of the module's weight, None where no factor shows it."""
        shown = next((self.leaves[leaf] for leaf in WIDE if leaf in self.leaves), None)
        return shown.shape[1] if shown and len(shown.shape) > 1 and "hada_t1" not in self.leaves else None

    def name_of(self, part: DeltaSpec) -> str:
        """The name of one of the module's deltas in reports."""
        return str(self.module) if part.kind.parameter == WEIGHT else f"{self.module} (bias)"


@dataclass(frozen=True, slots=True)
class AdapterKeys:
    """The names in an adapter, which may be a listed file or an adapter in memory.

    `modules` maps each module to the width of its weight's input, None where no shape tells it, and `keys` to the names of
    its tensors in the file.
    """

    path: Path
    modules: Mapping[Module, int | None]
    keys: Mapping[Module, tuple[str, ...]]
    metadata: Mapping[str, str]
    has_config: bool


@dataclass(frozen=True, slots=True)
class AdapterListing:
    """An adapter as its header and config describe it: `groups` are its modules, `extras` tensors that change no weight,
    `unexplained` keys that nothing reads, `problems` keys that contradict others, `configs` those of each component, or of
    the whole folder (""), `parameters` by stem those that PEFT's target_parameters name.
    """

    file: AdapterFile
    groups: tuple[ModuleLeaves, ...]
    extras: tuple[str, ...]
    unexplained: tuple[str, ...]
    problems: tuple[str, ...]
    configs: Mapping[str, PeftConfig]
    parameters: Mapping[str, TargetParameter] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file or folder that the user named."""
        return self.file.path

    @property
    def header(self) -> Header:
        return self.file.header

    def config(self, module: Module) -> PeftConfig | None:
        """The config that speaks of `module`: the folder's, or that of the module's component in diffusers' metadata."""
        component = module.stem.partition(".")[0]
        return self.configs.get("") or self.configs.get(component)

    @property
    def keys(self) -> AdapterKeys:
        """The names in the file, apart from its tensors."""
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

    def given_for(self, group: ModuleLeaves, part: DeltaSpec, alphas: Mapping[str, float | None], assume: Given) -> Given:
        """What the file and its config say of one delta beside its leaves; `assume` fills in what neither says.

        Raises `InvalidAdapter` where an alpha is no number, or the config's rank is not that of the tensors.
        """
        config, target = self.config(group.module), self.parameters.get(group.module.stem)
        # PEFT asks the config with the parameter's own name, where it is a parameter that is wrapped.
        path = target.path if target else group.module.path
        alpha = self._alpha(group, part, alphas)
        # An assumed alpha is one over a rank; the bound of an orthogonal delta is in its file or nowhere.
        said = alpha if alpha is not None or part.kind.alpha == CONSTRAINT else assume.alpha
        # A LoRA's bias shares the scale of its module's factors.
        rank = next((each.rank for each in group.parts() if each.rank is not None), None)
        if config is None:
            scale = alpha / rank if alpha is not None and rank and part.kind.alpha == OVER_RANK else None
            return replace(assume, scale=scale, alpha=said)
        return replace(
            assume,
            scale=_scale(part, path, rank // target.experts if rank and target else rank, alpha, config),
            alpha=said,
            rank=config.rank_of(path),
            stacked=self.stacked_parameter(group) is not None,
            stack_rule=config.stack_rule,
            tokens=config.tokens_of(path),
            neumann_terms=config.neumann_terms,
            multiplies_inputs=config.is_feedforward(path),
        )

    def stacked_parameter(self, group: ModuleLeaves) -> str | None:
        """The path of the parameter that a module's factors change, where that is not the module's weight."""
        target = self.parameters.get(group.module.stem)
        return target.path if target and not (target.experts == 1 and target.path.endswith(".weight")) else None

    def _alpha(self, group: ModuleLeaves, part: DeltaSpec, alphas: Mapping[str, float | None]) -> float | None:
        """The alpha that the file holds beside the leaves; None without one, or where the kind gives it no meaning."""
        info = group.leaves.get("alpha")
        if info is None or part.kind.alpha == IGNORED:
            return None
        alpha = alphas[info.name]
        if alpha is None or not isfinite(alpha):
            what = f"of shape {list(info.shape)}" if alpha is None else str(alpha)
            raise InvalidAdapter(f"{info.name}: alpha is {what}, expected one finite number")
        return alpha

    @property
    def lacks_config(self) -> bool:
        """Whether the names are PEFT's, which keeps the scale in a config, and there is no config."""
        return not self.configs and any(group.module.stem.startswith(CONTAINER) for group in self.groups)

    @property
    def prefix_counts(self) -> Counter[str]:
        """How many modules have each prefix, "" for those without a known one."""
        return Counter(_prefix(group.module.stem) for group in self.groups)


def _scale(part: DeltaSpec, path: str, rank: int | None, alpha: float | None, config: PeftConfig) -> float | None:
    """What the product of factors of `rank` is multiplied by: by the file's own alpha, else by the config; None for kinds
    without a scale. Raises `InvalidAdapter` where the config's rank is another."""
    if part.kind.alpha != OVER_RANK:
        return None
    if alpha is not None:
        return alpha / rank if rank else None
    # Only a LoRA's rank must agree: the config of an AdaLoRA has the rank that its pruning began with.
    expected = config.rank_of(path)
    if rank and expected and expected != rank and config.kind == "LORA":
        raise InvalidAdapter(
            f"its tensors have rank {rank}, {config.where} says {expected}; correct r or rank_pattern there"
        )
    return config.scale(path, rank or expected)


def open_input(path: Path) -> AdapterListing | Layout:
    """Opens `path` once, as an adapter or as a checkpoint, whichever it is; raises `LoratoolError`."""
    if (path.is_dir() and not is_adapter_folder(path)) or path.name.endswith(".index.json"):
        return open_layout(path)
    # Only the keys tell a single file's contents: without a leaf among them it is a checkpoint, whose header is read by now.
    found = read_listing(path)
    # PEFT's config makes an adapter of a folder, also of a tuner that is not known here.
    if found.groups or found.problems or found.configs:
        return found
    return open_layout(path) if path.is_dir() else layout_of_file(found.header)


def read_listing(path: Path) -> AdapterListing:
    """Lists the adapter at `path`, a safetensors file or a PEFT folder; raises `LoratoolError`."""
    return list_adapter(open_adapter(path))


def list_adapter(file: AdapterFile) -> AdapterListing:
    """Sorts the keys of a file's header into modules; keys that cannot be sorted are listed, not raised."""
    header = file.header
    leaves: dict[str, dict[str, TensorInfo]] = {}
    families: dict[str, set[str]] = {}
    trusted: dict[tuple[str, str], int | None] = {}
    extras, unexplained, problems = [], [], []
    for name, info in header.tensors.items():
        found = parse_key(name, OWN_LEAVES)
        if name.startswith(EXTRAS):
            extras.append(name)
        elif name.endswith(OF_NO_EFFECT):
            continue
        elif found is None:
            unexplained.append(name)
        elif _take_leaf(found, info, leaves, trusted):
            families.setdefault(found.stem, set()).add(found.family)
        else:
            problems.append(f"{found.stem}: has {found.leaf} twice, in two spellings")
    # What a key does not say by itself, the keys of its module may.
    unexplained = [name for name in unexplained if name not in SHARED_KEYS and not _ia3_weight(name, header, leaves)]
    _complete(leaves, header)
    problems = [*_whole_file_problems(file), *problems]
    groups = tuple(
        ModuleLeaves(Module(*adapter_component(stem), stem), leaves[stem], frozenset(families[stem]))
        for stem in sorted(families)
    )
    listing = AdapterListing(file, groups, tuple(extras), tuple(unexplained), tuple(problems), _configs(file, groups))
    return replace(listing, parameters=dict(_target_parameters(listing)))


def _take_leaf(
    found: ParsedKey,
    info: TensorInfo,
    leaves: dict[str, dict[str, TensorInfo]],
    trusted: dict[tuple[str, str], int | None],
) -> bool:
    """Puts a tensor among the leaves of its module; False where another one is there, and neither is a copy of the other."""
    of_module, place = leaves.setdefault(found.stem, {}), (found.stem, found.leaf)
    if found.leaf in of_module:
        before = trusted[place]
        if found.trust is None or before is None or found.trust == before:
            return False
        # A copy, or the value before it was trained, as PEFT stores them of an embedding that grew.
        if found.trust < before:
            return True
    of_module[found.leaf], trusted[place] = info, found.trust
    return True


def _target_parameters(found: AdapterListing) -> Iterator[tuple[str, TargetParameter]]:
    """The parameters that PEFT's target_parameters name, by the stem of the module that holds their factors."""
    wrappers = Counter(group.module.stem.replace(".base_layer", "") for group in found.groups if "down" in group.leaves)
    for group in found.groups:
        config, down = found.config(group.module), group.leaves.get("down")
        if config is None or not config.parameters or down is None or len(down.shape) != 2:
            continue
        stem = group.module.stem
        target = config.parameter_of(group.module.path, wrappers[stem.replace(".base_layer", "")], down.shape[0])
        if target:
            yield stem, target


def _whole_file_problems(file: AdapterFile) -> Iterator[str]:
    """What is wrong with all of a file: emptied by DeepSpeed, or holding two adapters."""
    tensors = file.header.tensors
    husks = [name for name, info in tensors.items() if info.shape == (0,)]
    if husks or (file.config_file and not tensors):
        met = f"{len(husks)} of {len(tensors)} tensors are empty, the first is {husks[0]}" if husks else "it has no tensors"
        yield (
            f"{met}: what DeepSpeed's ZeRO-3 leaves where parameters are saved in pieces; save again with the weights "
            "gathered (zero_to_fp32.py, or stage3_gather_16bit_weights_on_model_save)"
        )
    names = sorted({name for key in tensors if (name := adapter_name(key))})
    if len(names) > 1:
        named = f"{len(names)} adapters, {first_few(names)}"
        yield f"holds {named}; save one with PEFT's save_pretrained(selected_adapters=[NAME])"


def _complete(leaves: dict[str, dict[str, TensorInfo]], header: Header) -> None:
    """Adds to the leaves of modules what their own keys do not say: shared projections, and differences named as factors."""
    shared = {leaf: header.tensors[name] for name, leaf in SHARED_KEYS.items() if name in header.tensors}
    differences = folds_whole_weights(header.metadata)
    for of_module in leaves.values():
        if "vera_lambda_b" in of_module:
            of_module.update(shared)
        if differences and of_module.keys() == {"down"}:
            of_module["diff"] = of_module.pop("down")


def _ia3_weight(name: str, header: Header, leaves: dict[str, dict[str, TensorInfo]]) -> bool:
    """Whether `name` is the vector of an (IA)³, which is then added to `leaves`: LyCORIS calls it plainly `weight`,
    and only an `on_input` beside it tells it from the weight of a base."""
    stem = name.removesuffix(".weight")
    if not name.endswith(".weight") or "on_input" not in leaves.get(stem, {}):
        return False
    leaves[stem]["ia3_weight"] = header.tensors[name]
    return True


def require_adapter(found: AdapterListing) -> None:
    """Raises `Unsupported` for what the config or the keys say cannot be read, `InvalidAdapter` unless there is a delta and
    every tensor is explained."""
    name = found.path
    # Whose layout the keys are of comes first: its config is no PEFT's.
    if why := refusal(found.header.tensors):
        raise Unsupported(f"{name}: {why}")
    for config in found.configs.values():
        if config.refusal:
            raise Unsupported(f"{config.where}: {config.refusal}")
    if found.problems:
        raise InvalidAdapter(f"{name}: {found.problems[0]}")
    if not found.groups:
        full = "; this looks like a full checkpoint" if found.header.tensors else ": it has no tensors"
        raise InvalidAdapter(f"{name}: not an adapter{full}")
    if found.unexplained:
        count, first = len(found.unexplained), found.unexplained[0]
        raise InvalidAdapter(
            f"{name}: {count} of {len(found.header.tensors)} tensors are not explained by any kind of delta, "
            f"the first is {first!r}; `loratool inspect` lists them"
        )


def _configs(file: AdapterFile, groups: tuple[ModuleLeaves, ...]) -> Mapping[str, PeftConfig]:
    """The configs of an adapter by component; raises `InvalidConfig` where a folder's config is not that of its tensors."""
    if file.config_file is None:
        return from_metadata(file.header.metadata, str(file.header.path))
    # A config beside tensors of another tuner would lend them a wrong scale without a word.
    config = file.config_file.path
    parsed = PeftConfig.parse(file.config, str(config))
    dora = any({"magnitude", "dora_scale"} & group.leaves.keys() for group in groups)
    if parsed.dora and not dora:
        raise LoratoolError(f"{config}: use_dora is true, but no tensor holds a magnitude")
    marks = {kind for group in groups for leaf in group.leaves for kind, mark in MARKS.items() if leaf.startswith(mark)}
    if marks and parsed.kind not in marks and parsed.kind in {*MARKS, "LORA"}:
        raise InvalidConfig(f"{config}: peft_type is {parsed.kind}, but the tensors are those of {first_few(sorted(marks))}")
    if groups and not marks and parsed.kind in MARKS and any("down" in group.leaves for group in groups):
        raise InvalidConfig(f"{config}: peft_type is {parsed.kind}, but the tensors are those of LORA")
    return {"": parsed}


def _prefix(stem: str) -> str:
    """The known prefix that a stem begins with, "" without one."""
    if stem.startswith(CONTAINER):
        return CONTAINER
    return next((prefix for prefix, _ in ADAPTER_PREFIXES if stem.startswith(prefix)), "")
