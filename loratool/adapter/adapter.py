"""An adapter in memory: every module's deltas, whatever format the file had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from loratool.base.base import BaseCheckpoint
from loratool.deltas.base import Delta
from loratool.deltas.schema import ANY
from loratool.files.adapter_files import AdapterFile
from loratool.files.output import Input
from loratool.keys.listing import AdapterKeys
from loratool.names import CONTAINER, Module
from loratool.numbers.workload import OPERATIONS_OF_FACTORS, Workload

ONLY_PEFT: Final = "is a LoRA on stacked experts, which only a PEFT folder holds (target_parameters); merge it instead"
"""Why no other format has a place for stacked experts, and what to do."""


@dataclass(frozen=True, slots=True)
class Change:
    """One delta and what it acts on: the `parameter`, "weight" or "bias", of a module.

    The target of an `optional` change may be missing. `per_expert` is the same change for a base that stores experts one by
    one. `keys` are the names of the delta's tensors in the file. A `zero` change certainly adds nothing.
    """

    module: Module
    parameter: str
    delta: Delta
    optional: bool = False
    per_expert: tuple[Change, ...] = ()
    keys: tuple[str, ...] = ()
    zero: bool = False

    @property
    def stem(self) -> str:
        """The stem that names the change; for stacked experts the parameter's, not that of the module with the tensors."""
        return CONTAINER + self.module.path if self.delta.stacked else self.module.stem

    def __str__(self) -> str:
        return str(self.module) if self.parameter == "weight" else f"{self.module} (bias)"


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What some files do not say: the alpha of all modules, and which slots of a fused weight loralib trained."""

    alpha: float | None = None
    slots: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Adapter:
    """The changes that an adapter makes, in the order in which those to one weight are to be made.

    `tied` says that the model's embedding and head are one (PEFT's ensure_weight_tying). `extras` are tensors that travel
    with the adapter and change no weight, `alphas` the file's own alphas, both by key. `config` is PEFT's
    adapter_config.json, if there is one, and `file` what was read, None for an adapter that was computed; `assume` is what
    was assumed of it.
    """

    path: Path
    changes: tuple[Change, ...]
    metadata: Mapping[str, str]
    tied: bool = False
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    alphas: Mapping[str, Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    file: AdapterFile | None = None
    assume: Assumptions = field(default_factory=Assumptions)

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that the adapter changes, each once, in order."""
        return tuple(dict.fromkeys(change.module for change in self.changes))

    @property
    def keys(self) -> AdapterKeys:
        """The names in the file that the adapter was read from, and the widths of the weights that it changes."""
        widths: dict[Module, int | None] = {}
        keys: dict[Module, tuple[str, ...]] = {}
        for change in self.changes:
            shape = change.delta.shape
            # A bias, or a delta that leaves its inputs to the weight, tells no width.
            width = shape[1] if len(shape) > 1 and shape[1] != ANY else None
            widths[change.module] = widths.get(change.module) or width
            keys[change.module] = (*keys.get(change.module, ()), *change.keys)
        return AdapterKeys(self.path, widths, keys, self.metadata, has_config=bool(self.config))


def factor_workload(adapters: Iterable[Adapter]) -> Workload:
    """The work of decomposing the factors of all changes of `adapters`."""
    read, products = 0, 0.0
    for change in (change for adapter in adapters for change in adapter.changes):
        rows, *others = change.delta.shape or (1,)
        sides = rows, prod(others)
        products += OPERATIONS_OF_FACTORS * sum(sides) * (change.delta.rank or max(min(sides), 1)) ** 2
        read += sum(tensor.nbytes for tensor in change.delta.leaves().values())
    return Workload(read, products=products)


def files_of(adapters: Iterable[Adapter]) -> list[AdapterFile]:
    """The files that `adapters` were read from, without adapters that were computed."""
    return [adapter.file for adapter in adapters if adapter.file]


def inputs_of(adapters: Iterable[Adapter], *bases: BaseCheckpoint | None) -> list[Input]:
    """What an output is made of: the files of `adapters`, and the checkpoints that were asked about them."""
    return [*files_of(adapters), *(base.layout for base in bases if base)]


def require_unchanged(adapters: Iterable[Adapter]) -> None:
    """Raises `InvalidFile` where the file of one of `adapters` was changed since it was read."""
    for file in files_of(adapters):
        file.require_unchanged()
