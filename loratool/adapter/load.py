"""An adapter in memory: every module's deltas, whatever format the file had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from torch import Tensor

from loratool.adapter.adapter import Adapter, Change
from loratool.deltas.base import Delta
from loratool.deltas.dora import DoRA
from loratool.deltas.experts import ExpertLoRA
from loratool.deltas.full import Enlarge, TokenRows
from loratool.deltas.loralib import LoRALib
from loratool.deltas.multiply import IA3
from loratool.deltas.orthogonal import InputOFT
from loratool.deltas.registry import KINDS
from loratool.deltas.schema import Part
from loratool.errors import InvalidAdapter, NonFinite, Unsupported, about, some
from loratool.files.adapter_files import CONFIG_NAME, PICKLE_SUFFIXES, locate
from loratool.files.header import TensorInfo, read_json
from loratool.files.pickles import unpickled
from loratool.files.tensors import FLOATS, TensorFile
from loratool.formats.peft import PeftConfig
from loratool.keys.detect import is_language_model
from loratool.keys.listing import Group, Listing, listing, read_listing, require_adapter
from loratool.names import CONTAINER, Module
from loratool.numbers.linalg import all_finite, bounds
from loratool.numbers.threads import results

INTEGERS: Final = (".on_input", ".reshape_weight")
"""Leaves that hold whole numbers."""


@dataclass(frozen=True, slots=True)
class Unsaid:
    """What some files do not say: the alpha of all modules, and which slots of a fused weight loralib trained."""

    alpha: float | None = None
    slots: tuple[bool, ...] = ()


def load(path: str | Path, *, allow_pickle: bool = False, unsaid: Unsaid | None = None) -> Adapter:
    """Reads the adapter at `path`, a safetensors file or a PEFT folder, wholly and checked.

    `unsaid` is what a loralib file, or a PEFT file without its config, leaves open.

    Raises `LoratoolError`: every tensor must be explained, every factor finite, every alpha a number. A pickle (`.bin`)
    is refused unless `allow_pickle`, and is then read in a process of its own that may build nothing but tensors.
    """
    path = Path(path).expanduser()
    weights, config = locate(path)
    unsaid = unsaid or Unsaid()
    if allow_pickle and weights.suffix in PICKLE_SUFFIXES:
        with unpickled(weights) as header:
            found = _load(listing(path, header, config), unsaid)
    else:
        found = _load(read_listing(path), unsaid)
    return replace(found, config=read_json(config)) if config else found


def _load(found: Listing, unsaid: Unsaid) -> Adapter:
    if unsaid.alpha is not None and not found.configs:
        found = replace(found, configs={"": PeftConfig("--alpha", alpha=unsaid.alpha)})
    require_adapter(found)
    if found.lacks_config and is_language_model([group.module for group in found.groups]):
        raise InvalidAdapter(f"{found.path}: {CONFIG_NAME} is missing, so the scale is unknown; put it beside the tensors")
    alphas = found.alphas()
    with TensorFile(found.header) as file:
        changes = _all_changes(found, file, alphas, unsaid)
        passengers = {name: file.read(found.header.tensors[name]) for name in found.passengers}
        stored = {name: file.read(found.header.tensors[name]) for name in alphas}
    tied = any(config.tied for config in found.configs.values())
    notes = tuple(f"{found.path}: {note}" for note in _assumed(found, changes, unsaid))
    return Adapter(found.path, tuple(changes), found.header.metadata, tied, passengers, stored, notes)


def _all_changes(found: Listing, file: TensorFile, alphas: Mapping[str, float | None], unsaid: Unsaid) -> list[Change]:
    """The changes of all modules, in the file's order, read by a few threads."""

    def read(group: Group) -> list[Change]:
        with about(f"{found.path}: {group.module}"):
            return _changes(found, group, file, alphas, unsaid)

    return list(chain.from_iterable(results(partial(read, group) for group in found.groups)))


