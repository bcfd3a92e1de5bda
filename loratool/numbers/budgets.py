"""One budget over all modules: each gets the ranks whose bytes save most, and spectra are computed only as far as needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, TypeVar

from loratool.errors import LoratoolError
from loratool.numbers.ranks import Budget, RankAllocation, RankCandidate, Rule, allocate_ranks

FIRST: Final = 32
"""Singular values of each module that are computed before the price of a rank is known."""
TRIES: Final = 20
"""Attempts at meeting a number of bytes; the best one that fits counts."""

Look = Callable[[Mapping[int, Rule]], Mapping[int, RankCandidate]]
"""Finds the leading singular values of modules, by the module's number, as far as each one's rule says."""
SizeOf = Callable[[Mapping[int, int]], int]
"""Gives the bytes of an output whose modules, by number, have these ranks."""

_T = TypeVar("_T")


def within_error(error: float, whole: float, spent: Callable[[float], _T], left: Callable[[_T], float]) -> _T:
    """The result of `spent`, called with the squares that may be left out, whose stored error meets the relative `error`.

    `left` gives the square of a stored result's error, rounding included; `whole` is the square of the norm that `error` is
    relative to. Raises `LoratoolError` where rounding, and what is left out in any case, exceed the error.
    """
    allowed = error**2 * whole
    while allowed > 0:
        result = spent(allowed)
        excess = left(result) - error**2 * whole
        if excess <= 0:
            return result
        # A little more than the excess, or ever smaller steps would approach the limit and never meet it.
        allowed -= 1.02 * excess
    raise LoratoolError(
        f"a total error of {error:.2%} cannot be met: what the format has no place for, and rounding to the dtype, "
        "come to more; choose another `to=`, `dtype='float32'`, or a larger error"
    )


class RankAllocator:
    """The modules whose ranks are bought, by number, with as much of each spectrum as was needed so far."""

    def __init__(self, numbers: list[int], look: Look, budget: Budget) -> None:
        self.look, self.budget = look, budget
        self.cap = max(FIRST, budget.least)
        first = look(dict.fromkeys(numbers, self._upto(0.0)))
        self.offers = {number: self._bound(offer) for number, offer in first.items()}

    @property
    def total(self) -> float:
        """The sum of ‖ΔW‖² over all modules."""
        return math.fsum(offer.total for offer in self.offers.values())

    def within_bytes(self, nbytes: int, size_of: SizeOf) -> dict[int, int]:
        """The ranks that save most in an output of at most `nbytes`, names and alignment included.

        Raises `LoratoolError` where even an output without any rank takes more.
        """
        nothing = dict.fromkeys(self.offers, 0)
        empty = size_of(nothing)
        if empty > nbytes:
            raise LoratoolError(f"without any rank the output takes {empty} bytes already, more than the {nbytes} asked for")
        # Names and headers of a module cost bytes once, with its first rank.
        one_each = size_of(dict.fromkeys(self.offers, 1)) - sum(offer.cost for offer in self.offers.values())
        fixed = (one_each - empty) / max(len(self.offers), 1)
        cheapest = min((offer.cost for offer in self.offers.values()), default=0)
        # `fixed` is an average, and alignment depends on all ranks together: only a choice of ranks has a known size. So the
        # bytes to spend are bisected between an amount that fits and another that exceeds.
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
            # Sizes are nearly linear, so that what is spare or too much is a good step; one below a rank may change nothing.
            guess = free + (spare if spare > 0 else min(spare, -cheapest))
            free = guess if fits < guess < exceeds else (fits + exceeds) / 2
        return {number: rank for number, rank in best.items() if rank}

    def within_error(self, allowed: float) -> dict[int, int]:
        """The ranks, of the fewest bytes, that leave out at most `allowed` of `total`."""
        return self._ranks(self._settle(squares=self.total - allowed))

    def _settle(self, *, nbytes: float = math.inf, squares: float = math.inf, fixed: float = 0.0) -> RankAllocation:
        """The purchase within the budget, once no module has unknown singular values that could be worth their price."""
        numbers = list(self.offers)
        while True:
            bought = allocate_ranks(
                list(self.offers.values()), nbytes=nbytes, squares=squares, least=self.budget.least, fixed=fixed
            )
            if not bought.unsettled:
                return bought
            # The price only rises as more is known, so values below the price of now need never be computed.
            self.cap *= 2
            open_ones = [numbers[index] for index in bought.unsettled]
            wanted = {number: self._upto(bought.gain_per_byte * self.offers[number].cost) for number in open_ones}
            self.offers |= {number: self._bound(offer) for number, offer in self.look(wanted).items()}

    def _upto(self, square: float) -> Rule:
        """The rule for singular values whose square exceeds `square`, at most `cap` of them."""
        return Rule("threshold", math.sqrt(square), least=self.budget.least, most=self.cap)

    def _bound(self, offer: RankCandidate) -> RankCandidate:
        most = self.budget.most
        if most is None or len(offer.sigma) < most:
            return offer
        return replace(offer, sigma=offer.sigma[:most], complete=True)

    def _ranks(self, bought: RankAllocation) -> dict[int, int]:
        return {number: rank for number, rank in zip(self.offers, bought.ranks, strict=True) if rank}
