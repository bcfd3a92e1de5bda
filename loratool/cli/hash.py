"""`loratool hash`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli.inputs import expand_inputs, input_name
from loratool.cli.options import json_option
from loratool.cli.render import print_facts, print_json, warn
from loratool.text import safe, size

if TYPE_CHECKING:
    from loratool.verbs.hash import Hashes


@click.command("hash", short_help="Print the hashes that sites and tools know a file by.")
@click.argument("files", nargs=-1, required=True, type=input_name, callback=expand_inputs)
@click.option("--check", is_flag=True, help="Compare with what the file says of itself; exit code 1 where that is wrong.")
@json_option
@click.pass_context
def hash_command(context: click.Context, files: tuple[Path, ...], check: bool, as_json: bool) -> None:
    """Print all hashes of FILES, read once: AutoV1, AutoV2 and AutoV3 as Civitai and A1111 show them, SHA-256, BLAKE3,
    CRC32, and the two that kohya writes into an adapter.

    Of a PEFT folder, those of its weights. BLAKE3 needs the extra loratool[hash].

    \b
    Example:
      loratool hash style.safetensors
      loratool hash --check style.safetensors
    """
    from loratool.verbs.hash import hash_file

    found = [hash_file(path) for path in files]
    if as_json:
        print_json(found)
    for hashes in found:
        if not as_json:
            print_facts(hashes.path, _facts(hashes))
        # Not a failure: a file need not state its hashes, and none that it states is wrong.
        if check and not hashes.claims:
            warn(f"{hashes.path}: says nothing of its own hashes, so that there is nothing to check")
    if check and not all(hashes.true for hashes in found):
        context.exit(1)


def _facts(hashes: Hashes) -> Iterator[tuple[str, str]]:
    yield "size", f"{size(hashes.size)} ({hashes.size:,} bytes)"
    yield "AutoV1", hashes.autov1.upper()
    yield "AutoV2", hashes.autov2.upper()
    yield "AutoV3", hashes.letters or "none: not a safetensors file"
    yield "SHA-256", hashes.sha256
    yield "BLAKE3", hashes.blake3 or "needs `pip install loratool[hash]`"
    yield "CRC32", hashes.crc32.upper()
    if hashes.sshs_model_hash:
        yield "sshs_model_hash", hashes.sshs_model_hash
        yield "sshs_legacy_hash", hashes.sshs_legacy_hash or ""
    for key, true in hashes.claims.items():
        yield safe(key), "the file says so too" if true else "WRONG: the file says another"
