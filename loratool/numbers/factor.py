"""A matrix as the two factors that a file stores, and the distance of their product from the matrix, measured as stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor

from loratool.errors import LoratoolError, NonFinite
from loratool.numbers.devices import to_float64
from loratool.numbers.krylov import Spectrum, TruncatedSVD, squared_norm, truncated_svd, truncated_svd_batch
from loratool.numbers.linalg import Factors, ProductSVD, all_finite, dtype_name, effective_rank
from loratool.numbers.ranks import NUMERICAL, RankCandidate, Rule

_CHUNK: Final = 1 << 19
"""Elements of a residual that are in memory at a time: 2 MiB in float32."""
# Squares of 2^±40 leave a factor of 2^46 to float32's limits, 2^±126: for sums above, and below for entries 2^-23 as large.
SAFE_EXPONENT: Final = 40
"""A matrix is rescaled where its largest entry is beyond 2 to this power, or below 2 to minus this power."""

Split = Literal["even", "up", "down"]
"""The factor that the singular values go to; "even" gives the root of each to both."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How factors are stored: their `dtype`, the `split` of the singular values over them, and `clamp`, the quantile that
    larger entries are cut down to, as kohya's tools do (which only adds to the error)."""

    dtype: torch.dtype
    split: Split = "even"
    clamp: float | None = None


@dataclass(frozen=True, slots=True)
class StoredFactors:
    """`up` (m, r) and `down` (r, n) as stored; `norm` ‖D‖; `error` ‖D − up · down‖, and `least`, that of the factors before
    they were rounded; the effective rank of the singular values kept."""

    up: Tensor
    down: Tensor
    norm: float
    error: float
    least: float
    effective_rank: float

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def padded(self, rank: int) -> StoredFactors:
        """The factors with zero columns and rows added up to `rank`, which leave their product as it is."""
        more = rank - self.rank
        if not more:
            return self
        up = torch.cat([self.up, self.up.new_zeros(len(self.up), more)], dim=1)
        return replace(self, up=up, down=torch.cat([self.down, self.down.new_zeros(more, self.down.shape[1])]))


def factorise(dense: Tensor, rule: Rule, storage: Storage, *, noise: float = 0.0) -> StoredFactors:
    """The best factors of `dense` (m, n) at the rank that `rule` gives, computed on the device of `dense`.

    Raises `NonFinite` where the factors overflow the dtype, and `LoratoolError` where rounding them to it alone exceeds the
    rule's largest error.
    """
    (found,) = factorise_batch([dense], [rule], [storage], [noise])
    if isinstance(found, LoratoolError):
        raise found
    return found


def factorise_batch(
    denses: Sequence[Tensor], rules: Sequence[Rule], storages: Sequence[Storage], noises: Sequence[float]
) -> list[StoredFactors | LoratoolError]:
    """`factorise` of several matrices of one shape, each by a rule of its own, all expecting the same rank: found together,
    stored one by one. An error of one matrix stands in the place of its factors."""
    works = [
        _Factoring(dense, rule, storage, noise)
        for dense, rule, storage, noise in zip(denses, rules, storages, noises, strict=True)
    ]
    found = truncated_svd_batch(
        [work.matrix for work in works],
        rules,
        rank=rules[0].expected_rank,
        noises=[work.noise for work in works],
        whole=rules[0].whole,
    )
    done: list[StoredFactors | LoratoolError] = []
    for work, first in zip(works, found, strict=True):
        try:
            done.append(work.meets(first))
        except LoratoolError as error:
            done.append(error)
    return done


