"""How far stored numbers are from a guess at them, counted in numbers of their dtype that lie between, and packed.

Most guesses are right and most others are next to it: four counts make a byte, and of those bz2 leaves little more than the
entropy of the counts (seen of bf16 weights that a change of a hundredth of their size was taken from: 0.149 bits of 0.125).
"""

from __future__ import annotations

import bz2
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratool.errors import InvalidFile
from loratool.rounding import in_order, ordered

ESCAPE: Final = 3
"""The two bits of a count that does not fit in two: it follows the packed ones, whole."""
LENGTH_BYTES: Final = 8

Integers = NDArray[np.integer]


def packed(values: Tensor, guess: Tensor) -> bytes:
    """What leads from `guess` to `values`, of the same shape and dtype, to the bit."""
    apart = (ordered(values).flatten() - ordered(guess).flatten()).numpy()
    width = 8 * apart.itemsize - 1
    # 0, −1, 1, −2 … become 0, 1, 2, 3 …
    counts = ((apart << 1) ^ (apart >> width)).view(f"u{apart.itemsize}")
    codes = np.minimum(counts, ESCAPE).astype(np.uint8)
    quads = np.pad(codes, (0, -len(codes) % 4)).reshape(-1, 4)
    together = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    small = bz2.compress(together.tobytes())
    return len(small).to_bytes(LENGTH_BYTES, "little") + small + bz2.compress(_little(counts[codes == ESCAPE]).tobytes())


def unpacked(raw: bytes, guess: Tensor) -> Tensor:
    """The values that `packed` was given with the same guess; raises `InvalidFile` for what it never makes."""
    itemsize, count = guess.element_size(), guess.numel()
    length = int.from_bytes(raw[:LENGTH_BYTES], "little")
    small, large = raw[LENGTH_BYTES : LENGTH_BYTES + length], raw[LENGTH_BYTES + length :]
    together = np.frombuffer(_inflated(small, -(-count // 4)), np.uint8)
    codes = np.stack([together >> shift & ESCAPE for shift in (0, 2, 4, 6)], axis=1).flatten()[:count]
    escaped = codes == ESCAPE
    counts = codes.astype(f"u{itemsize}")
    beyond = _inflated(large, int(escaped.sum()) * itemsize)
    counts[escaped] = np.frombuffer(beyond, f"<u{itemsize}")
    signed = counts.view(f"i{itemsize}")
    apart = torch.from_numpy((counts >> 1).view(f"i{itemsize}") ^ -(signed & 1))
    return in_order(ordered(guess).flatten() + apart, guess.dtype).reshape(guess.shape)


def _inflated(raw: bytes, count: int) -> bytes:
    """What was compressed, which must be `count` bytes: no more than that is ever unpacked."""
    decompressor = bz2.BZ2Decompressor()
    try:
        found = decompressor.decompress(raw, max_length=count + 1)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidFile(f"is damaged: {error}") from error
    if len(found) != count or not decompressor.eof:
        raise InvalidFile(f"is damaged: {count} bytes were packed, {len(found)} are there")
    return found


def _little(counts: Integers) -> Integers:
    return counts.astype(counts.dtype.newbyteorder("<"))
