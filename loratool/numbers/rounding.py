"""From float32 to a stored dtype, once: to the nearest value, or to one of the two neighbours by chance.

Stochastic rounding keeps a small change on average where rounding to nearest would lose it. Its chance is a counter-based
generator's (Philox, Salmon et al. 2011) at the element's own index, so a result does not depend on blocks or threads.
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
    """The distance of each number from its neighbours in its own dtype, in float32, or float64 where it is stored so.

    Rounding to that dtype was off by up to half of it, and by 1/√12 of it on average.
    """
    dtype = values.dtype
    limits = torch.finfo(dtype)
    integers, exponent = _EXPONENTS[dtype]
    powers = (values.view(integers) & exponent).view(dtype)
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
"""An integer of the same width, and the bits of the exponent in it: alone they are the power of two below a number."""


INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the width of a number, by its bytes."""


def to_ordered_int(values: Tensor) -> Tensor:
    """Numbers as integers of their width in the same order, neighbours one apart; −0 comes just before 0."""
    return _turn_sign(values.contiguous().view(INTEGERS[values.element_size()]))


def from_ordered_int(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that `to_ordered_int` makes these integers of."""
    return _turn_sign(integers).view(dtype)


def adjacent_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """The next number of the same dtype below each, and the next above."""
    found = to_ordered_int(values)
    # The two zeros are one number.
    below = found - 1 - (found == 0).to(found.dtype)
    above = found + 1 + (found == -1).to(found.dtype)
    return from_ordered_int(below, values.dtype), from_ordered_int(above, values.dtype)


def _turn_sign(bits: Tensor) -> Tensor:
    """Sign and magnitude to two's complement, and back."""
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)


def round_stochastically(values: Tensor, dtype: torch.dtype, name: str, seed: int, index: int) -> Tensor:
    """float32 `values` rounded to one of the two neighbours in `dtype`, with a chance in proportion to nearness.

    The draws are those of the tensor called `name` from element `index` on. Exact values and wide dtypes stay.
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
    chance = missing / (other.float() - back)
    draws = _draws(name, seed, index, values.numel()).to(values.device)
    take = (missing != 0) & (draws.reshape(values.shape) < chance)
    return torch.where(take, other, rounded)


def _draws(name: str, seed: int, index: int, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1), multiples of 2⁻¹⁶, that belong to elements `index` on of tensor `name`."""
    key = np.frombuffer(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), dtype=np.uint64)
    first, skipped = divmod(index, PER_COUNTER)
    generator = np.random.Philox(key=key, counter=[first, 0, 0, 0])
    raw = generator.random_raw(-(-(count + skipped) // 4))
    return torch.from_numpy(raw.view(np.uint16)[skipped : skipped + count].astype(np.float32) / 65536)
