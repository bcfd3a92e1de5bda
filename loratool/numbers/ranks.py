"""How much rank to keep: rules that look at one matrix's spectrum, and prices that share one budget over many matrices.

Where kohya's and LyCORIS's tools have a rule of the same name, the definition is theirs and the rank the least that meets it
(kohya sd-scripts networks/resize_lora.py, whose index is one too high; LyCORIS utils/__init__.py, extract_linear).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from loratool.errors import LoratoolError, look_up
from loratool.numbers.krylov import Spectrum

NUMERICAL: Final = 1e-6
"""The share of the largest singular value below which others are nothing but what float32 arithmetic leaves."""


PRECISE: Final = 1e-6
"""The share of ‖ΔW‖² below which float32 products are wrong by some percent, and float64 is needed."""


@dataclass(frozen=True, slots=True)
class RankMethod:
    """One way to choose a rank: `rank` of a value and a spectrum, or None where more of the spectrum must be known.

    `lower` and `upper` bound the value; `whole` says that the method needs the complete spectrum; `least` is the lowest rank
    that the method gives.
    """

    rank: Callable[[float, Spectrum], int | None]
    lower: float
    upper: float
    whole: bool = False
    least: int = 1


def _given_rank(value: float, spectrum: Spectrum) -> int | None:
    return int(value) if len(spectrum.sigma) >= value or spectrum.complete else None


def _within(left: float, spectrum: Spectrum) -> int | None:
    """The least rank that leaves out at most the share `left` of the sum of squares."""
    kept = torch.cumsum(spectrum.sigma.square(), 0)
    enough = torch.nonzero(spectrum.total - kept <= left * spectrum.total)
    if len(enough):
        return int(enough[0]) + 1
    return len(kept) if spectrum.complete else None


def _above(limit: float, spectrum: Spectrum) -> int | None:
    """The number of singular values above `limit`."""
    # A known value at or below the limit shows that no further value is above; without it, more may be hidden.
    count = int((spectrum.sigma > limit).sum())
    return count if count < len(spectrum.sigma) or spectrum.complete else None


def _cumulative(value: float, spectrum: Spectrum) -> int | None:
    """The least rank whose singular values sum to a share `value` of all."""
    sums = torch.cumsum(spectrum.sigma, 0)
    return min(int((sums < value * sums[-1]).sum()) + 1, len(sums)) if spectrum.complete else None


def _largest(spectrum: Spectrum) -> float:
    return float(spectrum.sigma[0]) if len(spectrum.sigma) else 0.0


RANK_METHODS: Final[Mapping[str, RankMethod]] = {
    "rank": RankMethod(_given_rank, 1, math.inf),
    "max_error": RankMethod(lambda value, spectrum: _within(value**2, spectrum), 0, 1),
    "energy": RankMethod(lambda value, spectrum: _within(1 - value, spectrum), 0, 1),
    "sv_fro": RankMethod(lambda value, spectrum: _within(1 - value**2, spectrum), 0, 1),
    "sv_ratio": RankMethod(lambda value, spectrum: _above(_largest(spectrum) / value, spectrum), 1, math.inf),
    "sv_cumulative": RankMethod(_cumulative, 0, 1, whole=True),
    "threshold": RankMethod(_above, 0, math.inf),
    "auto": RankMethod(
        lambda _, spectrum: _above(max(spectrum.noise, NUMERICAL * _largest(spectrum)), spectrum), 0, 0, least=0
    ),
    "all": RankMethod(lambda _, spectrum: _above(NUMERICAL * _largest(spectrum), spectrum), 0, 0),
}
"""`rank` is the value itself; `max_error` is a share of ‖ΔW‖ that is left out, `energy` a share of ‖ΔW‖² that is kept;
`sv_ratio`, `sv_fro` and `sv_cumulative` are kohya's; `threshold` is LyCORIS's, as are `sv_ratio` (its 1 / ratio) and
`sv_cumulative` (its quantile); `auto` keeps what rounding to the stored dtype cannot have made; `all` keeps what exceeds
float32's noise."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One of `RANK_METHODS` and its value; `conv`, the rank of convolutions whose kernel is larger than 1 × 1, where that
    differs; and bounds of the rank.

    A rank is raised to the next of `steps`, if there are any; with `pad`, factors get zeros for the ranks that a matrix has
    no singular values for. Raises `LoratoolError` where the value is out of the method's range.
    """

    method: str = "all"
    value: float = 0.0
    conv: int | None = None
    least: int | None = None
    most: int | None = None
    steps: tuple[int, ...] = ()
    pad: bool = False

    def __post_init__(self) -> None:
        method = look_up(RANK_METHODS, self.method, "rule")
        if not method.lower <= self.value <= method.upper or not math.isfinite(self.value):
            raise LoratoolError(f"{self.method} is {self.value:g}, expected {_range(method)}")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise LoratoolError(f"the least rank {self.least} is above the largest, {self.most}")

    def of(self, shape: Sequence[int]) -> Rule:
        """The rule for a weight of `shape`: (out, in, *kernel)."""
        # kohya and LyCORIS count convolutions of kernel 1 × 1 as linear layers.
        if self.conv is None or math.prod(shape[2:]) == 1:
            return self
        return replace(self, method="rank", value=self.conv, conv=None, least=None, most=None)

    @property
    def expected_rank(self) -> int | None:
        """The rank, or its upper bound, where known before any spectrum: the width of the first block to compute."""
        if self.method == "rank":
            return self._raise_to_step(int(self.value))
        return self.most

    def padded(self, rank: int) -> int:
        """The rank that factors of `rank` are stored at: with `pad` at least the rank that was asked for."""
        asked = max(rank, self.least or 0, int(self.value) if self.method == "rank" else 0)
        return self._raise_to_step(asked) if self.pad and rank else rank

    def _raise_to_step(self, rank: int) -> int:
        """The least of the steps that holds `rank`; raises `LoratoolError` where none does."""
        if not self.steps or not rank:
            return rank
        step = next((step for step in self.steps if step >= rank), None)
        if step is None:
            raise LoratoolError(f"needs rank {rank}, and the largest that is allowed is {self.steps[-1]}; add `Rule(most=)`")
        return step

    @property
    def whole(self) -> bool:
        return RANK_METHODS[self.method].whole

    @property
    def precise(self) -> bool:
        """Whether the rule leaves out so little that products in float32 cannot tell, and float64 is needed."""
        left = {"max_error": self.value**2, "energy": 1 - self.value, "sv_fro": 1 - self.value**2}.get(self.method, 1.0)
        return left < PRECISE

    def __call__(self, spectrum: Spectrum) -> int | None:
        """The rank to keep; None where more of the spectrum must be known. The caller cuts it to the values that exist."""
        method, found = RANK_METHODS[self.method], len(spectrum.sigma)
        least = method.least if self.least is None else self.least
        rank = method.rank(self.value, spectrum)
        if rank is None:
            # The method wants at least the values known so far, and where those reach the cap, the cap decides.
            return self.most if self.most is not None and found >= self.most else None
        rank = max(rank, least)
        return self._raise_to_step(rank if self.most is None else min(rank, self.most))


def _range(method: RankMethod) -> str:
    if math.isinf(method.upper):
        return f"at least {method.lower:g}"
    return f"between {method.lower:g} and {method.upper:g}"


@dataclass(frozen=True, slots=True)
class RankCandidate:
    """A module whose rank is to be bought: `sigma`, its leading singular values; `complete`, whether no further value is
    worth anything; `cost`, the bytes that each rank takes; and `total`, ‖ΔW‖²."""

    sigma: Tensor
    complete: bool
    cost: int
    total: float


@dataclass(frozen=True, slots=True)
class RankAllocation:
    """The ranks bought; `gain_per_byte`, the gain in squares per byte of the first rank not bought (0 where all were); and
    `unsettled`, the numbers of the offers whose unknown singular values may be worth more than that."""

    ranks: tuple[int, ...]
    gain_per_byte: float
    unsettled: tuple[int, ...]


def allocate_ranks(
    offers: Sequence[RankCandidate],
    *,
    nbytes: float = math.inf,
    squares: float = math.inf,
    least: int = 0,
    fixed: float = 0.0,
) -> RankAllocation:
    """Spends bytes where each saves most of ‖ΔW − LoRA‖², over all modules: at most `nbytes`, or until `squares` are saved.
    The first `least` ranks of each module are bought before all others; a module's first rank takes `fixed` bytes more, for
    its names.

    Either way the choice is optimal but for the last step (the fractional knapsack's greedy order). What is unknown of an
    offer counts as nothing, so that the price of the last purchase can only rise when more is known.
    """
    if not offers:
        return RankAllocation((), 0.0, ())
    gains = torch.cat([offer.sigma.square() for offer in offers])
    costs = torch.cat([torch.full((len(offer.sigma),), offer.cost, dtype=torch.float64) for offer in offers])
    owners = torch.cat([torch.full((len(offer.sigma),), index) for index, offer in enumerate(offers)])
    must = torch.cat([torch.arange(len(offer.sigma)) < least for offer in offers])
    # Within a module gains fall and costs are equal. With a stable sort its ranks thus come in their own order, so that
    # counting the purchases of a module gives its rank.
    rates = gains / costs
    order = torch.argsort(torch.where(must, math.inf, rates), descending=True, stable=True)
    taken = costs + fixed * torch.cat([torch.arange(len(offer.sigma)) == 0 for offer in offers])
    fit = int((torch.cumsum(taken[order], 0) <= nbytes).sum())
    count = min(fit, int((torch.cumsum(gains[order], 0) < squares).sum()) + 1)
    price = float(rates[order[count]]) if count < len(order) else 0.0
    ranks = torch.bincount(owners[order[:count]], minlength=len(offers))
    # An offer whose last known value still sells at this price may hide others that would.
    unsettled = [
        index
        for index, offer in enumerate(offers)
        if not offer.complete and (not len(offer.sigma) or float(offer.sigma[-1]) ** 2 > price * offer.cost)
    ]
    return RankAllocation(tuple(ranks.tolist()), price, tuple(unsettled))


@dataclass(frozen=True, slots=True)
class Budget:
    """One bound over all modules instead of a rule for each: `nbytes` of the whole output, or the relative `error` of all
    changes together; `least` and `most` bound each module's rank. Raises `LoratoolError` unless exactly one of `nbytes` and
    `error` is given, and the error is between 0 and 1."""

    nbytes: int | None = None
    error: float | None = None
    least: int = 0
    most: int | None = None

    def __post_init__(self) -> None:
        if (self.nbytes is None) == (self.error is None):
            raise LoratoolError("a budget is a number of bytes, or a relative error")
        if self.nbytes is not None and self.nbytes < 1:
            raise LoratoolError(f"the size is {self.nbytes} bytes, expected at least one")
        if self.error is not None and not 0 < self.error < 1:
            raise LoratoolError(f"the total error is {self.error:g}, expected a share between 0 and 1")
