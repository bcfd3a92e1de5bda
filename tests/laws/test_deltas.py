"""Laws that every kind of delta keeps, drawn over shapes, ranks and scales; the dense difference is the oracle."""
# ruff: noqa: E501  the table of kinds has a row for each

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratool.deltas.base import Delta, stack
from loratool.deltas.lora import LoRA
from loratool.deltas.registry import CLASSES, build, class_of
from loratool.deltas.schema import ANY, Given
from loratool.errors import LoratoolError, NeedsBase, Unsupported
from tests.conftest import examples


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class Make:
    """Builds a delta from its leaves' shapes as functions of the rank; `shape` is that of a weight that it fits."""

    kind: str
    shape: tuple[int, ...]
    given: Given
    leaves: Mapping[str, Callable[[int], tuple[int, ...]]]

    def given_at(self, rank: int) -> Given:
        return replace(self.given, rank=rank)

    def __call__(self, generator: torch.Generator, rank: int) -> tuple[Delta, tuple[int, ...]]:
        tensors = {leaf: randn(generator, *size(rank)) for leaf, size in self.leaves.items()}
        for leaf in {"magnitude", "dora_scale"} & tensors.keys():
            tensors[leaf] = tensors[leaf].abs() + 0.5
        if "reshape_weight" in tensors:
            tensors["reshape_weight"] = torch.tensor(self.shape)
        return class_of(self.kind).from_leaves(tensors, self.given_at(rank)), self.shape


GIVEN = Given(scale=0.5, neumann_terms=5)


def of(kind: str, shape: tuple[int, ...], given: Given = GIVEN, **leaves: Callable[[int], tuple[int, ...]]) -> Make:
    return Make(kind, shape, given, leaves)


MAKERS: Mapping[str, Make] = {
    "lora": of("lora", (12, 8), down=lambda r: (r, 8), up=lambda r: (12, r)),
    "lora, conv": of("lora", (12, 8, 3, 3), down=lambda r: (r, 8, 3, 3), up=lambda r: (12, r, 1, 1)),
    "lora, tucker": of("lora", (12, 8, 3, 3), down=lambda r: (r, 8, 1, 1), mid=lambda r: (r, r, 3, 3), up=lambda r: (12, r, 1, 1)),
    "embedding": of("embedding", (12, 8), embedding_down=lambda r: (r, 12), embedding_up=lambda r: (8, r)),
    "adalora": of("adalora", (12, 8), loralib_a=lambda r: (r, 8), loralib_b=lambda r: (12, r), lora_e=lambda r: (r, 1)),
    "loralib": of("loralib", (12, 8), loralib_a=lambda r: (r, 8), loralib_b=lambda r: (12, r)),
    "loralib, embedding": of("loralib", (12, 8), loralib_a=lambda r: (r, 12), loralib_b=lambda r: (8, r)),
    "loralib, conv": of("loralib", (12, 8, 3, 3), loralib_a=lambda r: (3 * r, 24), loralib_b=lambda r: (36, 3 * r)),
    "vera": of("vera", (12, 8), vera_lambda_b=lambda r: (12,), vera_lambda_d=lambda r: (r,), vera_a=lambda r: (r, 10), vera_b=lambda r: (14, r)),
    "loha": of("loha", (12, 8), hada_w1_a=lambda r: (12, r), hada_w1_b=lambda r: (r, 8), hada_w2_a=lambda r: (12, r), hada_w2_b=lambda r: (r, 8)),
    "loha, tucker": of("loha", (12, 8, 3, 3), hada_w1_a=lambda r: (r, 12), hada_w1_b=lambda r: (r, 8), hada_t1=lambda r: (r, r, 3, 3), hada_w2_a=lambda r: (r, 12), hada_w2_b=lambda r: (r, 8), hada_t2=lambda r: (r, r, 3, 3)),
    "lokr": of("lokr", (12, 8), lokr_w1=lambda r: (4, 2), lokr_w2=lambda r: (3, 4)),
    "lokr, w2 factored": of("lokr", (12, 8), lokr_w1=lambda r: (4, 2), lokr_w2_a=lambda r: (3, r), lokr_w2_b=lambda r: (r, 4)),
    "lokr, w1 factored": of("lokr", (12, 8), lokr_w1_a=lambda r: (4, r), lokr_w1_b=lambda r: (r, 2), lokr_w2=lambda r: (3, 4)),
    "lokr, both factored": of("lokr", (12, 8), lokr_w1_a=lambda r: (4, r), lokr_w1_b=lambda r: (r, 2), lokr_w2_a=lambda r: (3, r), lokr_w2_b=lambda r: (r, 4)),
    "lokr, conv": of("lokr", (12, 8, 3, 3), lokr_w1=lambda r: (4, 2), lokr_w2_a=lambda r: (3, r), lokr_w2_b=lambda r: (r, 36)),
    "lokr, tucker": of("lokr", (12, 8, 3, 3), lokr_w1=lambda r: (4, 2), lokr_w2_a=lambda r: (r, 3), lokr_w2_b=lambda r: (r, 4), lokr_t2=lambda r: (r, r, 3, 3)),
    "glora": of("glora", (12, 8), a1=lambda r: (8, r), a2=lambda r: (r, 8), b1=lambda r: (12, r), b2=lambda r: (r, 8)),
    "ia3": of("ia3", (12, 8), ia3_l=lambda r: (12, 1)),
    "ia3, on input": of("ia3", (12, 8), ia3_l=lambda r: (1, 8)),
    "oft": of("oft", (12, 8), oft_blocks=lambda r: (6, 2, 2), rescale=lambda r: (12, 1)),
    "boft": of("oft", (16, 8), oft_blocks=lambda r: (3, 4, 4, 4)),
    "input oft": of("input oft", (12, 8), oft_r=lambda r: (2, 6)),
    "input boft": of("input boft", (12, 16), boft_r=lambda r: (2, 4, 4, 4), boft_s=lambda r: (12, 1)),
    "tokens": of("tokens", (12, 6), Given(tokens=(0, 4, 9)), token_rows=lambda r: (3, 6)),
    "experts": of("experts", (3, 12, 8), replace(GIVEN, stacked=True), down=lambda r: (3 * r, 8), up=lambda r: (12, 3 * r)),
    "enlarge": of("enlarge", (12, 8), down=lambda r: (r, 8), up=lambda r: (12, r), reshape_weight=lambda r: (2,)),
    "full": of("full", (12, 8), diff=lambda r: (12, 8)),
    "lora bias": of("lora bias", (12,), bias_up=lambda r: (12,)),
    "replace": of("replace", (12, 8), weight=lambda r: (12, 8)),
    "dora": of("dora", (12, 8), down=lambda r: (r, 8), up=lambda r: (12, r), magnitude=lambda r: (12,)),
    "dora, on input": of("dora", (12, 8), down=lambda r: (r, 8), up=lambda r: (12, r), dora_scale=lambda r: (1, 8)),
    "dora, of a loha": of("dora", (12, 8), hada_w1_a=lambda r: (12, r), hada_w1_b=lambda r: (r, 8), hada_w2_a=lambda r: (12, r), hada_w2_b=lambda r: (r, 8), dora_scale=lambda r: (12, 1)),
}  # fmt: skip

