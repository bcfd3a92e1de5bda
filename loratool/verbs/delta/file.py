"""A file of full differences: the names of the tensors, their rounding, and the room for the header."""

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
"""The format of full differences that most programs read: LyCORIS, ComfyUI, A1111, Forge."""
LONGER: Final = 200
"""Bytes by which a parameter's name may be longer in one format than in another."""
PARTS: Final = 4
"""Parts into which a format may cut a module."""
OWN_NAMES: Final = "the model's own names"


@dataclass(frozen=True, slots=True)
class Naming:
    """The names of the tensors: as `target` spells them, each module where `routes` says, or, without a target, as the model
    names them; `reasons` say why some modules have no place."""

    target: Format | None
    arch: str
    routes: Mapping[Module, Route] = field(default_factory=dict)
    reasons: Mapping[Module, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The format in words."""
        return self.target.title if self.target else OWN_NAMES

    def groups(self, source: DeltaSource) -> list[list[int]]:
        """Numbers of the changes to write, in groups: what becomes one tensor has to be computed together."""
        together: dict[object, list[int]] = {}
        for number in range(source.count):
            module, parameter = source.place(number)
            if module not in self.reasons:
                together.setdefault((self._whole(module) or module, parameter), []).append(number)
        return list(together.values())

    def tensors(self, parts: Sequence[tuple[Module, str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that the changes of a group become, by name."""
        if self.target is None:
            return {f"{_path(module)}.{_leaf(parameter)}": dense for module, parameter, dense in parts}
        changes = [Change(module, parameter, Full(dense, _leaf(parameter))) for module, parameter, dense in parts]
        adapter = Adapter(Path(), tuple(changes), {})
        return spell_adapter(rename_changes(changes, self.routes), self.target, adapter).tensors

    def _whole(self, module: Module) -> object:
        """The stacked module in the target that takes up `module` or a part of it; None where there is none."""
        route = self.routes.get(module)
        links = [whole for whole, link in route.targets if link and len(link.parts) > 1] if route else []
        return (route.prefix, links[0]) if route and links else None


def naming_of(source: DeltaSource, to: str | None, arch: str | None) -> Naming:
    """The names of the differences; raises `LoratoolError` where the format that is asked for cannot hold differences."""
    modules = list(dict.fromkeys(source.place(number)[0] for number in range(source.count)))
    target = format_named(to) if to else None
    if target and "diff" not in target.leaves:
        raise Unsupported(f"{target.title} has no place for full differences; `to='kohya'`, or comfyui, has")
    if isinstance(source, AdapterDeltas):
        return _of_adapter(source, target, arch)
    assert isinstance(source, CheckpointDeltas)
    found = archs_of_base(source.base.layout, modules, arch)
    target = target or format_named(USUAL)
    # Without a table nobody knows kohya's names of the modules, or where they are cut: they keep their own.
    if to is None and (found[0] not in ARCHS or not target.holds(found[0].name)):
        return Naming(None, found[0].title)
    chosen, routes, reasons = resolve_base_routes(modules, found, target)
    # Nobody reads bare parameters under flattened names, except Wan's modulation (diff_m); and OpenCLIP stores its
    # text_projection transposed.
    nameless = {
        pair.module: f"{target.title} has no place for a parameter of no module"
        for pair in source.pairs
        if pair.raw and (target.flat or pair.module.component in ENCODERS) and not pair.module.path.endswith("modulation")
    }
    return Naming(target, chosen.title, routes, {**nameless, **reasons})


def _of_adapter(source: AdapterDeltas, target: Format | None, arch: str | None) -> Naming:
    """The names of an adapter's differences: in `target`, else in the adapter's own format if that has differences."""
    adapter = replace(source.adapter, changes=tuple(source.changes))
    if target is None:
        try:
            own = format_of(adapter.keys)
        except LoratoolError:
            own = format_named(USUAL)
        target = own if "diff" in own.leaves else format_named(USUAL)
        # Behind PEFT's container stand the wrapped model's own names, which the differences keep.
        if own.whole is not None and any(change.module.stem.startswith(CONTAINER) for change in source.changes):
            return Naming(None, "a language model")
    found: Arch
    found, routes = resolve_routes([adapter.keys], target, Hints(arch))
    if found.name == LLM and not target.holds(LLM):
        return Naming(None, found.title)
    return Naming(target, found.title, routes)


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The tensors of some changes as they are stored, and the square of what rounding lost of them."""

    entries: tuple[TensorBytes, ...]
    lost: float


def store_parts(naming: Naming, parts: Sequence[tuple[Module, str, Tensor]], dtype: torch.dtype) -> StoredTensors:
    """The tensors of a group rounded to the dtype of the file; raises `NonFinite` where a number overflows that dtype."""
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
    """An upper estimate of the header's bytes, with a name for every part of every change."""
    # The header is written last, into this room, and must fit. 4 KiB are for the metadata, which names no modules.
    stems = (source.place(number)[0].stem for number in range(source.count))
    return 4096 + sum(PARTS * (ENTRY_BYTES + LONGER + 2 * len(json.dumps(stem))) for stem in stems)


def provenance(**said: object) -> dict[str, str]:
    """The metadata of the file, without times or paths, so that equal runs write equal bytes."""
    return history_entry("delta", (), {}, **said) | {"format": "pt"}


def _leaf(parameter: str) -> str:
    """The leaf of a difference to a parameter."""
    return "diff_b" if parameter == BIAS else "diff"


def _path(module: Module) -> str:
    """The model's own name of a module, without PEFT's container."""
    return module.stem.removeprefix(CONTAINER)
