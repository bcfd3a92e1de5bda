"""The leading triples of any matrix: as good as the SVD's to a part in a thousand, with an error that is the true one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.numbers import krylov
from loratool.numbers.factor import Storage, factorise
from loratool.numbers.krylov import Spectrum, orthonormal, spectral_norm, truncated_svd, truncated_svd_batch
from loratool.numbers.ranks import Rule
from tests.conftest import examples


def matrix(sigma: torch.Tensor, height: int, width: int, seed: int) -> torch.Tensor:
    """A float32 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    count = min(height, width)
    left, right = (
        torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64)).Q for size in (height, width)
    )
    return ((left * sigma[:count]) @ right.T).float()


SPECTRA = {
    "flat": torch.ones_like,
    "power": lambda i: i**-0.5,
    "steep": lambda i: i**-2.0,
    "geometric": lambda i: 0.9**i,
    "low rank": lambda i: (i <= 5).double(),
    "low rank and noise": lambda i: torch.where(i <= 5, 1.0, 0.01).double(),
    "clusters": lambda i: torch.where(i <= 7, 1.0, torch.where(i <= 40, 0.9, 0.1)).double(),
    "one": lambda i: (i == 1).double(),
}


@settings(max_examples=examples(60), deadline=None)
@given(
    st.sampled_from(sorted(SPECTRA)),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from([1e-25, 1e-6, 1.0, 1e6, 1e25]),
    st.integers(0, 99),
)
def test_the_error_is_that_of_the_best_approximation(
    kind: str, height: int, width: int, rank: int, scale: float, seed: int
) -> None:
    index = torch.arange(1, min(height, width) + 1, dtype=torch.float64)
    dense = matrix(SPECTRA[kind](index), height, width, seed) * scale
    sigma = torch.linalg.svdvals(dense.double())
    best = float(sigma[rank:].square().sum().sqrt())

    found = factorise(dense, Rule("rank", rank), Storage(torch.float32))

    assert found.rank == min(rank, height, width)
    true = float((dense.double() - found.up.double() @ found.down.double()).norm())
    assert true <= 1.001 * best + 1e-6 * float(sigma.norm())
    assert found.error == pytest.approx(true, rel=1e-3, abs=2e-7 * float(sigma.norm()))
    assert found.norm == pytest.approx(float(sigma.norm()), rel=1e-6)


@pytest.mark.parametrize("kind", sorted(SPECTRA))
@pytest.mark.parametrize("shape", [(400, 700), (700, 400)])
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_growing_ranges_are_as_good_as_the_svd(kind: str, shape: tuple[int, int], rank: int) -> None:
    """At sizes where the range is grown and not all of the spectrum taken."""
    dense = matrix(SPECTRA[kind](torch.arange(1, 401, dtype=torch.float64)), *shape, seed=1)
    best = float(torch.linalg.svdvals(dense.double())[rank:].square().sum().sqrt())

    found = truncated_svd(dense, Rule("rank", rank), rank=rank)

    true = float((dense.double() - found.up @ found.down).norm())
    assert true <= 1.0005 * best + 1e-6 * float(dense.norm())
    assert found.left == pytest.approx(true, rel=1e-3, abs=5e-4 * float(dense.norm()))


