"""`convert --to-lora` and `resize`: deltas as the best LoRA of some rank or error, and what that leaves out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from loratool.adapter import Adapter, Change, Unsaid, load
from loratool.checkpoint import DTYPE_NAMES, DTYPES, Checkpoint, TensorFile, tensor_bytes
from loratool.deltas import Embedding, LoRA
from loratool.errors import LoratoolError, NeedsBase, NonFinite, ShapeMismatch, Unsupported
from loratool.formats.leaves import CONTAINER
from loratool.formats.peft import CONFIG_NAME
from loratool.formats.reading import WEIGHTS, locate
from loratool.header import TensorInfo, encode_header, read_header, read_json
from loratool.linalg import balanced, factored_svd, leading_svd, rank_within, singular_values
from loratool.names import Module
from loratool.output import Output, Writer
from loratool.schema import BIAS, WEIGHT
from loratool.targets import Targets

KEPT: Final = frozenset({"lora", "embedding", "enlarge", "replace", "tokens"})
"""Kinds that a LoRA file holds as they are."""
RESIZED: Final = frozenset({"lora"})
"""Of these, the kind whose rank can be another."""
LEAF_NAMES: Final[Mapping[bool, tuple[str, str]]] = {
    False: ("lora_down.weight", "lora_up.weight"),
    True: ("lora_A.weight", "lora_B.weight"),
}
"""kohya's spelling, and PEFT's for dotted names."""


CARRIED: Final = (
    "base_model_name_or_path", "revision", "task_type", "bias", "lora_bias", "modules_to_save", "fan_in_fan_out",
    "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
"""What a LoRA's config says that a conversion does not change."""


@dataclass(frozen=True, slots=True)
class Converted:
    """One module that became a LoRA: its kind before, its rank now, ‖ΔW‖, and ‖ΔW − LoRA‖ / ‖ΔW‖."""

    name: str
    kind: str
    rank: int
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class LowRankReport:
    """What a conversion did: every module that changed its kind, how many did not, and the error over all of them."""

    out: str
    modules: tuple[Converted, ...]
    kept: int
    error: float
    nbytes: int
    warnings: tuple[str, ...] = ()

    @property
    def worst(self) -> Converted | None:
        """The module with the largest error."""
        return max(self.modules, key=lambda module: module.error, default=None)


@dataclass(frozen=True, slots=True)
class Rule:
    """How much to keep: `rank`, or the least rank whose relative error is at most `max_error`, or all there is.

    `dtype`, a safetensors name, is what factors are stored in; None is each module's own.
    """

    rank: int | None = None
    max_error: float | None = None
    dtype: str | None = None


def to_lora(
    path: str | Path,
    out: str | Path,
    rule: Rule | None = None,
    *,
    base: str | Path | None = None,
    unsaid: Unsaid | None = None,
    overwrite: bool = False,
) -> LowRankReport:
    """Writes the adapter at `path` to `out` with every delta on a matrix or a kernel as a LoRA.

    What is a LoRA already keeps its bytes. Kinds that depend on the weight (DoRA, OFT, (IA)³ …) need `base`. Errors are
    those of the factors as stored. Raises `LoratoolError`.
    """
    return _approximated(load(path, unsaid=unsaid), Path(out), rule or Rule(), KEPT, base=base, overwrite=overwrite)


def resize(
    path: str | Path,
    out: str | Path,
    rule: Rule,
    *,
    base: str | Path | None = None,
    unsaid: Unsaid | None = None,
    overwrite: bool = False,
) -> LowRankReport:
    """Writes the adapter at `path` to `out` with every LoRA, and every other kind as a LoRA, of the rank that `rule` gives.

    The best approximation at that rank (Eckart and Young 1936), from QR of the factors and the SVD of their small core.
    """
    return _approximated(load(path, unsaid=unsaid), Path(out), rule, KEPT - RESIZED, base=base, overwrite=overwrite)


def _approximated(
    adapter: Adapter, out: Path, rule: Rule, keep: frozenset[str], *, base: str | Path | None, overwrite: bool
) -> LowRankReport:
    weights = _Weights(Path(base).expanduser()) if base else None
    converted: list[Converted] = []
    kept: list[Change] = []
    tensors: dict[str, Tensor] = {}
    for change in adapter.changes:
        if change.optional:
            _refuse_bias(change, weights)
        elif change.delta.kind in keep or change.parameter == BIAS or len(change.delta.shape) < 2:
            kept.append(change)
        else:
            effective = _effective(change, weights)
            up, down, figures = _low_rank(change, effective, rule)
            converted.append(figures)
            tensors |= _named(change, up, down, effective.shape)
    tensors |= _as_they_were(adapter, kept) | _biases(kept, {module.name for module in converted})
    nbytes = _save(adapter, tensors, kept, converted, out.expanduser(), overwrite=overwrite)
    left = sum((module.error * module.norm) ** 2 for module in converted) ** 0.5
    whole = sum(module.norm**2 for module in converted) ** 0.5
    return LowRankReport(str(out), tuple(converted), len(kept), left / whole if whole else 0.0, nbytes, adapter.notes)


