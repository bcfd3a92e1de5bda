"""Rounding from float32 to a stored dtype, by chance to one of two neighbours; ULPs, neighbours and numbers as ordered ints.

Stochastic rounding keeps a small change on average where rounding to nearest would lose the change. Its draws come from a
counter-based generator (Philox, Salmon et al. 2011) at the element's own index, so a result does not depend on blocks or
threads.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import torch
from torch import Tensor

PER_COUNTER: Final = 16
"""16-bit draws in one Philox block of 256 bits."""


def max_finite(dtype: torch.dtype) -> float:
    """The largest finite value of a dtype."""
    return torch.finfo(dtype).max


def ulp(values: Tensor) -> Tensor:
    """The ULP of each number in its dtype: the distance to the neighbour away from zero, in float32 (float64 for float64).

    Rounding to that dtype was off by up to half an ULP, and by 1/√12 ULP on average.
    """
    dtype = values.dtype
    limits = torch.finfo(dtype)
    integers, exponent = _EXPONENTS[dtype]
    powers = (values.view(integers) & exponent).view(dtype)
    # Subnormal numbers, whose exponent bits are all zero, are as far apart as the smallest normal ones.
    wide = powers if dtype == torch.float64 else powers.float()
    return wide.clamp_min(limits.smallest_normal) * limits.eps


_EXPONENTS: Final = {
    torch.float64: (torch.int64, 0x7FF0 << 48),
    torch.float32: (torch.int32, 0x7F80 << 16),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float8_e4m3fn: (torch.uint8, 0x78),
    torch.float8_e5m2: (torch.uint8, 0x7C),
}
"""For each dtype an integer of its width, and the mask of the exponent's bits: these alone are the power of two below a
number."""


INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype of a number's width, by the number's bytes."""


def to_ordered_int(values: Tensor) -> Tensor:
    """Numbers as integers of their width, in the same order and with neighbours one apart; −0 comes just before 0."""
    return _turn_sign(values.contiguous().view(INTEGERS[values.element_size()]))


def from_ordered_int(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of `dtype` that `to_ordered_int` turned into these integers."""
    return _turn_sign(integers).view(dtype)


def adjacent_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """The next number of the same dtype below each, and the next above."""
    found = to_ordered_int(values)
    # The two zeros are one number: the neighbour of either lies beyond the other.
    below = found - 1 - (found == 0).to(found.dtype)
    above = found + 1 + (found == -1).to(found.dtype)
    return from_ordered_int(below, values.dtype), from_ordered_int(above, values.dtype)


def _turn_sign(bits: Tensor) -> Tensor:
    """Turns sign and magnitude into two's complement, and back."""
    # The shift spreads the sign: of negative numbers all bits but the sign are turned, of others none.
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)


def round_stochastically(values: Tensor, dtype: torch.dtype, name: str, seed: int, index: int) -> Tensor:
    """The float32 `values` rounded to one of the two neighbours in `dtype`, each as likely as the value is near.

    The draws are those of the tensor called `name` from element `index` on. Values that `dtype` holds exactly stay, and
    dtypes as wide as float32 take all values as they are.
    """
    rounded = values.to(dtype)
    if dtype.itemsize >= values.dtype.itemsize:
        return rounded
    back = rounded.float()
    missing = values - back
    bits = rounded.view(torch.int16 if dtype.itemsize == 2 else torch.int8)
    # Stored numbers are a sign and a magnitude: one step away from zero is one more in the bits, whatever the sign.
    away = (missing > 0) == ~torch.signbit(rounded.float())
    other = (bits + away * 2 - 1).to(bits.dtype).view(dtype)
    # Where the nearest is Inf the chance is NaN, which no draw is below: an overflow stays one.
    chance = missing / (other.float() - back)
    draws = _draws(name, seed, index, values.numel()).to(values.device)
    take = (missing != 0) & (draws.reshape(values.shape) < chance)
    return torch.where(take, other, rounded)


def _draws(name: str, seed: int, index: int, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1), multiples of 2⁻¹⁶, for the elements of tensor `name` from `index` on."""
    key = np.frombuffer(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), dtype=np.uint64)
    first, skipped = divmod(index, PER_COUNTER)
    generator = np.random.Philox(key=key, counter=[first, 0, 0, 0])
    raw = generator.random_raw(-(-(count + skipped) // 4))
    return torch.from_numpy(raw.view(np.uint16)[skipped : skipped + count].astype(np.float32) / 65536)
