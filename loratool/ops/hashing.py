"""kohya's hashes of an adapter, sshs_model_hash and sshs_legacy_hash (sd-scripts library/train_util.py).

The first is the sha256 of all bytes behind the header, which Civitai and A1111 call AutoV3; the second is A1111's old hash,
of 64 KiB from the first MiB on, of a file with the training's metadata alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

from loratool.header import TensorInfo, encode_header

LEGACY_START: Final = 0x100000
LEGACY_BYTES: Final = 0x10000


def hashes(infos: Mapping[str, TensorInfo], parts: Sequence[memoryview], metadata: Mapping[str, str]) -> dict[str, str]:
    """Both hashes of tensors that lie in the file in this order, `parts` being their bytes."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header = encode_header(infos, training)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": _legacy([memoryview(header), *parts])}


def _legacy(parts: Sequence[memoryview]) -> str:
    digest, position = hashlib.sha256(), 0
    for part in parts:
        begin = max(0, LEGACY_START - position)
        digest.update(part[begin : max(begin, LEGACY_START + LEGACY_BYTES - position)])
        position += len(part)
    return digest.hexdigest()[:8]
