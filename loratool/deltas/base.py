"""What every delta can do. A delta is one module's change to one weight: a value that knows nothing of models.

Subclasses are final and frozen. All arithmetic is in float32 (float64 on weights stored so), whatever the factors are
stored in; whoever stores a result rounds it, once. `dense` and `apply` may be slow but are right: the oracle for `factors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import reduce
from math import frexp
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.schema import Given
from loratool.errors import Unsupported
from loratool.numbers.devices import send

Leaves = Mapping[str, Tensor]


class Delta(ABC):
    """One module's change to one weight of shape `shape`, (out, in, *kernel), where `ANY` is whatever the weight has."""

    kind: ClassVar[str]
    additive: ClassVar[bool] = True
    """Whether the delta adds the same matrix to any weight, so that deltas may be summed."""
    replaces: ClassVar[bool] = False
    """Whether the delta puts a value in the weight's place, so that other deltas on the weight must come after it."""
    reshapes: ClassVar[bool] = False
    """Whether the delta may give the weight another shape."""
    stored_whole: ClassVar[bool] = False
    """Whether the delta is stored as a difference as large as the weight."""
    stacked: ClassVar[bool] = False
    """Whether the delta is of a weight that stacks those of several experts."""
    of_embedding: ClassVar[bool] = False
    """Whether the factors are those that PEFT has for embeddings."""
    fits_lora_file: ClassVar[bool] = False
    """Whether a file of LoRA can hold the delta as it is."""
    resizable: ClassVar[bool] = False
    """Whether the delta is a plain LoRA, whose rank may be changed."""
    becomes_lora: ClassVar[bool] = True
    """Whether a LoRA can stand for what the delta does to a weight."""
    scaled_by_config: ClassVar[bool] = False
    """Whether the scale of the delta is in the config of PEFT's LoRA."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that the delta changes."""

    @abstractmethod
    def leaves(self) -> dict[str, Tensor]:
        """The tensors of the delta, by the names that `schema` has for them."""

    @abstractmethod
    def dense(self) -> Tensor:
        """ΔW in float32, of shape `shape`; raises `NeedsBase` where ΔW depends on the weight."""

    @abstractmethod
    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """The deltas of `sizes` consecutive output rows each; raises `Unsupported` where only the base could give them."""

    @abstractmethod
    def scaled(self, by: float) -> Self:
        """The delta of `by` · ΔW; raises `NeedsBase` where the kind has no multiples."""

    @property
    def scale(self) -> float | None:
        """The number that multiplies the product of the factors: alpha over rank; None where the file gives none."""
        return None

    @property
    def rank(self) -> int | None:
        """The rank of the two factors; None for a kind that is not such a pair."""
        return None

    @property
    def shares_scale(self) -> bool:
        """Whether the file has one scale for this delta and for others, which must be 1 after a sum."""
        return False

    @property
    def acts_on_tied_head(self) -> bool:
        """Whether the delta of an embedding is of the output layer too, where the two are tied."""
        return False

    def shared(self) -> Delta:
        """The same delta as one of all weights that are tied to its own; unchanged for a kind that only training makes."""
        return self

    @property
    def experts(self) -> int:
        """How many experts' weights the delta's weight stacks; 0 for other kinds."""
        return 0

    @property
    def stack_rule(self) -> str:
        """The rule for the axes of stacked experts' factors (`formats.peft`); "" where nobody says, and for other kinds."""
        return ""

    @property
    def changes_bias(self) -> bool:
        """Whether the delta does to the module's bias, if there is one, what it does to the weight."""
        return False

    def assumptions(self) -> tuple[str, ...]:
        """What was taken for granted, in words, because the file does not say it."""
        return ()

    def may_reshape(self, weight: Sequence[int]) -> bool:
        """Whether the delta may turn a weight of the shape `weight` into one of `shape`."""
        return False

    def per_expert(self) -> Sequence[Delta]:
        """The same change as a delta for each expert of a stacked weight; empty for other kinds."""
        return ()

    def turn(self) -> Delta:
        """The same factors on stacked experts that are stored the other way round; unchanged for other kinds."""
        return self

    def fitted(self, weight: Sequence[int]) -> Delta:
        """The same delta for a weight of the shape `weight`; raises `InvalidAdapter` where it cannot be for that weight."""
        return self

    def padded(self, rank: int) -> Delta:
        """The same delta with zeros up to `rank`; unchanged for a kind that is no pair of factors."""
        return self

    def rounded(self, dtype: torch.dtype) -> Delta | None:
        """The same delta in another dtype, scale included and rounded once; None for a kind that is kept as it is."""
        return None

    def materialise(self) -> Delta:
        """The delta itself; the result, for a delta that so far only says how to compute it."""
        return self

    @property
    def kernel_flattened(self) -> bool:
        """Whether files of the kind flatten kernels, which only the weight knows then: `shape` is (out, in · kernel)."""
        return False

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """`weight` changed at `strength`, in float32."""
        return to_compute_dtype(weight) + strength * self.dense().reshape(weight.shape)

    def equivalent_forms(self) -> Iterator[Delta]:
        """The delta itself, and equal deltas that are made of other leaves: not every format has a place for each."""
        yield self

    def folded(self) -> Delta:
        """The same ΔW with the scale inside the factors, in float32 where their own dtype would round the product."""
        if self.scale in (None, 1.0):
            return self
        raise Unsupported(f"a {self.kind} cannot hold its own scale")

    def without_zero_ranks(self) -> Delta | None:
        """The same ΔW without ranks that add nothing; None where ΔW is zero."""
        return self

    def stack_with(self, parts: Sequence[Self]) -> Delta:
        """The delta whose rows are those of `parts`, one of which is this one; raises `Unsupported` where it has no form."""
        raise Unsupported(f"a {self.kind} on the parts of a stacked weight has no common form")

    def nothing(self, rows: int) -> Delta:
        """A part of `rows` rows that changes nothing, to be stacked with this delta; raises `Unsupported` without one."""
        raise Unsupported(f"a {self.kind} on some parts of a stacked weight only has no common form")

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Exact (up, down) in float32 with the scale inside, (out, r) and (r, in · kernel); None where there are none."""
        return None


class StoredDelta(Delta):
    """A kind of delta that files hold."""

    @classmethod
    @abstractmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        """Builds the delta from its tensors, and from what the file or the user says beside them; raises `InvalidAdapter` or
        `Unsupported`."""


def stack(parts: Sequence[Delta]) -> Delta:
    """The delta whose output rows are those of `parts`, one after the other: the inverse of `split`, exact.

    Raises `Unsupported` where the parts are of several kinds, or of a kind that has no such form.
    """
    if len({type(part) for part in parts}) > 1:
        raise Unsupported(f"deltas of kind {', '.join(sorted({part.kind for part in parts}))} have no common form")
    return parts[0].stack_with(parts)


def to_compute_dtype(weight: Tensor) -> Tensor:
    """A weight in the dtype of all arithmetic on it: float32, or float64 where the weight is stored so."""
    return weight if weight.dtype == torch.float64 else weight.float()


def split_rows(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """`tensor` in pieces of `sizes` along `dim`."""
    return torch.split_with_sizes(tensor, list(sizes), dim)


def with_rows(tensor: Tensor, count: int, dim: int = 0) -> Tensor:
    """`tensor` with zeros behind its rows, up to `count`."""
    shape = list(tensor.shape)
    shape[dim] = count - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def with_columns(tensor: Tensor, count: int) -> Tensor:
    """`tensor` with zeros behind its columns, up to `count`."""
    return with_rows(tensor, count, 1)


def scale_or_one(scale: float | None) -> float:
    """A scale as a number: 1 where the file gives none."""
    return 1.0 if scale is None else scale


def scale_exactly(tensor: Tensor, scale: float | None) -> Tensor:
    """`tensor` multiplied by `scale`, in its own dtype where that is exact, else in float32."""
    if scale in (None, 1.0):
        return tensor
    # By way of float64, or a scale such as 1/3 would be rounded to float32 before the product is.
    product = tensor.double().mul_(scale).float()
    if tensor.dtype == torch.float32 or abs(frexp(scale)[0]) != 0.5:
        return product
    # A power of two: exact in any dtype, but for numbers that the product takes out of range.
    narrow = product.to(tensor.dtype)
    return narrow if torch.equal(narrow.float(), product) else product


def to_device(delta: Delta, device: torch.device) -> Delta:
    """The same delta with its tensors on `device`, those of inner deltas included."""
    # Tensors are fields, parts of tuples, or fields of an inner delta; other fields stay as they are.
    found = {
        field.name: _to_device(value, device)
        for field in fields(delta)  # type: ignore[arg-type]
        if isinstance(value := getattr(delta, field.name), Tensor | Delta | tuple)
    }
    return replace(delta, **found) if found else delta  # type: ignore[type-var]


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Delta):
        return to_device(value, device)
    if isinstance(value, tuple):
        return tuple(_to_device(item, device) for item in value)
    return send(value, device) if isinstance(value, Tensor) else value


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same dtype and shape."""
    # torch.equal compares by value, and calls equal numbers of two dtypes the same.
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def to_common_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the one dtype that holds all their numbers."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(dtype) for tensor in tensors]


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The matrix with `blocks` along its diagonal, in a dtype that holds all their numbers; blocks may have no columns."""
    dtype = reduce(torch.promote_types, (block.dtype for block in blocks))
    whole = torch.zeros(sum(map(len, blocks)), sum(block.shape[1] for block in blocks), dtype=dtype, device=blocks[0].device)
    row = column = 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return whole
