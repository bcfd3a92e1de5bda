"""A budget over many modules: spent where each byte saves most, never exceeded, and as if all spectra were known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.errors import LoratoolError
from loratool.numbers.budgets import RankAllocator
from loratool.numbers.ranks import Budget, RankCandidate, Rule, allocate_ranks

spectra = st.lists(st.floats(0.01, 10), min_size=1, max_size=4).map(lambda values: sorted(values, reverse=True))
modules = st.lists(st.tuples(spectra, st.integers(1, 9)), min_size=1, max_size=4)


def offer(sigma: list[float], cost: int, complete: bool = True) -> RankCandidate:
    values = torch.tensor(sigma, dtype=torch.float64)
    return RankCandidate(values, complete, cost, float(values.square().sum()))


def saved(chosen: list[tuple[list[float], int]], ranks: tuple[int, ...]) -> float:
    return sum(value**2 for (sigma, _), rank in zip(chosen, ranks, strict=True) for value in sigma[:rank])


@settings(deadline=None)
@given(modules, st.integers(0, 60))
def test_bytes_are_spent_as_well_as_they_can_be(chosen: list[tuple[list[float], int]], nbytes: int) -> None:
    """No choice of as many bytes saves more than greed does with them and the bytes of one more step."""
    bought = allocate_ranks([offer(*module) for module in chosen], nbytes=nbytes)

    cost = sum(rank * cost for rank, (_, cost) in zip(bought.ranks, chosen, strict=True))
    assert cost <= nbytes
    every = itertools.product(*(range(len(sigma) + 1) for sigma, _ in chosen))
    best = max(
        saved(chosen, ranks) for ranks in every if sum(r * c for r, (_, c) in zip(ranks, chosen, strict=True)) <= cost
    )
    assert saved(chosen, bought.ranks) >= best - 1e-9


@settings(deadline=None)
@given(modules, st.floats(0, 1))
def test_enough_is_saved_and_no_step_more(chosen: list[tuple[list[float], int]], share: float) -> None:
    whole = saved(chosen, tuple(len(sigma) for sigma, _ in chosen))
    bought = allocate_ranks([offer(*module) for module in chosen], squares=share * whole * 0.999)

    assert saved(chosen, bought.ranks) >= share * whole * 0.999 - 1e-9
    steps = [
        saved(chosen, tuple(rank - (i == last) for i, rank in enumerate(bought.ranks)))
        for last, rank in enumerate(bought.ranks)
        if rank
    ]
    assert not share or min(steps) < share * whole * 0.999 + 1e-9


def test_spectra_are_looked_at_only_as_far_as_the_price_asks() -> None:
    """A market that knows little at first buys what one would that knows all."""
    generator = torch.Generator().manual_seed(0)
    whole = {
        number: torch.rand(400, generator=generator, dtype=torch.float64).sort(descending=True).values * 3.0**-number
        for number in range(8)
    }
    looked: dict[int, int] = {}

    def look(rules: dict[int, Rule]) -> dict[int, RankCandidate]:
        found = {}
        for number, rule in rules.items():
            sigma = whole[number]
            rank = min(int((sigma > rule.value).sum()), rule.most or 400)
            looked[number] = rank
            found[number] = RankCandidate(sigma[:rank], rank < (rule.most or 400), 10, float(sigma.square().sum()))
        return found

    market = RankAllocator(list(whole), look, Budget(nbytes=1))  # type: ignore[arg-type]
    ranks = market.within_bytes(4000, lambda ranks: 10 * sum(ranks.values()))

    complete = [RankCandidate(sigma, True, 10, 0.0) for sigma in whole.values()]
    assert list((dict.fromkeys(whole, 0) | ranks).values()) == list(allocate_ranks(complete, nbytes=4000).ranks)
    assert looked[7] < looked[0] < 400


def test_a_size_below_that_of_an_empty_file_is_refused() -> None:
    market = RankAllocator([0], lambda rules: {0: offer([1.0], 4)}, Budget(nbytes=1))
    with pytest.raises(LoratoolError, match="takes 100 bytes already"):
        market.within_bytes(99, lambda ranks: 100 + 4 * sum(ranks.values()))


def test_a_budget_is_one_thing_and_in_range() -> None:
    for arguments in ({}, {"nbytes": 1, "error": 0.1}, {"error": 0.0}, {"error": 2.0}, {"error": math.nan}):
        with pytest.raises(LoratoolError):
            Budget(**arguments)  # type: ignore[arg-type]
