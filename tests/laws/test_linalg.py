"""The spectrum of a product, its best factors, and distances of products, against float64 decompositions of the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.errors import NonFinite
from loratool.numbers.krylov import spectral_norm, truncated_svd
from loratool.numbers.linalg import ProductSVD, all_finite, bounds, difference_norm, relation, singular_values
from tests.conftest import examples

sizes = st.integers(1, 24)


def product(height: int, width: int, rank: int, fall: float, lost: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose directions are of falling strength, two of them the same where one is `lost`."""
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(height, rank, generator=generator), torch.randn(rank, width, generator=generator)
    up *= torch.arange(1.0, rank + 1) ** -fall
    if lost:
        up[:, -1], down[-1] = up[:, 0], -down[0]
    return up, down


@settings(deadline=None, max_examples=examples(150))
@given(sizes, sizes, sizes, st.sampled_from([0.0, 1.0, 4.0]), st.booleans(), st.integers(0, 9), st.integers(0, 24))
def test_factors_are_the_best_at_every_rank(
    height: int, width: int, rank: int, fall: float, lost: bool, seed: int, kept: int
) -> None:
    up, down = product(height, width, rank, fall, lost, seed)
    dense = up.double() @ down.double()
    sigma = torch.linalg.svdvals(dense)

    core = ProductSVD.enough(up, down, lambda _: kept)
    ups, downs = core.factors(min(kept, len(core.sigma)))

    left = (dense - ups.double() @ downs.double()).norm()
    whole = float(up.norm() * down.norm())
    assert float(left) <= float(sigma[kept:].norm()) * 1.0001 + 2e-6 * whole
    assert core.distance(ups, downs) == pytest.approx(float(left), rel=2e-3, abs=1e-6 * whole)
    assert float(core.squares.sum()) == pytest.approx(float(dense.square().sum()), rel=1e-5, abs=1e-7 * whole**2)


@settings(deadline=None)
@given(sizes, sizes, sizes, st.integers(0, 9))
def test_the_spectrum_is_that_of_the_product(height: int, width: int, rank: int, seed: int) -> None:
    up, down = product(height, width, rank, 2.0, False, seed)
    sigma = torch.linalg.svdvals(up.double() @ down.double())

    found = ProductSVD.of(up, down).sigma

    count = min(len(sigma), len(found))
    torch.testing.assert_close(found[:count], sigma[:count], rtol=0, atol=3e-7 * float(up.norm() * down.norm()))


def test_a_product_of_zeros_has_zeros_for_factors() -> None:
    core = ProductSVD.of(torch.zeros(5, 3), torch.randn(3, 4))
    up, down = core.factors(3)
    assert not up.any()
    assert core.distance(up, down) == 0


@pytest.mark.parametrize("step", [1e-5, 1e-9, 1e-13])
def test_small_distances_are_told(step: float) -> None:
    """Where a float32 Gram matrix says 0."""
    up, down = torch.randn(30, 4, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    other = up.clone()
    other[3, 2] += step
    assert difference_norm((up, down), (other, down)) == pytest.approx(step * float(down[2].norm()), rel=1e-2)


def test_bounds_tell_what_is_not_finite() -> None:
    assert bounds(torch.tensor([])) == (0, 0)
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        good = torch.tensor([1.0, -2.0, 0.5]).to(dtype)
        assert bounds(good) == (-2, 1)
        for bad in (float("nan"), float("inf"), -float("inf")):
            if dtype != torch.float8_e4m3fn or bad != bad:
                assert not all_finite(torch.tensor([1.0, bad, 2.0]).to(dtype))


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 1e18])
def test_factors_of_any_size_that_float32_holds(scale: float) -> None:
    up, down = product(20, 16, 6, 1.0, False, 0)
    core = ProductSVD.enough(up * scale, down, lambda _: 3)
    sigma = torch.linalg.svdvals(up.double() @ down.double()) * scale
    torch.testing.assert_close(core.sigma[:6], sigma[:6], rtol=1e-4, atol=0)
    ups, downs = core.factors(3)
    assert core.distance(ups, downs) == pytest.approx(float(sigma[3:].norm()), rel=2e-3)


@pytest.mark.parametrize("size", [8, 200])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e300])
def test_what_cannot_be_decomposed_is_refused(size: int, bad: float) -> None:
    up, down = torch.full((size, 2), bad, dtype=torch.float64), torch.full((2, size), bad, dtype=torch.float64)
    matrix = up @ down
    for decompose in (
        lambda: singular_values(up, down),
        lambda: ProductSVD.of(up, down),
        lambda: relation((up, down), (up, down)),
        lambda: truncated_svd(matrix, lambda spectrum: 2),
        lambda: spectral_norm(matrix),
    ):
        with pytest.raises(NonFinite, match="products of them are NaN or Inf"):
            decompose()