class _Weights:
    """The base's weights by an adapter's module, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint(path)
        self.targets = Targets(self.checkpoint.layout)

    def of(self, module: Module) -> Tensor:
        """The module's weight, (out, in, *kernel); raises `LoratoolError` where the base has none."""
        places = self.targets.find(module, WEIGHT)
        if not places:
            raise LoratoolError(f"{module}: has no weight in {self.checkpoint.layout.root}")
        rows = []
        for place in places:
            stored = self.checkpoint[place.tensor]
            rows.append((stored.T if place.transposed else stored)[place.start : place.stop : place.step])
        return torch.cat(rows)


def _refuse_bias(change: Change, weights: _Weights | None) -> None:
    """PEFT's (IA)³ multiplies the bias of a layer that has one, which a LoRA cannot."""
    if weights is None:
        raise NeedsBase(f"{change}: may multiply a bias, which only the base can tell; pass --base")
    if weights.targets.find(change.module, BIAS):
        raise Unsupported(f"{change}: (IA)³ multiplies this layer's bias too, which a LoRA cannot hold; merge it instead")


@dataclass(frozen=True, slots=True)
class _Effective:
    """What a delta adds, as exact factors or as a dense matrix, and the shape of the weight."""

    shape: tuple[int, ...]
    factors: tuple[Tensor, Tensor] | None
    dense: Tensor | None


def _effective(change: Change, weights: _Weights | None) -> _Effective:
    delta = change.delta
    if change.apart:
        raise Unsupported(f"{change}: is a LoRA on stacked experts, which only PEFT's target_parameters can hold")
    if delta.additive:
        shape = tuple(weights.of(change.module).shape) if weights and delta.flattened else delta.shape
        factors = delta.factors()
        if factors is not None and 2 * factors[0].shape[1] <= min(factors[0].shape[0], factors[1].shape[1]):
            return _Effective(shape, factors, None)
        return _Effective(shape, None, delta.dense().flatten(1))
    if weights is None:
        raise NeedsBase(f"{change}: what a delta of kind {delta.kind} adds depends on its weight; pass --base")
    weight = weights.of(change.module).float()
    try:
        return _Effective(tuple(weight.shape), None, (delta.apply(weight) - weight).flatten(1))
    except RuntimeError as error:
        raise ShapeMismatch(
            f"{change}: does not fit its weight of {list(weight.shape)}: is the base another model?"
        ) from error


def _low_rank(change: Change, delta: _Effective, rule: Rule) -> tuple[Tensor, Tensor, Converted]:
    """(up, down) as they are to be stored, and how far their product is from the delta."""
    if delta.factors is not None:
        left, sigma, right = factored_svd(*delta.factors)
        norm = float(sigma.double().norm())
    else:
        assert delta.dense is not None
        norm = float(torch.linalg.vector_norm(delta.dense, dtype=torch.float64))
        left, sigma, right = _enough(delta.dense, norm, rule)
    kept = min(_rank(sigma, norm, rule), len(sigma))
    dtype = DTYPES[rule.dtype] if rule.dtype else _widest(change)
    up, down = (factor.to(dtype) for factor in balanced(left, sigma, right, kept))
    if not bool(up.isfinite().all() and down.isfinite().all()):
        raise NonFinite(f"{change}: its factors overflow {DTYPE_NAMES[dtype]}; choose --dtype float32 or bfloat16")
    left_out = _distance(delta, up.float(), down.float())
    return up, down, Converted(str(change), change.delta.kind, kept, norm, left_out / norm if norm else 0.0)


def _distance(delta: _Effective, up: Tensor, down: Tensor) -> float:
    """‖ΔW − up · down‖, of the factors as stored."""
    if delta.factors is None:
        assert delta.dense is not None
        return float(torch.linalg.vector_norm(delta.dense - up @ down, dtype=torch.float64))
    ups, downs = torch.cat([delta.factors[0], -up], dim=1), torch.cat([delta.factors[1], down])
    return float(singular_values(ups, downs).norm())