every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
draws = given(seed=st.integers(0, 10_000), rank=st.integers(1, 4))
few = settings(max_examples=examples(15), deadline=None)


def drawn(make: Make, seed: int, rank: int) -> tuple[Delta, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    delta, shape = make(generator, rank)
    return delta, randn(generator, *shape)


def close(got: Tensor, expected: Tensor) -> None:
    """float32 sums of at most a few hundred products of numbers of order one."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_every_kind_is_drawn() -> None:
    assert {name.partition(",")[0] for name in MAKERS} >= CLASSES.keys()


@every_kind
@draws
@few
def test_strength_zero_changes_nothing(make: Make, seed: int, rank: int) -> None:
    delta, weight = drawn(make, seed, rank)

    assert torch.equal(delta.apply(weight, 0.0), weight)


@every_kind
@draws
@few
def test_strength_is_linear(make: Make, seed: int, rank: int) -> None:
    delta, weight = drawn(make, seed, rank)
    whole = delta.apply(weight) - weight

    for strength in (-1.5, 0.5, 2.0):
        close(delta.apply(weight, strength) - weight, strength * whole)


@every_kind
@draws
@few
def test_its_shape_is_that_of_the_weight_it_fits(make: Make, seed: int, rank: int) -> None:
    delta, weight = drawn(make, seed, rank)
    assert delta.apply(weight).shape == weight.shape
    if delta.kernel_flattened:
        assert delta.shape[0] == weight.shape[0]
    else:
        assert all(size in (ANY, dimension) for size, dimension in zip(delta.shape, weight.shape, strict=False))


@every_kind
@draws
@few
def test_leaves_build_the_same_delta_again(make: Make, seed: int, rank: int) -> None:
    delta, weight = drawn(make, seed, rank)

    of_class = class_of(make.kind).from_leaves(delta.leaves(), make.given_at(rank))
    by_schema = build(delta.leaves(), make.given_at(rank))

    for again in (of_class, by_schema):
        assert type(again) is type(delta)
        assert torch.equal(again.apply(weight), delta.apply(weight))


@every_kind
@draws
@few
def test_split_rows_are_the_rows_of_the_whole(make: Make, seed: int, rank: int) -> None:
    delta, weight = drawn(make, seed, rank)
    rows = weight.shape[0]
    for sizes in ((rows,), (rows // 2, rows - rows // 2), (3, rows - 3)):
        try:
            parts = delta.split(sizes)
        except LoratoolError:
            continue
        pieces = [part.apply(piece) for part, piece in zip(parts, weight.split(list(sizes)), strict=True)]
        close(torch.cat(pieces), delta.apply(weight))


@every_kind
@draws
@few
def test_additive_kinds_have_dense_scaled_and_factored_forms_that_agree(make: Make, seed: int, rank: int) -> None:
    delta, weight = drawn(make, seed, rank)
    if not delta.additive:
        return
    dense = delta.dense()
    close(delta.apply(weight) - weight, dense.reshape(weight.shape))
    close(delta.scaled(-2.0).dense(), -2.0 * dense)
    if factors := delta.factors():
        close(factors[0] @ factors[1], dense.flatten(1))


@every_kind
def test_kinds_that_need_the_base_say_so(make: Make) -> None:
    delta, _ = drawn(make, 0, 2)
    if not delta.additive and delta.kind != "vera":
        with pytest.raises(NeedsBase):
            delta.dense()


@draws
@few
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_stacking_what_was_split_is_the_same_bytes(kernel: tuple[int, ...], seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ones = (1,) * len(kernel)
    whole = LoRA(randn(generator, rank, 6, *kernel), randn(generator, 12, rank, *ones), scale=0.5)

    stacked = stack(whole.split((4, 2, 6)))

    assert torch.equal(stacked.up, whole.up)
    assert torch.equal(stacked.down, whole.down)
    assert stacked.scale == whole.scale


@draws
@few
@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.5, 2.0), (None, 0.3)])
def test_stacking_is_dense_stacking_whatever_the_parts(scales: tuple[float | None, ...], seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        LoRA(randn(generator, rank + i, 6), randn(generator, 4, rank + i), scale=scale) for i, scale in enumerate(scales)
    ]

    close(stack(parts).dense(), torch.cat([part.dense() for part in parts]))


@every_kind
@draws
@few
def test_a_stack_changes_a_stack_of_weights_as_its_parts_change_each(make: Make, seed: int, rank: int) -> None:
    one, first = drawn(make, seed, rank)
    other, second = drawn(make, seed + 1, rank)
    try:
        whole = stack([one, other])
    except Unsupported:
        assert one.kind not in ("lora", "loha", "full") or {"mid", "hada_t1"} & one.leaves().keys()
        return
    together = torch.cat([first, second])
    changed = torch.cat([one.apply(first), other.apply(second)])

    close(whole.apply(together.reshape(len(together), *whole.shape[1:])).reshape(changed.shape), changed)


@every_kind
@draws
@few
def test_stacking_is_the_inverse_of_splitting(make: Make, seed: int, rank: int) -> None:
    delta, weight = drawn(make, seed, rank)
    rows = weight.shape[0]
    try:
        again = stack(delta.split((3, rows - 3)))
    except LoratoolError:
        return

    close(again.apply(weight.reshape(rows, *again.shape[1:])).reshape(weight.shape), delta.apply(weight))


@every_kind
@draws
@few
def test_every_form_changes_a_weight_alike(make: Make, seed: int, rank: int) -> None:
    delta, weight = drawn(make, seed, rank)
    changed = delta.apply(weight)
    # loralib's are guesses at what its layer was, of which those that fit the weight must be alike.
    fitting = [form for form in delta.equivalent_forms() if delta.kind != "loralib" or form.shape == weight.shape]

    assert fitting or weight.ndim > 2
    for form in fitting:
        close(form.apply(weight), changed)


@every_kind
@draws
@few
def test_what_is_folded_changes_a_weight_alike_and_needs_no_scale(make: Make, seed: int, rank: int) -> None:
    delta, weight = drawn(make, seed, rank)
    try:
        folded = delta.folded()
    except Unsupported:
        assert not delta.additive or delta.kind == "experts"
        return

    assert folded.scale in (None, 1.0)
    close(folded.apply(weight), delta.apply(weight))


def test_a_scale_that_is_a_power_of_two_is_folded_without_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    up = randn(generator, 6, 2).bfloat16()

    assert LoRA(randn(generator, 2, 4), up, scale=0.25).folded().up.dtype == torch.bfloat16
    assert LoRA(randn(generator, 2, 4), up, scale=0.3).folded().up.dtype == torch.float32


@draws
@few
def test_what_is_trimmed_is_the_same_without_ranks_that_add_nothing(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    used = randn(generator, 6, rank)
    padded = LoRA(randn(generator, rank + 2, 4), torch.cat([used, torch.zeros(6, 2)], dim=1), scale=0.5)

    trimmed = padded.without_zero_ranks()

    assert trimmed is not None
    assert trimmed.rank == rank
    close(trimmed.dense(), padded.dense())
    assert replace(padded, up=torch.zeros_like(padded.up)).without_zero_ranks() is None


@draws
@few
def test_parts_that_were_stacked_are_cut_into_the_same_bytes(seed: int, rank: int) -> None:
    """Block-diagonal factors come apart again, where a part was left out too."""
    generator = torch.Generator().manual_seed(seed)
    one = LoRA(randn(generator, rank, 6), randn(generator, 4, rank), scale=0.5)
    other = LoRA(randn(generator, rank + 1, 6), randn(generator, 4, rank + 1), scale=0.5)

    first, second, third = (part.without_zero_ranks() for part in stack([one, one.nothing(8), other]).split((4, 8, 4)))

    assert second is None
    for part, origin in ((first, one), (third, other)):
        assert isinstance(part, LoRA)
        assert torch.equal(part.up, origin.up)
        assert torch.equal(part.down, origin.down)
        assert part.scale == origin.scale
