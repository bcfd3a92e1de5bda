"""Stability AI's keys of metadata, `modelspec.*`, and what their values look like. No torch.

The specification: github.com/Stability-AI/ModelSpec, README.md, version 1.0.0; `encoder_layer`, `is_negative_embedding`,
`tags` and the dtypes are what sd-scripts (library/sai_model_spec.py) and SwarmUI write besides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from loratool.errors import LoratoolError

_PREFIX: Final = "modelspec."
MUST: Final = ("sai_model_spec", "architecture", "implementation", "title")
"""Keys without which a file does not follow the specification."""
ANYTHING: Final = r"(?s:.+)"
ISO_8601: Final = r"\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?"
_VALUES: Final[Mapping[str, tuple[str, str]]] = {
    "sai_model_spec": (r"\d+\.\d+\.\d+", "a version such as 1.0.0"),
    "architecture": (r"[a-z0-9][a-z0-9._-]*(/[a-z0-9._-]+)?", "an identifier such as stable-diffusion-xl-v1-base/lora"),
    "implementation": (r"\S(.*\S)?", "a code base such as sgm, diffusers, or its address"),
    "title": (ANYTHING, "a title"),
    "description": (ANYTHING, "a text"),
    "author": (ANYTHING, "a name"),
    "date": (ISO_8601, "a date such as 2026-07-16 or 2026-07-16T18:13:38Z"),
    "hash_sha256": (
        r"0x[0-9a-f]{64}",
        "0x and 64 hexadecimal digits: AutoV3, as `loratool hash` has it in full",
    ),
    "implementation_version": (r"\S+", "a version or a commit"),
    "license": (ANYTHING, "a licence's name, address or text"),
    "usage_hint": (ANYTHING, "a short text"),
    "category": (ANYTHING, "a label"),
    "thumbnail": (r"data:image/[a-z0-9.+-]+;base64,[A-Za-z0-9+/]+=*", "an image as data:image/jpeg;base64,…"),
    "merged_from": (ANYTHING, "titles with commas between them"),
    "tags": (ANYTHING, "tags with commas between them"),
    "resolution": (r"\d+x\d+", "WIDTHxHEIGHT, such as 1024x1024"),
    "trigger_phrase": (ANYTHING, "a text"),
    "prediction_type": (r"v|epsilon|flow|[a-z_]+", "v or epsilon"),
    "timestep_range": (r"\d+, ?\d+", "MIN,MAX, such as 0,499"),
    "encoder_layer": (r"\d+", "a number of layers"),
    "preprocessor": (ANYTHING, "a name"),
    "is_negative_embedding": (r"true|false", "true or false"),
    "unet_dtype": (r"\S+", "a dtype"),
    "vae_dtype": (r"\S+", "a dtype"),
    "data_format": (r"\S+", "a format such as fp16 or gptq-4bit"),
    "format_type": (r"\S+", "general, writing, chat, code or technical"),
    "language": (ANYTHING, "languages such as en/US"),
    "format_template": (ANYTHING, "a template"),
}
"""Each key without its prefix, with a pattern for the whole value and the pattern in words."""


def require_allowed(metadata: Mapping[str, str]) -> None:
    """Raises `LoratoolError` for a value that the specification does not allow."""
    for key, value in metadata.items():
        name = key.removeprefix(_PREFIX)
        if key == name or name not in _VALUES:
            continue
        pattern, words = _VALUES[name]
        if not re.fullmatch(pattern, value):
            raise LoratoolError(f"{key}={value[:100]}: expected {words}")


def warnings_of(metadata: Mapping[str, str]) -> Iterator[str]:
    """Sentences on keys that the specification asks for or does not know; none for metadata without any `modelspec.` key."""
    mine = {key.removeprefix(_PREFIX) for key in metadata if key.startswith(_PREFIX)}
    if not mine:
        return
    missing = [_PREFIX + name for name in MUST if name not in mine]
    if missing:
        yield f"the specification of modelspec asks for {', '.join(missing)} too"
    unknown = sorted(_PREFIX + name for name in mine - _VALUES.keys() if not name.startswith("hash_"))
    if unknown:
        yield f"{', '.join(unknown)}: no key of the specification of modelspec"