class _Factoring:
    """One matrix on its way to factors, scaled to where its squares neither over- nor underflow."""

    def __init__(self, dense: Tensor, rule: Rule, storage: Storage, noise: float) -> None:
        matrix, exponent = rescaled_to_safe_range(dense)
        self.matrix = matrix.double() if rule.precise else matrix
        self.rule, self.storage = rule, storage
        # Each factor takes half of the exponent, which is even, so that both scalings are exact.
        self.half = math.ldexp(1.0, exponent // 2)
        self.back = self.half**2
        self.noise = noise / self.back
        self.norm = math.sqrt(squared_norm(self.matrix))

    def meets(self, first: TruncatedSVD) -> StoredFactors:
        """The stored factors that meet the rule, where `first` is the decomposition that the rule chose before rounding."""

        def attempt(rule: Rule) -> StoredFactors:
            if rule is self.rule:
                return self._store(first)
            return self._store(truncated_svd(self.matrix, rule, rank=rule.expected_rank, noise=self.noise, whole=rule.whole))

        return _raise_until_met(self.rule, self.storage, min(self.matrix.shape), attempt)

    def _store(self, found: TruncatedSVD) -> StoredFactors:
        half, back = self.half, self.back
        # Factors are rounded at their true size, and measured in the safe range, where the residual's squares are numbers.
        up, down = store_factors(found.up * half, found.down * half, self.storage)
        error = residual_norm(self.matrix, to_float64(up) / half, to_float64(down) / half)
        kept = effective_rank(found.spectrum.sigma[: up.shape[1]])
        return StoredFactors(up.cpu(), down.cpu(), self.norm * back, error * back, found.left * back, kept)


def recompress(
    products: Sequence[Factors], rules: Sequence[Rule], storages: Sequence[Storage]
) -> list[StoredFactors | LoratoolError]:
    """The best factors of products (up, down) of one shape at the ranks that the rules give, from the factors alone. What
    `factorise` would raise of a product stands in the place of its factors."""
    ups, downs = zip(*products, strict=True)
    try:
        cores = ProductSVD.enough_each(ups, downs, [partial(_rank_of, rule) for rule in rules])
    except NonFinite as error:
        # Of several it does not say which: then each is tried by itself.
        apart = zip(products, rules, storages, strict=True)
        return [error] if len(products) == 1 else [recompress([p], [rule], [storage])[0] for p, rule, storage in apart]
    done: list[StoredFactors | LoratoolError] = []
    for core, rule, storage in zip(cores, rules, storages, strict=True):
        try:
            done.append(_recompress(core, rule, storage))
        except LoratoolError as error:
            done.append(error)
    return done


def _rank_of(rule: Rule, sigma: Tensor) -> int:
    """The rank that a rule gives a matrix whose singular values are all known."""
    return min(rule(Spectrum(sigma, float(sigma.square().sum()), True)) or 0, len(sigma))


def _recompress(core: ProductSVD, rule: Rule, storage: Storage) -> StoredFactors:
    """The best factors of one product, as they are to be stored."""
    sigma, norm = core.sigma, math.sqrt(float(core.squares.sum()))

    def attempt(rule: Rule) -> StoredFactors:
        rank = _rank_of(rule, sigma)
        ups, downs = store_factors(*core.factors(rank), storage)
        error = core.distance(ups, downs)
        return StoredFactors(ups.cpu(), downs.cpu(), norm, error, float(sigma[rank:].norm()), effective_rank(sigma[:rank]))

    return _raise_until_met(rule, storage, len(sigma), attempt)


def _raise_until_met(rule: Rule, storage: Storage, full: int, attempt: Callable[[Rule], StoredFactors]) -> StoredFactors:
    """The factors that `attempt` makes of the rule, at more rank where rounding them exceeded the rule's largest error.

    `full` is the largest rank of the matrix. Raises `LoratoolError` where no rank meets the rule.
    """
    asked = rule.value
    while True:
        found = attempt(rule)
        if rule.method != "max_error" or found.error <= asked * found.norm:
            return found
        # Rounding counts as independent of truncation: their squares add up, and truncation gets what rounding leaves over.
        # At least one more rank each time, so that the loop ends.
        rounding = math.sqrt(max(found.error**2 - found.least**2, 0.0)) / found.norm
        if rounding >= asked or found.rank >= min(full, rule.most or full):
            raise LoratoolError(
                f"rounding its factors to {dtype_name(storage.dtype)} alone takes {rounding:.2e} of it, and the largest "
                f"error is {asked:.2e}; choose `dtype='float32'`, or a larger error"
            )
        rule = replace(rule, value=math.sqrt(asked**2 - rounding**2), least=found.rank + 1)


def candidate_of(dense: Tensor, rule: Rule, itemsize: int) -> RankCandidate:
    """The leading singular values of `dense`, as many as `rule` wants, and a rank's cost at `itemsize` bytes a number."""
    (offer,) = candidates_of([dense], [rule], [itemsize])
    return offer


def candidates_of(denses: Sequence[Tensor], rules: Sequence[Rule], itemsizes: Sequence[int]) -> list[RankCandidate]:
    """`candidate_of` of several matrices of one shape, each with a rule of its own; all rules expect the same rank."""
    ranged = [rescaled_to_safe_range(dense) for dense in denses]
    backs = [math.ldexp(1.0, exponent) for _, exponent in ranged]
    # A threshold alone is an absolute size, which the scaling changes; the values of other rules are ranks and ratios.
    limits = [
        replace(rule, value=rule.value / back) if rule.method == "threshold" else rule
        for rule, back in zip(rules, backs, strict=True)
    ]
    found = truncated_svd_batch(
        [matrix for matrix, _ in ranged], limits, rank=rules[0].expected_rank, noises=[0.0] * len(ranged)
    )
    return [_candidate(*each) for each in zip(found, rules, backs, denses, itemsizes, strict=True)]


def _candidate(found: TruncatedSVD, rule: Rule, back: float, matrix: Tensor, itemsize: int) -> RankCandidate:
    known = found.spectrum.sigma[: found.up.shape[1]].cpu()
    sigma = known[known > NUMERICAL * known[:1]]
    # Rule 'all' returns every value above noise, so nothing further is hidden; nor is anything behind a value of noise.
    settled = rule.method == "all" or len(sigma) < len(known) or len(known) >= min(matrix.shape)
    # A rule that ended below its cap has met a value that it no longer wanted.
    settled = settled or len(known) < (rule.most or 0)
    return RankCandidate(sigma * back, settled, sum(matrix.shape) * itemsize, found.spectrum.total * back**2)


def store_factors(up: Tensor, down: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
    """Balanced factors in float64, as `storage` has them; raises `NonFinite` where they overflow the dtype."""
    # Each column of a balanced `up` is as long as the root of its singular value. kohya clamps U · S and Vᵀ, so a clamp
    # moves the singular values to `up`, unless they are to stand in `down`.
    if storage.split != "even" or storage.clamp is not None:
        root = torch.linalg.vector_norm(up, dim=0)
        over = torch.where(root > 0, 1 / root, 0.0)
        left, right = (root, over) if storage.split != "down" else (over, root)
        up, down = up * left, down * right[:, None]
    if storage.clamp is not None:
        # kohya's quantile is of the signed entries of both factors; `torch.quantile` refuses more than 2^24 of them.
        limit = float(torch.cat([up.flatten(), down.flatten()]).sort().values[_index(up, down, storage.clamp)])
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    up, down = up.to(storage.dtype), down.to(storage.dtype)
    if not (all_finite(up) and all_finite(down)):
        raise NonFinite(f"its factors overflow {dtype_name(storage.dtype)}; choose `dtype='float32'` or bfloat16")
    return up, down


def _index(up: Tensor, down: Tensor, quantile: float) -> int:
    return min(round(quantile * (up.numel() + down.numel() - 1)), up.numel() + down.numel() - 1)


def residual_norm(dense: Tensor, up: Tensor, down: Tensor) -> float:
    """‖D − up · down‖, a block of rows at a time: differences in D's dtype, their squares summed in float64."""
    total, ups, downs = 0.0, up.to(dense.dtype), down.to(dense.dtype)
    step = max(1, _CHUNK // max(dense.shape[1], 1))
    for rows, part in zip(torch.split(dense, step), torch.split(ups, step), strict=True):
        total += squared_norm(torch.addmm(rows, part, downs, alpha=-1))
    return math.sqrt(total)


def rescaled_to_safe_range(dense: Tensor) -> tuple[Tensor, int]:
    """`dense` divided by 2 to an even power where its squares might leave the range of float32, and that power, else 0."""
    low, high = torch.aminmax(dense)
    exponent = math.frexp(max(-float(low), float(high)))[1]
    exponent += exponent % 2
    if abs(exponent) <= SAFE_EXPONENT:
        return dense, 0
    return torch.ldexp(dense, torch.tensor(-exponent)), exponent
