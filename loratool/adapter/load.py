"""Reads adapters: every module's deltas, whatever format the file has, at once or module by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from torch import Tensor

from loratool.adapter.adapter import Adapter, Assumptions, Change
from loratool.deltas.base import Delta
from loratool.deltas.registry import build_part
from loratool.deltas.relations import same_bytes
from loratool.deltas.schema import BIAS, Given
from loratool.errors import InvalidAdapter, NonFinite, Unsupported, error_context, first_few
from loratool.files.adapter_files import CONFIG_NAME, PICKLE_SUFFIXES, adapter_file, identity_of, locate
from loratool.files.header import TensorInfo
from loratool.files.layout import Layout
from loratool.files.paths import path_of
from loratool.files.pickles import open_pickle
from loratool.files.tensors import FLOATS, TensorFile
from loratool.formats.leaves import UNTRAINED
from loratool.formats.peft import PeftConfig
from loratool.keys.detect import is_language_model
from loratool.keys.listing import AdapterListing, ModuleLeaves, list_adapter, open_input, read_listing, require_adapter
from loratool.names import CONTAINER
from loratool.numbers.linalg import all_finite, bounds
from loratool.numbers.settings import steady_arithmetic
from loratool.numbers.threads import map_on_threads

_INTEGERS: Final = (".on_input", ".reshape_weight")
"""The endings of leaves that hold whole numbers."""


@steady_arithmetic()
def load(path: str | Path, *, allow_pickle: bool = False, assume: Assumptions | None = None) -> Adapter:
    """Reads the adapter at `path`, a safetensors file or a PEFT folder, wholly and checked.

    `assume` is what a loralib file, or a PEFT file without its config, leaves open.

    Raises `LoratoolError`: every tensor must be explained, every factor finite, every alpha a number. A pickle (`.bin`)
    is refused unless `allow_pickle`, and is then read in a process of its own that may build nothing but tensors.
    """
    path = path_of(path)
    weights, _ = locate(path)
    if allow_pickle and weights.suffix in PICKLE_SUFFIXES:
        # The identity of the pickle itself; the header is that of a temporary file with the same tensors.
        who = identity_of(weights)
        with open_pickle(weights) as header:
            return load_listing(list_adapter(adapter_file(path, header, who)), assume)
    return load_listing(read_listing(path), assume)


def open_any(path: Path, *, allow_pickle: bool = False) -> Adapter | Layout:
    """Reads what lies at `path`, once: an adapter, or the layout of a checkpoint; raises `LoratoolError`."""
    # A pickle can only be an adapter: checkpoints in pickles are refused.
    if path.suffix in PICKLE_SUFFIXES:
        return load(path, allow_pickle=allow_pickle)
    found = open_input(path)
    return found if isinstance(found, Layout) else load_listing(found)


def open_source(source: Adapter | str | Path, *, allow_pickle: bool = False, assume: Assumptions | None = None) -> Adapter:
    """Returns an adapter that is in memory already, or reads the one at a path as `load` does."""
    return source if isinstance(source, Adapter) else load(source, allow_pickle=allow_pickle, assume=assume)


def load_listing(found: AdapterListing, assume: Assumptions | None = None) -> Adapter:
    """Reads the tensors of an adapter whose header was read already; raises as `load`."""
    assume = assume or Assumptions()
    # An alpha that the user gives counts as a config would, which is of all modules.
    if assume.alpha is not None and not found.configs:
        found = replace(found, configs={"": PeftConfig("`Assumptions(alpha=)`", alpha=assume.alpha)})
    require_adapter(found)
    # A diffusion model's file with PEFT's names and no config is taken at scale 1, which `_assumptions_of` tells the user.
    if found.lacks_config and is_language_model([group.module for group in found.groups]):
        raise InvalidAdapter(f"{found.path}: {CONFIG_NAME} is missing, so the scale is unknown; put it beside the tensors")
    alphas = found.alphas()
    with TensorFile(found.header) as file:
        changes = _all_changes(found, file, alphas, assume)
        extras = {name: file.read(found.header.tensors[name]) for name in found.extras}
        stored = {name: file.read(found.header.tensors[name]) for name in alphas}
    tied = any(config.tied for config in found.configs.values())
    notes = tuple(f"{found.path}: {note}" for note in _assumptions_of(found, changes))
    return Adapter(
        found.path,
        tuple(changes),
        found.header.metadata,
        tied,
        extras,
        stored,
        notes,
        found.file.config,
        found.file,
        assume,
    )


def is_as_stored(adapter: Adapter) -> bool:
    """Whether the file of an adapter in memory still holds the very changes that the adapter has; raises `LoratoolError`
    where the file is another one by now."""
    if adapter.file is None or adapter.file.is_pickle:
        return False
    adapter.file.require_unchanged()
    stored = load(adapter.path, assume=adapter.assume)
    if len(stored.changes) != len(adapter.changes):
        return False
    return all(map(_same_change, stored.changes, adapter.changes))


def _same_change(one: Change, other: Change) -> bool:
    alike = (one.module, one.parameter, one.delta.kind) == (other.module, other.parameter, other.delta.kind)
    return alike and same_bytes(one.delta, other.delta)


def _all_changes(
    found: AdapterListing, file: TensorFile, alphas: Mapping[str, float | None], assume: Assumptions
) -> list[Change]:
    """The changes of all modules, in the file's order, read by a few threads."""

    def read(group: ModuleLeaves) -> list[Change]:
        with error_context(f"{found.path}: {group.module}"):
            return _changes(found, group, file, alphas, assume)

    return list(chain.from_iterable(map_on_threads(partial(read, group) for group in found.groups)))


