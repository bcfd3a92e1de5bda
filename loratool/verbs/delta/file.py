"""A file of full differences: ΔW of each parameter whole, under names that other tools read, one after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from loratool.adapter.adapter import Adapter, Change
from loratool.adapter.rename import rename_changes
from loratool.adapter.spell import spell_adapter
from loratool.archs import ARCHS, Arch
from loratool.deltas.full import Full
from loratool.deltas.schema import BIAS
from loratool.errors import LoratoolError, NonFinite, Unsupported, error_context
from loratool.files.history import history_entry
from loratool.files.tensors import DTYPE_NAMES, tensor_bytes
from loratool.files.writer import ENTRY_BYTES, TensorBytes
from loratool.formats.table import LLM, Format, format_named
from loratool.keys.identify import format_of
from loratool.keys.resolve import Hints, archs_of_base, resolve_base_routes, resolve_routes
from loratool.keys.routes import Route
from loratool.names import CONTAINER, ENCODERS, Module
from loratool.numbers.krylov import squared_norm
from loratool.numbers.linalg import all_finite, dtype_name
from loratool.verbs.delta.sources import AdapterDeltas, CheckpointDeltas, DeltaSource

USUAL: Final = "kohya"
"""The format of full differences that most tools read: LyCORIS's, ComfyUI, A1111, Forge."""
LONGER: Final = 200
"""Bytes by which a parameter's name may be longer in one format than in another,"""
PARTS: Final = 4
"""and parts that a module may be cut into."""
OWN_NAMES: Final = "the model's own names"


@dataclass(frozen=True, slots=True)
class Naming:
    """What the tensors are called: as `target` has them, each module where `ways` says, or, without one, as the model does;
    `reasons` are why some have no place."""

    target: Format | None
    arch: str
    routes: Mapping[Module, Route] = field(default_factory=dict)
    reasons: Mapping[Module, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.target.title if self.target else OWN_NAMES

    def groups(self, source: DeltaSource) -> list[list[int]]:
        """Numbers of changes that end in one tensor, and so must be at hand together; all others are alone."""
        together: dict[object, list[int]] = {}
        for number in range(source.count):
            module, parameter = source.place(number)
            if module not in self.reasons:
                together.setdefault((self._whole(module) or module, parameter), []).append(number)
        return list(together.values())

    def tensors(self, parts: Sequence[tuple[Module, str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that a group's changes become."""
        if self.target is None:
            return {f"{_path(module)}.{_leaf(parameter)}": dense for module, parameter, dense in parts}
        changes = [Change(module, parameter, Full(dense, _leaf(parameter))) for module, parameter, dense in parts]
        adapter = Adapter(Path(), tuple(changes), {})
        return spell_adapter(rename_changes(changes, self.routes), self.target, adapter).tensors

    def _whole(self, module: Module) -> object:
        """The stacked module that a module is a part of, or whose parts' parts it is."""
        way = self.routes.get(module)
        links = [whole for whole, link in way.targets if link and len(link.parts) > 1] if way else []
        return (way.prefix, links[0]) if way and links else None


def naming_of(source: DeltaSource, to: str | None, arch: str | None) -> Naming:
    """How the differences are to be called; raises `LoratoolError` where the format that is asked for cannot hold them."""
    modules = list(dict.fromkeys(source.place(number)[0] for number in range(source.count)))
    target = format_named(to) if to else None
    if target and "diff" not in target.leaves:
        raise Unsupported(f"{target.title} has no place for full differences; `to='kohya'`, or comfyui, has")
    if isinstance(source, AdapterDeltas):
        return _of_adapter(source, target, arch)
    assert isinstance(source, CheckpointDeltas)
    found = archs_of_base(source.base.layout, modules, arch)
    target = target or format_named(USUAL)
    if to is None and (found[0] not in ARCHS or not target.holds(found[0].name)):
        return Naming(None, found[0].title)
    chosen, routes, reasons = resolve_base_routes(modules, found, target)
    # Names of bare parameters are read by nobody, but for Wan's modulation; and OpenCLIP's projection lies on its side.
    nameless = {
        pair.module: f"{target.title} has no place for a parameter of no module"
        for pair in source.pairs
        if pair.raw and (target.flat or pair.module.component in ENCODERS) and not pair.module.path.endswith("modulation")
    }
    return Naming(target, chosen.title, routes, {**nameless, **reasons})


def _of_adapter(source: AdapterDeltas, target: Format | None, arch: str | None) -> Naming:
    adapter = replace(source.adapter, changes=tuple(source.changes))
    if target is None:
        try:
            own = format_of(adapter.keys)
        except LoratoolError:
            own = format_named(USUAL)
        target = own if "diff" in own.leaves else format_named(USUAL)
        if own.whole is not None and any(change.module.stem.startswith(CONTAINER) for change in source.changes):
            return Naming(None, "a language model")
    found: Arch
    found, routes = resolve_routes([adapter.keys], target, Hints(arch))
    if found.name == LLM and not target.holds(LLM):
        return Naming(None, found.title)
    return Naming(target, found.title, routes)


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The tensors of some changes as they are stored, and the square of what rounding them took."""

    entries: tuple[TensorBytes, ...]
    lost: float


def store_parts(naming: Naming, parts: Sequence[tuple[Module, str, Tensor]], dtype: torch.dtype) -> StoredTensors:
    """Changes in the dtype of the file; raises `NonFinite` where they overflow it."""
    entries, lost = [], 0.0
    for name, tensor in naming.tensors(parts).items():
        narrow = tensor.to(dtype)
        with error_context(name):
            if not all_finite(narrow):
                raise NonFinite(f"overflows {dtype_name(dtype)}; choose `dtype='float32'`")
        lost += squared_norm((tensor - narrow.to(tensor.dtype)).reshape(1, -1))
        raw = tensor_bytes(narrow.contiguous().cpu())
        entries.append(TensorBytes(name, DTYPE_NAMES[dtype], tuple(narrow.shape), raw))
    return StoredTensors(tuple(entries), lost)


def room_for_header(source: DeltaSource) -> int:
    """Bytes of a header that has a name for every part of every change."""
    stems = (source.place(number)[0].stem for number in range(source.count))
    return 4096 + sum(PARTS * (ENTRY_BYTES + LONGER + 2 * len(json.dumps(stem))) for stem in stems)


def provenance(**said: object) -> dict[str, str]:
    """What the file says of itself, without times or paths."""
    return history_entry("delta", (), {}, **said) | {"format": "pt"}


def _leaf(parameter: str) -> str:
    return "diff_b" if parameter == BIAS else "diff"


def _path(module: Module) -> str:
    return module.stem.removeprefix(CONTAINER)