def _widest(change: Change) -> torch.dtype:
    """The dtype of the change's own factors, the widest where they differ."""
    dtypes = [tensor.dtype for tensor in change.delta.leaves().values() if tensor.is_floating_point()]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _enough(dense: Tensor, norm: float, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """As many singular values as the rule needs: those of the rank, or twice as many until the error is met."""
    smaller = min(dense.shape)
    if rule.max_error is None:
        return leading_svd(dense, rule.rank or smaller)
    wanted = 16
    while wanted < smaller:
        found = leading_svd(dense, wanted)
        if rank_within(found[1], norm, rule.max_error):
            return found
        wanted *= 2
    return leading_svd(dense, smaller)


def _rank(sigma: Tensor, norm: float, rule: Rule) -> int:
    if rule.max_error is not None:
        return rank_within(sigma, norm, rule.max_error) or len(sigma)
    if rule.rank is not None:
        return rule.rank
    # Without a rule, all that is more than float32's noise.
    return max(1, int((sigma > 1e-6 * sigma[0]).sum())) if len(sigma) else 1


def _named(change: Change, up: Tensor, down: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The factors under the names that the adapter's own spelling of the module calls for."""
    stem, kernel = change.module.stem, shape[2:]
    if "embedding_down" in change.delta.leaves():
        # PEFT adds the product of an embedding's factors transposed.
        return {f"{stem}.lora_embedding_A": up.T.contiguous(), f"{stem}.lora_embedding_B": down.T.contiguous()}
    dotted = "." in stem
    down_name, up_name = LEAF_NAMES[dotted]
    ones = (1,) * len(kernel)
    tensors = {
        f"{stem}.{down_name}": down.reshape(len(down), -1, *kernel).contiguous(),
        f"{stem}.{up_name}": up.reshape(*up.shape, *ones).contiguous(),
    }
    return tensors if dotted else tensors | {f"{stem}.alpha": torch.tensor(float(len(down)))}


def _as_they_were(adapter: Adapter, kept: Sequence[Change]) -> dict[str, Tensor]:
    """The tensors of changes that stay what they are, and of passengers, under their own names and to the byte."""
    header = read_header(locate(adapter.path)[0])
    names = [*(name for change in kept for name in change.keys), *adapter.passengers]
    with TensorFile(header) as file:
        return {name: file.read(header.tensors[name]) for name in names}


def _biases(kept: Sequence[Change], converted: set[str]) -> dict[str, Tensor]:
    """Biases of LoRA modules that were rewritten, with their scale in them: the new factors have it in theirs."""
    return {
        change.keys[0]: change.delta.dense()
        for change in kept
        if change.keys[0].endswith(".lora_B.bias") and str(change.module) in converted
    }


def _save(
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    kept: Sequence[Change],
    converted: Sequence[Converted],
    out: Path,
    *,
    overwrite: bool,
) -> int:
    config = _config(adapter, tensors, kept)
    infos, position = {}, 0
    # safetensors' own order: dtypes from wide to narrow, then names, so that hashes agree with other writers'.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        infos[name] = TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), position, position + size)
        position += size
    raw = encode_header(infos, dict(_metadata(adapter.metadata, converted)))
    nbytes = len(raw) + position
    folder = config is not None
    with Output(out, folder=folder, overwrite=overwrite, nbytes=nbytes, inputs=[adapter.path]) as output:
        with Writer(output.path(WEIGHTS[0] if folder else ""), nbytes) as writer:
            writer.write(raw, 0)
            for name, info in infos.items():
                writer.write(tensor_bytes(tensors[name].contiguous()), len(raw) + info.start)
        if folder:
            output.path(CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        output.commit()
    return nbytes


def _metadata(metadata: Mapping[str, str], converted: Sequence[Converted]) -> Iterator[tuple[str, str]]:
    """The metadata of the source, without what is no longer true of it."""
    yield from ((key, value) for key, value in metadata.items() if not key.startswith("sshs_"))
    if "ss_network_module" in metadata:
        ranks = {module.rank for module in converted}
        yield "ss_network_module", "networks.lora"
        yield "ss_network_dim", str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        yield "ss_network_alpha", metadata.get("ss_network_alpha", "") if not ranks else "Dynamic"
        yield "ss_network_args", "{}"


def _config(adapter: Adapter, tensors: Mapping[str, Tensor], kept: Sequence[Change]) -> dict[str, Any] | None:
    """adapter_config.json of a PEFT folder: LoRA, with each module's own rank, and an alpha that leaves its scale alone."""
    if not any(name.startswith(CONTAINER) for name in tensors):
        return None
    before = read_json(adapter.path / CONFIG_NAME) if (adapter.path / CONFIG_NAME).exists() else {}
    ranks = {
        name.removesuffix(suffix).removeprefix(CONTAINER): tensor.shape[0]
        for suffix in (".lora_A.weight", ".lora_embedding_A")
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    }
    alphas: dict[str, float] = dict(ranks)
    for change in kept:
        if isinstance(change.delta, LoRA | Embedding):
            path = change.module.stem.removeprefix(CONTAINER)
            alphas[path] = change.delta.rank * (1.0 if change.delta.scale is None else change.delta.scale)
    largest = max(ranks.values(), default=1)
    carried: dict[str, Any] = {key: before[key] for key in CARRIED if key in before}
    return {
        "bias": "none",
        **carried,
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "target_modules": sorted(ranks),
        "rank_pattern": {f"^{name}": rank for name, rank in sorted(ranks.items()) if rank != largest},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in sorted(alphas.items()) if alpha != largest},
        "inference_mode": True,
    }