class LazyAdapter:
    """An adapter on the disk, for a `with`, whose changes are read module by module, each time they are asked for."""

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
        """The changes of the module called `stem`; none where the adapter has no such module."""
        group = self._groups.get(stem)
        return _changes(self._found, group, self._file, self._alphas, Assumptions()) if group else []


def _stem(found: AdapterListing, group: ModuleLeaves) -> str:
    """The stem of what a module's leaves change; for stacked experts the parameter's, not that of the module with it."""
    parameter = found.stacked_parameter(group)
    return CONTAINER + parameter if parameter else group.module.stem


def _assumptions_of(found: AdapterListing, changes: list[Change]) -> Iterator[str]:
    """Gives, in words, what was assumed because neither the file nor the user says it, and which modules change nothing."""
    if found.lacks_config:
        yield f"has PEFT's names without {CONFIG_NAME}; its scale is taken to be 1 (`Assumptions(alpha=)` says otherwise)"
    nothing = [str(change) for change in changes if change.zero]
    if nothing:
        yield f"{len(nothing)} of {len(changes)} modules change nothing, being zero: {first_few(nothing)}"
    yield from dict.fromkeys(words for change in changes for words in change.delta.assumptions())


def _changes(
    found: AdapterListing, group: ModuleLeaves, file: TensorFile, alphas: Mapping[str, float | None], assume: Assumptions
) -> list[Change]:
    given = Given(alpha=assume.alpha, slots=assume.slots)
    changes = []
    for part in group.parts():
        # An alpha is a number that the listing has read, and reaches the delta as its scale.
        tensors = {leaf: _read(file, group.leaves[leaf]) for leaf in part.leaves if leaf != "alpha"}
        delta: Delta = build_part(part, tensors, found.given_for(group, part, alphas, given))
        keys = tuple(group.leaves[leaf].name for leaf in part.leaves)
        # What stands beneath what was trained is the model's own weight, and of all that it is tied to.
        if any(f".{mark}" in key for mark in UNTRAINED for key in keys):
            delta = delta.shared()
        # A product with a factor of zeros is zero, which need not be multiplied out to be seen.
        zero = delta.additive and (delta.scale == 0 or any(bounds(tensor) == (0, 0) for tensor in tensors.values()))
        change = Change(group.module, part.kind.parameter, delta, keys=keys, zero=zero)
        changes.append(_of_experts(change, found.stacked_parameter(group)) if delta.stacked else change)
        # Only the base knows whether the layer has a bias.
        if delta.changes_bias:
            changes.append(Change(group.module, BIAS, delta, optional=True))
    # What replaces a weight comes before what is added to it.
    return sorted(changes, key=lambda change: not change.delta.replaces)


def _of_experts(change: Change, parameter: str | None) -> Change:
    """The change of a stacked weight, moved to the path of the parameter, with the changes of the experts' own weights."""
    assert parameter
    experts = change.delta.per_expert()
    # A parameter of two dimensions is no stack (nn.MultiheadAttention's in_proj_weight).
    if len(experts) == 1:
        return replace(change, module=replace(change.module, path=parameter), delta=experts[0])
    block, _, name = parameter.rpartition(".")
    apart = [
        Change(replace(change.module, path=f"{block}.{expert}.{name}"), change.parameter, delta)
        for expert, delta in enumerate(experts)
    ]
    return replace(change, module=replace(change.module, path=parameter), per_expert=tuple(apart), zero=False)


def _read(file: TensorFile, info: TensorInfo) -> Tensor:
    if info.dtype not in FLOATS and not info.name.endswith(_INTEGERS):
        raise Unsupported(f"{info.name} has dtype {info.dtype}, expected floating-point numbers")
    tensor = file.read(info)
    if not all_finite(tensor):
        raise NonFinite(f"{info.name} holds NaN or Inf")
    return tensor