@pytest.mark.parametrize("error", [0.3, 0.05, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", ["power", "steep", "geometric", "low rank and noise"])
def test_an_error_is_met_with_the_least_rank(kind: str, error: float) -> None:
    dense = matrix(SPECTRA[kind](torch.arange(1, 301, dtype=torch.float64)), 300, 500, seed=2)
    sigma = torch.linalg.svdvals(dense.double())
    left = (sigma.square().sum() - sigma.square().cumsum(0)).clamp_min(0).sqrt() / sigma.norm()
    least = int((left > error).sum()) + 1

    found = factorise(dense, Rule("max_error", error), Storage(torch.float32))

    assert found.error / found.norm <= error
    assert least <= found.rank <= least + 1  # one more where the last is within rounding of enough


def test_rounding_is_part_of_the_error_that_is_met() -> None:
    dense = matrix(SPECTRA["geometric"](torch.arange(1, 201, dtype=torch.float64)), 200, 300, seed=3)

    found = factorise(dense, Rule("max_error", 0.01), Storage(torch.bfloat16))

    assert found.error / found.norm <= 0.01
    assert found.up.dtype == torch.bfloat16


def test_no_rule_without_need_sees_the_whole_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = matrix(SPECTRA["low rank and noise"](torch.arange(1, 401, dtype=torch.float64)), 400, 600, seed=4)
    monkeypatch.setattr(krylov, "_exact", lambda *_: pytest.fail("the whole spectrum was taken"))

    assert truncated_svd(dense, Rule("max_error", 0.2)).up.shape[1] == 5
    assert truncated_svd(dense, Rule("sv_ratio", 10)).up.shape[1] == 5
    assert truncated_svd(dense, Rule("auto"), noise=0.02).up.shape[1] == 5


def spectrum(*sigma: float, complete: bool = True, noise: float = 0.0) -> Spectrum:
    values = torch.tensor(sigma, dtype=torch.float64)
    return Spectrum(values, float(values.square().sum()), complete, noise)


@pytest.mark.parametrize(
    ("method", "value", "expected"),
    [
        ("rank", 3, 3),
        ("sv_ratio", 2, 1),  # σ > 2 of 4 2 1 1
        ("sv_ratio", 2.01, 2),
        ("sv_ratio", 100, 4),
        ("sv_cumulative", 0.5, 1),  # 4 of 8
        ("sv_cumulative", 0.51, 2),
        ("sv_cumulative", 0.75, 2),
        ("sv_cumulative", 1, 4),
        ("sv_fro", math.sqrt(16 / 22), 1),
        ("sv_fro", math.sqrt(16.01 / 22), 2),
        ("energy", 20 / 22, 2),
        ("energy", 20.01 / 22, 3),
        ("max_error", math.sqrt(2 / 22), 2),
        ("threshold", 1, 2),
        ("threshold", 0.99, 4),
        ("threshold", 9, 1),  # at least one, as LyCORIS has it
    ],
)
def test_each_rule_keeps_the_least_rank_of_its_definition(method: str, value: float, expected: int) -> None:
    assert Rule(method, value)(spectrum(4, 2, 1, 1)) == expected


def test_auto_keeps_what_is_above_the_noise_and_may_keep_nothing() -> None:
    assert Rule("auto")(spectrum(4, 2, 1, 1, noise=1.5)) == 2
    assert Rule("auto")(spectrum(1, 0.5, noise=2)) == 0
    assert Rule("auto", least=1)(spectrum(1, 0.5, noise=2)) == 1


def test_bounds_hold_whatever_the_rule_says() -> None:
    assert Rule("energy", 0.999, most=2)(spectrum(4, 2, 1, 1)) == 2
    assert Rule("sv_ratio", 1.5, least=3)(spectrum(4, 2, 1, 1)) == 3
    assert Rule("energy", 0.999, most=2)(spectrum(4, 2, complete=False)) is not None


def test_a_rule_asks_for_more_until_it_knows_enough() -> None:
    known = Spectrum(torch.tensor([4.0, 2.0], dtype=torch.float64), 22.0, False)
    assert Rule("max_error", 0.1)(known) is None
    assert Rule("sv_ratio", 100)(known) is None
    assert Rule("sv_ratio", 1.5)(known) == 1
    assert Rule("rank", 3)(known) is None


@given(seed=st.integers(0, 1000), count=st.integers(1, 5), rank=st.sampled_from([None, 3]), turned=st.booleans())
@settings(max_examples=examples(15), deadline=None)
def test_several_at_once_are_what_each_is_alone(seed: int, count: int, rank: int | None, turned: bool) -> None:
    """Some of low rank, some of full, whose rules ask for different numbers of triples."""
    generator = torch.Generator().manual_seed(seed)
    shape = (420, 300) if turned else (300, 420)
    matrices = [
        torch.randn(shape[0], 4 + 3 * i, generator=generator) @ torch.randn(4 + 3 * i, shape[1], generator=generator)
        + 0.01 * i * torch.randn(shape, generator=generator)
        for i in range(count)
    ]
    rules = [Rule("rank", 3) if rank else Rule("energy", 0.5 + 0.08 * i) for i in range(count)]

    together = truncated_svd_batch(matrices, rules, rank=rank, noises=[0.0] * count, seed=seed)

    for matrix, rule, found in zip(matrices, rules, together, strict=True):
        alone = truncated_svd(matrix, rule, rank=rank, seed=seed)
        assert found.up.shape == alone.up.shape
        torch.testing.assert_close(found.up @ found.down, alone.up @ alone.down, rtol=1e-3, atol=1e-3)
        assert found.left == pytest.approx(alone.left, rel=1e-4, abs=1e-4 * float(matrix.norm()))


@given(seed=st.integers(0, 1000), columns=st.integers(0, 12), spread=st.floats(0, 14), count=st.integers(1, 3))
@settings(max_examples=examples(40), deadline=None)
def test_twice_orthonormal_is_orthonormal(seed: int, columns: int, spread: float, count: int) -> None:
    """However dependent the columns are, up to what float64 tells apart."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(count, 40, columns, generator=generator, dtype=torch.float64)
    falling = 10 ** -(spread * torch.arange(columns) / max(columns - 1, 1))
    mixed = (blocks * falling) @ torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q

    found = orthonormal(orthonormal(mixed))

    one = torch.eye(columns, dtype=torch.float64).expand(count, -1, -1)
    torch.testing.assert_close(found.mT @ found, one, rtol=0, atol=1e-12)
    projected = found @ (found.mT @ mixed)
    torch.testing.assert_close(projected, mixed, rtol=0, atol=1e-9)


@given(seed=st.integers(0, 1000), decay=st.floats(0, 2), rows=st.integers(100, 400), columns=st.integers(100, 400))
@settings(max_examples=examples(15), deadline=None)
def test_the_largest_singular_value_is_found(seed: int, decay: float, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, 60, generator=generator)).Q for n in (rows, columns))
    matrix = left * torch.arange(1, 61) ** -decay @ right.T
    assert spectral_norm(matrix) == pytest.approx(1.0, rel=2e-3)
