"""One budget over all modules: how many ranks each gets, where a byte saves most, when all spectra are known far enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, TypeVar

from loratool.errors import LoratoolError
from loratool.numbers.ranks import Budget, RankAllocation, RankCandidate, Rule, allocate_ranks

FIRST: Final = 32
"""Ranks of each module that are looked at before the price of a rank is known."""
TRIES: Final = 20

Look = Callable[[Mapping[int, Rule]], Mapping[int, RankCandidate]]
"""Finds the leading singular values of modules, by their numbers, as far as a rule says."""
SizeOf = Callable[[Mapping[int, int]], int]
"""The bytes of an output whose modules have these ranks."""

_T = TypeVar("_T")


def within_error(error: float, whole: float, spent: Callable[[float], _T], left: Callable[[_T], float]) -> _T:
    """What `spent` makes of the squares that may be left out, such that what it leaves when stored, by `left`, is at most
    the share `error` of `whole`, a norm's square.

    Raises `LoratoolError` where rounding, and what is left out in any case, come to more.
    """
    allowed = error**2 * whole
    while allowed > 0:
        result = spent(allowed)
        excess = left(result) - error**2 * whole
        if excess <= 0:
            return result
        allowed -= 1.02 * excess
    raise LoratoolError(
        f"a total error of {error:.2%} cannot be met: what the format has no place for, and rounding to the dtype, "
        "come to more; choose another `to=`, `dtype='float32'`, or a larger error"
    )


class RankAllocator:
    """The modules whose ranks are bought, by number, with as much of their spectra as was needed so far."""

    def __init__(self, numbers: list[int], look: Look, budget: Budget) -> None:
        self.look, self.budget = look, budget
        self.cap = max(FIRST, budget.least)
        first = look(dict.fromkeys(numbers, self._upto(0.0)))
        self.offers = {number: self._bound(offer) for number, offer in first.items()}

    @property
    def total(self) -> float:
        """The sum of all their squares."""
        return math.fsum(offer.total for offer in self.offers.values())

    def within_bytes(self, nbytes: int, size_of: SizeOf) -> dict[int, int]:
        """The ranks that save most in an output of at most `nbytes`, names, alignment and all.

        Raises `LoratoolError` where there is no room for anything.
        """
        nothing = dict.fromkeys(self.offers, 0)
        empty = size_of(nothing)
        if empty > nbytes:
            raise LoratoolError(f"without any rank the output takes {empty} bytes already, more than the {nbytes} asked for")
        one_each = size_of(dict.fromkeys(self.offers, 1)) - sum(offer.cost for offer in self.offers.values())
        fixed = (one_each - empty) / max(len(self.offers), 1)
        cheapest = min((offer.cost for offer in self.offers.values()), default=0)
        best, fits, free = nothing, 0.0, float(nbytes - empty)
        exceeds = free
        for _ in range(TRIES):
            ranks = nothing | self._ranks(self._settle(nbytes=free, fixed=fixed))
            spare = nbytes - size_of(ranks)
            if spare >= 0:
                best, fits = ranks, free
            else:
                exceeds = free
            if 0 <= spare < cheapest or exceeds - fits < cheapest:
                break
            # A step as small as the excess may change nothing.
            guess = free + (spare if spare > 0 else min(spare, -cheapest))
            free = guess if fits < guess < exceeds else (fits + exceeds) / 2
        return {number: rank for number, rank in best.items() if rank}

    def within_error(self, allowed: float) -> dict[int, int]:
        """The fewest bytes whose ranks leave out at most `allowed` of the squares."""
        return self._ranks(self._settle(squares=self.total - allowed))

    def _settle(self, *, nbytes: float = math.inf, squares: float = math.inf, fixed: float = 0.0) -> RankAllocation:
        """What the budget buys when no module holds anything unknown that is worth more than the last thing bought."""
        numbers = list(self.offers)
        while True:
            bought = allocate_ranks(
                list(self.offers.values()), nbytes=nbytes, squares=squares, least=self.budget.least, fixed=fixed
            )
            if not bought.unsettled:
                return bought
            self.cap *= 2
            open_ones = [numbers[index] for index in bought.unsettled]
            wanted = {number: self._upto(bought.gain_per_byte * self.offers[number].cost) for number in open_ones}
            self.offers |= {number: self._bound(offer) for number, offer in self.look(wanted).items()}

    def _upto(self, square: float) -> Rule:
        """A rule for singular values whose square is worth its price, a number of them at a time."""
        return Rule("threshold", math.sqrt(square), least=self.budget.least, most=self.cap)

    def _bound(self, offer: RankCandidate) -> RankCandidate:
        most = self.budget.most
        if most is None or len(offer.sigma) < most:
            return offer
        return replace(offer, sigma=offer.sigma[:most], complete=True)

    def _ranks(self, bought: RankAllocation) -> dict[int, int]:
        return {number: rank for number, rank in zip(self.offers, bought.ranks, strict=True) if rank}