class Stored:
    """An adapter on the disk, whose changes are read module by module, each time they are asked for. Use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self._found = read_listing(path)
        require_adapter(self._found)
        self._alphas = self._found.alphas()
        self._groups = {_stem(self._found, group): group for group in self._found.groups}
        self._file = TensorFile(self._found.header)

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.__exit__(kind, error, trace)

    def changes(self, stem: str) -> list[Change]:
        """What it changes of the module with that stem; nothing where it does not have it."""
        group = self._groups.get(stem)
        return _changes(self._found, group, self._file, self._alphas, Unsaid()) if group else []


def _stem(found: Listing, group: Group) -> str:
    """The stem of what a group changes: of stacked experts that of the parameter, not of the module that holds it."""
    config = found.config(group.module)
    parameter = config.parameter_of(group.module.path) if config else None
    return CONTAINER + parameter if parameter else group.module.stem


def _assumed(found: Listing, changes: list[Change], unsaid: Unsaid) -> Iterator[str]:
    """What was taken for granted because neither the file nor the user says it, and modules that come to nothing."""
    if found.lacks_config:
        yield f"has PEFT's names without {CONFIG_NAME}; its scale is taken to be 1 (--alpha says otherwise)"
    nothing = [str(change) for change in changes if change.zero]
    if nothing:
        yield f"{len(nothing)} of {len(changes)} modules change nothing, being zero: {some(nothing)}"
    originals = [change.delta for change in changes if isinstance(change.delta, LoRALib)]
    if originals and unsaid.alpha is None:
        yield "loralib does not store alpha; its scale is taken to be 1 (--alpha says otherwise)"
    slots = {delta.slots for delta in originals if delta.slots}
    if slots and not unsaid.slots:
        shown = ", ".join("".join("qkv"[i] for i, on in enumerate(slot) if on) for slot in sorted(slots))
        yield f"loralib does not store which slots of a fused weight it trained: taken as {shown} (--slots says otherwise)"


def _changes(
    found: Listing, group: Group, file: TensorFile, alphas: Mapping[str, float | None], unsaid: Unsaid
) -> list[Change]:
    config = found.config(group.module)
    parameter = config.parameter_of(group.module.path) if config else None
    if config and parameter:
        return [_expert_change(group, parameter, config, file)]
    parts = group.parts()
    rank = next((part.rank for part in parts if part.rank is not None), None)
    # What replaces a weight comes before what is added to it.
    ordered = sorted(parts, key=lambda part: part.kind.name != "replace")
    changes = []
    for part in ordered:
        tensors = {leaf: _read(file, group.leaves[leaf]) for leaf in part.leaves if leaf != "alpha"}
        scale = scale_of(found, group, part, rank, alphas)
        if part.kind.name == "loralib":
            delta: Delta = LoRALib.of(tensors, unsaid.alpha, unsaid.slots)
        else:
            delta = delta_of(found, group.module, part, tensors, scale)
        keys = tuple(group.leaves[leaf].name for leaf in part.leaves)
        # A product with a factor of zeros is zero, which need not be multiplied out to be seen.
        zero = delta.additive and (scale == 0 or any(bounds(tensor) == (0, 0) for tensor in tensors.values()))
        changes.append(Change(group.module, part.kind.parameter, delta, keys=keys, zero=zero))
    if isinstance(changes[0].delta, IA3) and "ia3_l" in group.leaves and not changes[0].delta.on_input:
        # PEFT multiplies the outputs, and so the bias, where there is one.
        changes.append(Change(group.module, "bias", changes[0].delta, optional=True))
    return changes


def _expert_change(group: Group, parameter: str, config: PeftConfig, file: TensorFile) -> Change:
    """A change of a stacked weight, and the changes of its experts' own weights that it comes to."""
    group.parts()
    tensors = {leaf: _read(file, info) for leaf, info in group.leaves.items()}
    rank = config.rank_of(group.module.path)
    delta = ExpertLoRA.of(tensors, rank, config.scale(group.module.path, rank))
    block, _, name = parameter.rpartition(".")
    apart = [
        Change(replace(group.module, path=f"{block}.{expert}.{name}"), "weight", lora)
        for expert, lora in enumerate(delta.apart())
    ]
    keys = tuple(info.name for info in group.leaves.values())
    return Change(replace(group.module, path=parameter), "weight", delta, apart=tuple(apart), keys=keys)


def delta_of(found: Listing, module: Module, part: Part, tensors: Mapping[str, Tensor], scale: float | None) -> Delta:
    """The delta of one part; raises `Unsupported` for a kind that is known by name alone."""
    name, config = part.kind.name, found.config(module)
    if name == "tokens":
        return TokenRows.of(tensors["token_rows"], config.tokens_of(module.path) if config else ())
    if name == "input oft":
        return _input_oft(tensors, config)
    if name not in KINDS:
        raise Unsupported(f"is of kind {name}, which this version reads but cannot compute")
    inner = {leaf: tensor for leaf, tensor in tensors.items() if leaf not in (part.magnitude, "reshape_weight")}
    delta = KINDS[name].from_leaves(inner, scale)
    if isinstance(delta, IA3) and delta.vector.ndim > 2 and config and not config.is_feedforward(module.path):
        return delta.of_outputs()
    if "reshape_weight" in tensors:
        return Enlarge.around(delta, tensors["reshape_weight"])
    return DoRA.around(delta, part.magnitude, tensors[part.magnitude]) if part.magnitude else delta


def _input_oft(tensors: Mapping[str, Tensor], config: PeftConfig | None) -> Delta:
    if config is None or "scaled_oft" in tensors:
        raise Unsupported("is an OFT whose trainer is unknown: it needs PEFT's adapter_config.json")
    return InputOFT(tensors["oft_r"], config.neumann_terms)


def _read(file: TensorFile, info: TensorInfo) -> Tensor:
    if info.dtype not in FLOATS and not info.name.endswith(INTEGERS):
        raise Unsupported(f"{info.name} has dtype {info.dtype}, expected floating-point numbers")
    tensor = file.read(info)
    if not all_finite(tensor):
        raise NonFinite(f"{info.name} holds NaN or Inf")
    return tensor


def scale_of(found: Listing, group: Group, part: Part, rank: int | None, alphas: Mapping[str, float | None]) -> float | None:
    """What the part's product is multiplied by: alpha / rank of the file, else of the config; None where neither says.

    `rank` is that of the module's factors, whose scale a LoRA's bias shares. An orthogonal delta's alpha is its constraint.
    """
    if part.kind.name in ("full", "replace"):
        return None
    info = group.leaves.get("alpha")
    if info is not None:
        alpha = alphas[info.name]
        if alpha is None or not isfinite(alpha):
            what = f"of shape {list(info.shape)}" if alpha is None else str(alpha)
            raise InvalidAdapter(f"{info.name}: alpha is {what}, expected one finite number")
        if part.kind.name == "oft":
            return alpha
        return alpha / rank if rank else None
    config = found.config(group.module)
    if config is None:
        return None
    expected = config.rank_of(group.module.path)
    if rank and expected and expected != rank and config.kind == "LORA":
        raise InvalidAdapter(
            f"its tensors have rank {rank}, {config.where} says {expected}; correct r or rank_pattern there"
        )
    return config.scale(group.module.path, rank or expected)
