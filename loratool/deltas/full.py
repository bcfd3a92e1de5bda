"""Changes that are stored whole: a difference to add, a value in the weight's place, single rows, and a larger weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from loratool.deltas.base import (
    Delta,
    Leaves,
    StoredDelta,
    scale_exactly,
    scale_or_one,
    split_rows,
    to_compute_dtype,
    with_rows,
)
from loratool.deltas.schema import ANY, Given
from loratool.errors import InvalidAdapter, NeedsBase, Unsupported


@dataclass(frozen=True, slots=True)
class Full(StoredDelta):
    """`difference`, of the weight's shape, times `scale`; `leaf` is the name it is stored under (diff, diff_b, w_norm …).

    PEFT's lora_B.bias is one of these, with the module's scale.
    """

    kind: ClassVar[str] = "full"
    stored_whole: ClassVar[bool] = True
    scaled_by_config: ClassVar[bool] = True

    difference: Tensor
    leaf: str = "diff"
    scale: float | None = None

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        ((leaf, difference),) = leaves.items()
        return cls(difference, leaf, given.scale)

    def leaves(self) -> dict[str, Tensor]:
        return {self.leaf: self.difference}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.difference.shape)

    @property
    def shares_scale(self) -> bool:
        """Whether the difference is PEFT's lora_B.bias, which has the scale of its module's factors."""
        return self.leaf == "bias_up"

    def dense(self) -> Tensor:
        return self.difference.float() * scale_or_one(self.scale)

    def rounded(self, dtype: torch.dtype) -> Full:
        return Full(self.dense().to(dtype), self.leaf)

    def scaled(self, by: float) -> Self:
        return replace(self, scale=by * scale_or_one(self.scale))

    def equivalent_forms(self) -> Iterator[Delta]:
        """The difference itself; PEFT's lora_B.bias also as a plain difference of the bias, which other formats have."""
        yield self
        if self.leaf == "bias_up":
            yield replace(self.folded(), leaf="diff_b")

    def folded(self) -> Full:
        return replace(self, difference=scale_exactly(self.difference, self.scale), scale=None)

    def without_zero_ranks(self) -> Full | None:
        return self if bool(self.difference.any()) else None

    def nothing(self, rows: int) -> Full:
        """A part of `rows` rows that adds nothing, to be stacked with this difference."""
        return replace(self, difference=self.difference.new_zeros(rows, *self.difference.shape[1:]))

    def stack_with(self, parts: Sequence[Self]) -> Full:
        # Unlike scales go into the differences; a common one stays beside them, and nothing is rounded.
        folded: Sequence[Full] = (
            parts if all(part.scale == self.scale for part in parts) else [part.folded() for part in parts]
        )
        return replace(folded[0], difference=torch.cat([part.difference for part in folded]))

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        return [replace(self, difference=rows) for rows in split_rows(self.difference, sizes)]


@dataclass(frozen=True, slots=True)
class Replace(StoredDelta):
    """`value` in the weight's place: PEFT's modules_to_save and trained biases. At a strength w: W + w · (value − W).

    One that nobody trained, such as an embedding that only grew, is `of_ties`: of the weights tied to it as well.
    """

    kind: ClassVar[str] = "replace"
    additive: ClassVar[bool] = False
    replaces: ClassVar[bool] = True
    reshapes: ClassVar[bool] = True
    fits_lora_file: ClassVar[bool] = True
    becomes_lora: ClassVar[bool] = False

    value: Tensor
    leaf: str = "weight"
    of_ties: bool = False

    @property
    def acts_on_tied_head(self) -> bool:
        return self.of_ties

    def shared(self) -> Replace:
        return replace(self, of_ties=True)

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        ((leaf, value),) = leaves.items()
        return cls(value, leaf)

    def leaves(self) -> dict[str, Tensor]:
        return {self.leaf: self.value}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def may_reshape(self, weight: Sequence[int]) -> bool:
        """Whether the weight differs in its rows at most: a vocabulary may grow."""
        # Single numbers have no rows that could be more or fewer.
        return len(weight) == len(self.shape) > 0 and self.shape[1:] == tuple(weight[1:])

    def dense(self) -> Tensor:
        raise NeedsBase("a replaced weight is no difference until the base is known")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        # At full strength the weight does not count, and may even have another shape.
        if strength == 1.0:
            return to_compute_dtype(self.value)
        if weight.shape != self.value.shape:
            raise Unsupported(f"replaces a weight of {list(weight.shape)} by one of {list(self.shape)}: only at strength 1")
        base = to_compute_dtype(weight)
        return base.lerp(self.value.to(base.dtype), strength)

    def scaled(self, by: float) -> Self:
        raise NeedsBase("a replaced weight cannot be scaled without its base; give a strength to merge instead")

    def equivalent_forms(self) -> Iterator[Delta]:
        """The value itself and, for a weight, under the names of PEFT, of ComfyUI and of BFL (for the weight of a norm)."""
        yield self
        if self.leaf != "bias":
            yield from (replace(self, leaf=leaf) for leaf in ("weight", "set_weight", "scale") if leaf != self.leaf)

    def stack_with(self, parts: Sequence[Self]) -> Replace:
        return replace(parts[0], value=torch.cat([part.value for part in parts]))

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        return [replace(self, value=rows) for rows in split_rows(self.value, sizes)]


