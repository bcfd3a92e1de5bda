"""An adapter in memory: every module's deltas, whatever format the file had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from torch import Tensor

from loratool.checkpoint import FLOATS, TensorFile
from loratool.deltas import KINDS, Delta
from loratool.errors import InvalidAdapter, LoratoolError, NonFinite, Unsupported
from loratool.formats.reading import Group, Listing, listing, locate, read_listing, require_adapter
from loratool.header import TensorInfo, read_scalars
from loratool.names import Module
from loratool.pickles import PICKLE_SUFFIXES, unpickled
from loratool.schema import Part


@dataclass(frozen=True, slots=True)
class Change:
    """One delta and what it acts on: `parameter` is "weight" or "bias"."""

    module: Module
    parameter: str
    delta: Delta

    def __str__(self) -> str:
        return str(self.module) if self.parameter == "weight" else f"{self.module} (bias)"


@dataclass(frozen=True, slots=True)
class Adapter:
    """The changes that an adapter makes, in the order in which those to one weight are to be made.

    `tied` says that its embedding and head are one (PEFT's ensure_weight_tying).
    """

    path: Path
    changes: tuple[Change, ...]
    metadata: Mapping[str, str]
    tied: bool = False


def load(path: str | Path, *, allow_pickle: bool = False) -> Adapter:
    """Reads the adapter at `path`, a safetensors file or a PEFT folder, wholly and checked.

    Raises `LoratoolError`: every tensor must be explained, every factor finite, every alpha a number. A pickle (`.bin`)
    is refused unless `allow_pickle`, and is then read in a process of its own that may build nothing but tensors.
    """
    path = Path(path).expanduser()
    weights, config = locate(path)
    if allow_pickle and weights.suffix in PICKLE_SUFFIXES:
        with unpickled(weights) as header:
            return _load(listing(path, header, config))
    return _load(read_listing(path))


def _load(found: Listing) -> Adapter:
    require_adapter(found)
    alphas = dict(read_scalars(found.header, [group.leaves["alpha"] for group in found.groups if "alpha" in group.leaves]))
    changes: list[Change] = []
    with TensorFile(found.header) as file:
        for group in found.groups:
            try:
                changes += _changes(found, group, file, alphas)
            except LoratoolError as error:
                raise type(error)(f"{found.path}: {group.module}: {error}") from error
    tied = any(config.tied for config in found.configs.values())
    return Adapter(found.path, tuple(changes), found.header.metadata, tied)


def _changes(found: Listing, group: Group, file: TensorFile, alphas: Mapping[str, float | None]) -> list[Change]:
    parts = group.parts()
    rank = next((part.rank for part in parts if part.rank is not None), None)
    alpha = effective_alpha(found, group, rank, alphas)
    # What replaces a weight comes before what is added to it.
    ordered = sorted(parts, key=lambda part: part.kind.name != "replace")
    changes = []
    for part in ordered:
        tensors = {leaf: _read(file, group.leaves[leaf]) for leaf in part.leaves if leaf != "alpha"}
        changes.append(Change(group.module, part.kind.parameter, delta_of(part, tensors, alpha, rank)))
    return changes


def delta_of(part: Part, tensors: Mapping[str, Tensor], alpha: float | None, rank: int | None) -> Delta:
    """The delta of one part; `alpha` and `rank` are those of its module's factors, whose scale a bias shares."""
    if part.kind.name not in KINDS:
        raise Unsupported(f"is of kind {part.kind.name}, which this version reads but cannot compute")
    if part.kind.name == "lora bias":
        alpha = None if alpha is None or rank is None else alpha / rank
    elif part.kind.name == "full":
        alpha = None
    return KINDS[part.kind.name].from_leaves(tensors, alpha)


def _read(file: TensorFile, info: TensorInfo) -> Tensor:
    if info.dtype not in FLOATS:
        raise Unsupported(f"{info.name} has dtype {info.dtype}, expected floating-point numbers")
    tensor = file.read(info)
    if not isfinite(float(tensor.float().sum())) and not bool(tensor.float().isfinite().all()):
        raise NonFinite(f"{info.name} holds NaN or Inf")
    return tensor


def effective_alpha(found: Listing, group: Group, rank: int | None, alphas: Mapping[str, float | None]) -> float | None:
    """The alpha that makes alpha / rank the scale: the file's own, else the config's; None for scale 1."""
    info = group.leaves.get("alpha")
    if info is not None:
        alpha = alphas[info.name]
        if alpha is None or not isfinite(alpha):
            what = f"of shape {list(info.shape)}" if alpha is None else str(alpha)
            raise InvalidAdapter(f"{info.name}: alpha is {what}, expected one finite number")
        return alpha
    config = found.config(group.module)
    if config is None or rank is None:
        return None
    expected = config.rank_of(group.module.path)
    if expected and expected != rank:
        raise InvalidAdapter(
            f"its tensors have rank {rank}, {config.where} says {expected}; correct r or rank_pattern there"
        )
    return config.scale(group.module.path, rank) * rank
