"""Stochastic rounding is unbiased, repeatable, and independent of how a tensor is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.numbers.rounding import round_stochastically
from tests.conftest import examples

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_values_stay(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).float()

    assert torch.equal(round_stochastically(values, dtype, "w", 0, 0).float(), values)


@pytest.mark.parametrize("dtype", DTYPES)
@given(value=st.floats(-60000, 60000, width=32, allow_subnormal=True), seed=st.integers(0, 9))
@settings(max_examples=examples(200), deadline=None)
def test_a_value_goes_to_one_of_its_two_neighbours(dtype: torch.dtype, value: float, seed: int) -> None:
    values = torch.full((64,), value)
    rounded = round_stochastically(values, dtype, "w", seed, 0).float()

    below, above = rounded[rounded <= value], rounded[rounded >= value]
    assert len(set(below.tolist())) <= 1
    assert len(set(above.tolist())) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0 + 2**-12, -1.0 - 3 * 2**-13, 3e-8, 0.1])
def test_the_mean_is_the_value(dtype: torch.dtype, value: float) -> None:
    """Over n draws the mean's standard error is at most half a gap over √n; five of them are allowed."""
    count = 1 << 16
    values = torch.full((count,), value)
    rounded = round_stochastically(values, dtype, "w", 1, 0).double()
    gap = float(rounded.max() - rounded.min())

    assert abs(float(rounded.mean()) - float(values[0].double())) <= 5 * gap / 2 / count**0.5


@given(cut=st.integers(0, 100), seed=st.integers(0, 3))
@settings(max_examples=examples(50), deadline=None)
def test_a_tensor_may_be_rounded_in_pieces(cut: int, seed: int) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    whole = round_stochastically(values, torch.bfloat16, "w", seed, 5)
    pieces = [
        round_stochastically(values[:cut], torch.bfloat16, "w", seed, 5),
        round_stochastically(values[cut:], torch.bfloat16, "w", seed, 5 + cut),
    ]

    assert torch.equal(torch.cat(pieces), whole)


def test_another_name_or_seed_is_another_draw() -> None:
    values = torch.full((1000,), 0.1)
    drawn = [round_stochastically(values, torch.bfloat16, name, seed, 0) for name, seed in (("a", 0), ("b", 0), ("a", 1))]

    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