@dataclass(frozen=True, slots=True)
class TokenRows(StoredDelta):
    """`rows` (n, width) in the place of the rows `tokens` of an embedding: PEFT's trainable_token_indices.

    PEFT calls them a delta, and stores the new values themselves (tuners/trainable_tokens/layer.py). Where they are all the
    rows that a vocabulary grew by, the embedding has `length` rows afterwards; 0 leaves its length alone.
    """

    kind: ClassVar[str] = "tokens"
    additive: ClassVar[bool] = False
    reshapes: ClassVar[bool] = True
    fits_lora_file: ClassVar[bool] = True
    becomes_lora: ClassVar[bool] = False

    rows: Tensor
    tokens: tuple[int, ...]
    length: int = 0

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        """Builds the delta with the tokens in `given`; raises `InvalidAdapter` unless there is a row for each of them."""
        rows, tokens = leaves["token_rows"], given.tokens
        if rows.ndim != 2 or len(tokens) != len(rows):
            raise InvalidAdapter(f"holds rows of shape {list(rows.shape)} for {len(tokens)} trainable_token_indices")
        return cls(rows, tokens)

    def leaves(self) -> dict[str, Tensor]:
        return {"token_rows": self.rows}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.length or ANY, self.rows.shape[1]

    @property
    def acts_on_tied_head(self) -> bool:
        """True: PEFT ties trained rows wherever the model ties its weights."""
        return True

    def may_reshape(self, weight: Sequence[int]) -> bool:
        return len(weight) == self.rows.ndim and self.length > weight[0] and self.rows.shape[1:] == tuple(weight[1:])

    def fitted(self, weight: Sequence[int]) -> TokenRows:
        """The same rows for a weight of the shape `weight`, which grows where they are all that it lacks.

        Raises `InvalidAdapter` where they are not.
        """
        new = sorted({token for token in self.tokens if token >= weight[0]})
        if not new:
            return self
        if new != list(range(weight[0], new[-1] + 1)):
            raise InvalidAdapter(
                f"trains token {new[-1]}, the embedding has {weight[0]}, and the file does not have all rows between; save "
                "it again with PEFT's save_embedding_layers=True"
            )
        return replace(self, length=new[-1] + 1)

    def dense(self) -> Tensor:
        raise NeedsBase("rows that are replaced are no difference until the base is known")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        # A copy: a float32 weight is returned as it is, and would change under its owner.
        changed = to_compute_dtype(weight).clone()
        if self.length > len(changed):
            changed = with_rows(changed, self.length)
        if max(self.tokens, default=0) >= len(changed):
            raise InvalidAdapter(f"trains token {max(self.tokens)}, the embedding has {len(changed)}")
        indices = list(self.tokens)
        changed[indices] = changed[indices].lerp(self.rows.to(changed.dtype), strength)
        return changed

    def scaled(self, by: float) -> Self:
        raise NeedsBase("replaced rows cannot be scaled without their base; give a strength to merge instead")

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        raise Unsupported("rows of single tokens cannot be cut")


@dataclass(frozen=True, slots=True)
class Enlarge(StoredDelta):
    """`inner` on a weight that is first padded with zeros to `target`: ComfyUI's reshape_weight, for FLUX control LoRAs.

    Source: ComfyUI comfy/lora.py, pad_tensor_to_shape.
    """

    kind: ClassVar[str] = "enlarge"
    additive: ClassVar[bool] = False
    reshapes: ClassVar[bool] = True
    fits_lora_file: ClassVar[bool] = True

    inner: Delta
    target: tuple[int, ...]

    @classmethod
    def from_leaves(cls, leaves: Leaves, given: Given) -> Self:
        from loratool.deltas.registry import build

        inner = {leaf: tensor for leaf, tensor in leaves.items() if leaf != "reshape_weight"}
        return cls.wrap(build(inner, given), leaves["reshape_weight"])

    @classmethod
    def wrap(cls, inner: Delta, target: Tensor) -> Self:
        """`inner` on a weight enlarged to the shape `target`; raises `InvalidAdapter` where its shape is another."""
        shape = tuple(int(size) for size in target.flatten())
        if shape != inner.shape:
            raise InvalidAdapter(f"reshape_weight says {list(shape)}, its factors are for {list(inner.shape)}")
        return cls(inner, shape)

    def leaves(self) -> dict[str, Tensor]:
        return {**self.inner.leaves(), "reshape_weight": torch.tensor(self.target)}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target

    def may_reshape(self, weight: Sequence[int]) -> bool:
        """Whether the weight is no larger than the target in any dimension."""
        return len(self.shape) == len(weight) and all(new >= old for new, old in zip(self.shape, weight, strict=True))

    def dense(self) -> Tensor:
        raise NeedsBase("an enlarged weight is no difference to one of another shape")

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = to_compute_dtype(weight)
        # In front, as ComfyUI pads (pad_tensor_to_shape): the stored channels come first, those of the control behind.
        padded = base.new_zeros(self.target)
        padded[tuple(slice(size) for size in base.shape)] = base
        return self.inner.apply(padded, strength)

    def scaled(self, by: float) -> Self:
        return replace(self, inner=self.inner.scaled(by))

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        raise Unsupported("a weight that is enlarged cannot be cut")
