"""Residuals: the distances of stored numbers from a guess at them, in steps of their dtype, packed and unpacked to the bit.

Most guesses are right, and most others are off by one. Four counts make a byte, and bz2 packs the bytes to little more than
the entropy of the counts (0.149 bits a number, where the entropy is 0.125, for bf16 weights from which a change of a
hundredth of their size was subtracted).
"""

from __future__ import annotations

import bz2
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratool.errors import InvalidFile
from loratool.numbers.rounding import from_ordered_int, to_ordered_int

ESCAPE: Final = 3
"""The two bits that stand for a count above two, which follows whole in a second stream."""
LENGTH_BYTES: Final = 8
"""Bytes of each stream's length."""
_CHUNK: Final = 1 << 20
"""Numbers that are packed at a time."""

Integers = NDArray[np.integer]


def pack_residual(values: Tensor, guess: Tensor) -> bytes:
    """The bytes that lead from `guess` to `values`, of the same shape and dtype, to the bit."""
    pairs = zip(torch.split(values.flatten(), _CHUNK), torch.split(guess.flatten(), _CHUNK), strict=True)
    return b"".join(_pack(to_ordered_int(value).numpy(), to_ordered_int(guessed).numpy()) for value, guessed in pairs)


def unpack_residual(raw: bytes, guess: Tensor) -> Tensor:
    """The values that `pack_residual` was given with the same guess; raises `InvalidFile` for bytes that it never writes."""
    values, start = torch.empty_like(guess).flatten(), 0
    for part, guessed in zip(torch.split(values, _CHUNK), torch.split(guess.flatten(), _CHUNK), strict=True):
        integers = to_ordered_int(guessed)
        apart, start = _unpack(raw, start, integers.numpy())
        part.copy_(from_ordered_int(integers + torch.from_numpy(apart), guess.dtype))
    if start != len(raw):
        raise InvalidFile(f"is damaged: {len(raw) - start} bytes too many")
    return values.reshape(guess.shape)


def _pack(values: Integers, guess: Integers) -> bytes:
    """The lengths of two streams, and the streams: four counts a byte, and the counts that two bits cannot hold."""
    # Differences may wrap around at the width of the numbers, as the sum does that takes them back.
    apart = values - guess
    # 0, −1, 1, −2 … become 0, 1, 2, 3 …, so that small distances of either sign are small counts.
    counts = ((apart << 1) ^ (apart >> (8 * apart.itemsize - 1))).view(f"u{apart.itemsize}")
    codes = np.minimum(counts, ESCAPE).astype(np.uint8)
    quads = np.pad(codes, (0, -len(codes) % 4)).reshape(-1, 4)
    together = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    beyond = counts[codes == ESCAPE]
    streams = [bz2.compress(part.tobytes()) for part in (together, beyond.astype(beyond.dtype.newbyteorder("<")))]
    return b"".join([len(stream).to_bytes(LENGTH_BYTES, "little") for stream in streams] + streams)


def _unpack(raw: bytes, start: int, guess: Integers) -> tuple[Integers, int]:
    """The distances of the values from `guess`, read from the streams that begin at `start`, and the streams' end."""
    itemsize, count = guess.itemsize, len(guess)
    body = start + 2 * LENGTH_BYTES
    first, second = (int.from_bytes(raw[at : at + LENGTH_BYTES], "little") for at in (start, start + LENGTH_BYTES))
    together = np.frombuffer(_inflate(raw[body : body + first], -(-count // 4)), np.uint8)
    codes = np.stack([together >> shift & ESCAPE for shift in (0, 2, 4, 6)], axis=1).flatten()[:count]
    escaped = codes == ESCAPE
    counts = codes.astype(f"u{itemsize}")
    beyond = _inflate(raw[body + first : body + first + second], int(escaped.sum()) * itemsize)
    counts[escaped] = np.frombuffer(beyond, f"<u{itemsize}")
    return (counts >> 1).view(f"i{itemsize}") ^ -(counts.view(f"i{itemsize}") & 1), body + first + second


def _inflate(raw: bytes, count: int) -> bytes:
    """The bytes that were compressed to `raw`; raises `InvalidFile` unless there are `count`."""
    # One byte beyond shows that there are too many, and a hostile file cannot unpack to more.
    decompressor = bz2.BZ2Decompressor()
    try:
        found = decompressor.decompress(raw, max_length=count + 1)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidFile(f"is damaged: {error}") from error
    if len(found) != count or not decompressor.eof:
        raise InvalidFile(f"is damaged: {count} bytes were packed, {len(found)} are there")
    return found
