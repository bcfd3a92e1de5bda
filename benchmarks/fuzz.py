"""Fuzzing what looks at files first: `python -m benchmarks.fuzz [--what headers|formats|kinds] [--count N] [--seed N]`.

The header check goes against the reference:

Sound safetensors files are mutated (bytes, digits, tokens of their JSON, offsets, dtypes, shapes, the length, the end), and
each goes to our `parse_header`, as `read_header` would call it, and to safetensors' own. Counted are exceptions that are not
ours, files that we accept and the reference refuses, and the longest and the largest. What we alone refuse is counted by our
message: it should be duplicates, limits, and blanks before the header.

Mutants that reach a new answer of our parser, which is a new message or a new number of tensors, join the seeds, so that the
search goes where it has not been. Exit code 1 where anything leaked or was let through.

The readers of formats are given adapters of one model in every format that it has, with mutated headers: `inspect` has to
say what they are, or why not. Mutants are steered in the same way, by all that the report says.

Files of every kind are mutated (`benchmarks.mutants`: shapes, dtypes, numbers, leaves, configs) and go through every verb,
which writes an output, from which an undo file leads back, or ends in an error in words.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import re
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, deserialize

from benchmarks import common
from benchmarks.mutants import SORTS, VERBS, run_verb
from loratool import LoratoolError, convert, edit, inspect
from loratool.files.header import BASE_HEADER_BYTES, parse_header
from loratool.formats.table import FORMATS

TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"true", b"-", b"0", b"9" * 19, b"9" * 25, b"1e3", b"1.5", b"NaN",
    b"\\u0061", b"\\ud800", b"\xff", b"\x00", b" ", b"\n", b'"dtype"', b'"F32"', b'"F4"', b'"BF16"', b'"I64"', b'"shape"',
    b"[0]", b"[]", b'"data_offsets"', b'"__metadata__"', b'{"a":"b"}', b"18446744073709551615", b"9223372036854775808",
    b"4294967296",
)  # fmt: skip
DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F64": 8}


LARGEST_SEED = 4096
"""Bytes of a mutated header that joins the seeds."""
MOST_SEEDS = 5000
MOST_SECONDS = 10
"""The longest that a run on a small file may take."""


def sound(chance: random.Random) -> bytes:
    """A file that both accept."""
    document: dict[str, object] = {}
    if chance.random() < 0.5:
        document["__metadata__"] = {chance.choice("abc"): chance.choice(("", "x", "é", '"'))}
    data = 0
    for number in range(chance.randrange(5)):
        dtype = chance.choice(list(DTYPES))
        shape = [chance.randrange(4) for _ in range(chance.randrange(4))]
        size = DTYPES[dtype]
        for side in shape:
            size *= side
        name = chance.choice((f"t{number}", f"é{number}", f'q"{number}', f"a.b.{number}"))
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [data, data + size]}
        data += size
    header = json.dumps(document, ensure_ascii=chance.random() < 0.5).encode()
    return struct.pack("<Q", len(header)) + header + bytes(data)


def _byte(header: bytearray, where: int, chance: random.Random) -> None:
    if header:
        header[where % len(header)] = chance.randrange(256)


def _token(header: bytearray, where: int, chance: random.Random) -> None:
    header[where:where] = chance.choice(TOKENS)


def _less(header: bytearray, where: int, chance: random.Random) -> None:
    del header[where : where + chance.randrange(1, 12)]


def _twice(header: bytearray, where: int, chance: random.Random) -> None:
    header[where:where] = header[where : where + chance.randrange(1, 60)]


def _number(header: bytearray, where: int, chance: random.Random) -> None:
    numbers = list(re.finditer(rb"\d+", bytes(header)))
    if numbers:
        found = chance.choice(numbers)
        value = int(found[0][:19]) + chance.choice((-1, 1, -8, 8, 2**32, 2**63))
        header[found.start() : found.end()] = str(value).encode()


def _spliced(header: bytearray, where: int, chance: random.Random) -> None:
    other = sound(chance)
    header[where:where] = other[8 : 8 + chance.randrange(len(other))]


CHANGES = (_byte, _token, _less, _twice, _number, _spliced)


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """A file after one to four changes of its header, and few of its length and its end."""
    header, data = bytearray(raw[8:]), b""
    length = int.from_bytes(raw[:8], "little")
    if length <= len(header):
        header, data = header[:length], bytes(header[length:])
    for _ in range(chance.randrange(1, 5)):
        chance.choice(CHANGES)(header, chance.randrange(len(header) + 1), chance)
    if chance.random() < 0.1:
        data = data[: chance.randrange(len(data) + 1)] + b"\0" * chance.randrange(9)
    length = len(header) if chance.random() < 0.9 else chance.choice((0, 1, len(header) + 1, 2**63, 2**64 - 1, 99 << 20))
    return struct.pack("<Q", length) + bytes(header) + data


def ours(raw: bytes) -> str:
    """What we say of a file: a message, or how many tensors it has."""
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or not 0 < length <= min(BASE_HEADER_BYTES, len(raw) - 8):
        return "refused by its length"
    try:
        tensors, _ = parse_header(raw[8 : 8 + length], len(raw))
    except LoratoolError as error:
        return "refused: " + re.sub(r"['\"\d\[\]].*", "…", str(error))
    return f"accepted with {len(tensors)} tensors"


def reference(raw: bytes) -> bool:
    """Whether safetensors accepts it."""
    try:
        deserialize(raw)
    except (SafetensorError, ValueError, TypeError, OverflowError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=["headers", "formats", "kinds"], default="headers")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    {"headers": headers, "formats": formats, "kinds": kinds}[arguments.what](arguments)


@dataclass
class Search:
    """What came of mutants: how often each answer was given, exceptions that are not ours, the longest time, and minutes."""

    answers: Counter[str] = field(default_factory=Counter)
    leaked: Counter[str] = field(default_factory=Counter)
    slow: float = 0.0
    minutes: float = 0.0


def searched(
    seeds: list[bytes],
    count: int,
    chance: random.Random,
    ask: Callable[[bytes], str],
    judge: Callable[[bytes, str], None] = lambda raw, answer: None,
    largest: float = math.inf,
) -> Search:
    """Asks about so many mutants of `seeds`, which those join that reach a new answer; `judge` is told of each answer."""
    found, started = Search(), time.monotonic()
    for _ in range(count):
        raw = mutated(chance.choice(seeds), chance)
        before = time.perf_counter()
        try:
            answer = ask(raw)
        except Exception as error:
            found.leaked[f"{type(error).__name__}: {error}"] += 1
            continue
        found.slow = max(found.slow, time.perf_counter() - before)
        judge(raw, answer)
        found.answers[answer] += 1
        if found.answers[answer] == 1 and len(raw) < largest and len(seeds) < MOST_SEEDS:
            seeds.append(raw)
    found.minutes = (time.monotonic() - started) / 60
    return found


def formats(arguments: argparse.Namespace) -> None:
    """Prints what `inspect` made of mutated adapters."""
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="loratool-fuzz-") as name:
        seeds, path = list(spellings(Path(name))), Path(name, "mutant.safetensors")
        count = len(seeds)

        def ask(raw: bytes) -> str:
            path.write_bytes(raw)
            try:
                report = inspect(path)
            except LoratoolError as error:
                answer = str(error)
            else:
                odd = f"{getattr(report, 'kinds', '')} {getattr(report, 'suspicions', '')}"
                answer = f"{report.format} {report.arch} {odd}"
            return re.sub(r"\d+|'[^']*'", "…", answer)[:300]

        found = searched(seeds, arguments.count, chance, ask)
    many = f"{arguments.count:,} mutants of {count} adapters in {found.minutes:.1f} min, seed {arguments.seed}"
    print(f"{common.machine()}: {many}")
    print(f"  {len(found.answers):,} different reports and errors; longest {found.slow:.3f} s")
    print(f"  exceptions that are not ours: {sum(found.leaked.values())} {dict(found.leaked)}")
    sys.exit(1 if found.leaked else 0)


def spellings(folder: Path) -> Iterator[bytes]:
    """One attention layer's LoRA of an SDXL and of a Llama, in every format that has them."""
    fixtures = Path(__file__).parent.parent / "fixtures"
    for source, keep in {"style.safetensors": "*input_blocks_4_1*attn1*", "llama-lora": "*layers.0.self_attn*"}.items():
        small = folder / source
        edit(fixtures / source, small, keep=(keep,))
        for row in FORMATS:
            out = folder / f"{source}-{row.name}"
            with contextlib.suppress(LoratoolError):
                convert(small, out, row.name)
                yield (out / "adapter_model.safetensors" if out.is_dir() else out).read_bytes()


def kinds(arguments: argparse.Namespace) -> None:
    """Prints what all verbs made of mutants of every kind."""
    chance, found, started = random.Random(arguments.seed), Search(), time.monotonic()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="loratool-fuzz-") as name, contextlib.chdir(name):
        for _ in range(arguments.count):
            sort, verb, seed = chance.choice(list(SORTS)), chance.choice(VERBS), chance.randrange(1, 2**32)
            before = time.perf_counter()
            try:
                code, _ = run_verb(Path(name), sort, seed, verb)
                found.answers[f"exit {code}"] += 1
            except Exception as error:
                found.leaked[f"{type(error).__name__}: {str(error)[:100]} ({sort}, seed {seed}: {verb})"] += 1
            found.slow = max(found.slow, time.perf_counter() - before)
    found.minutes = (time.monotonic() - started) / 60
    many = f"{arguments.count:,} runs on mutants of {len(SORTS)} files through {len(VERBS)} commands"
    print(f"{common.machine()}: {many} in {found.minutes:.1f} min, seed {arguments.seed}")
    print(f"  {dict(found.answers)}; longest {found.slow:.3f} s")
    print(f"  exceptions that are not ours, and outputs that are wrong: {sum(found.leaked.values())} {dict(found.leaked)}")
    sys.exit(1 if found.leaked or found.slow > MOST_SECONDS else 0)


def headers(arguments: argparse.Namespace) -> None:
    """Prints what our parser made of mutated headers, beside the reference."""
    chance = random.Random(arguments.seed)
    stricter, laxer, shown = Counter[str](), Counter[str](), dict[str, bytes]()

    def judge(raw: bytes, answer: str) -> None:
        accepted = reference(raw)
        if answer.startswith("accepted") and not accepted:
            laxer[repr(raw[8:200])] += 1
        if accepted and not answer.startswith("accepted"):
            stricter[answer] += 1
            shown.setdefault(answer, raw[8:200])

    tracemalloc.start(1)
    found = searched([sound(chance) for _ in range(50)], arguments.count, chance, ours, judge, LARGEST_SEED)
    most = tracemalloc.get_traced_memory()[1]
    accepted = sum(times for answer, times in found.answers.items() if answer.startswith("accepted"))
    print(f"{common.machine()}: {arguments.count:,} files in {found.minutes:.1f} minutes, seed {arguments.seed}")
    print(f"  {len(found.answers)} different answers; {accepted:,} accepted")
    print(f"  exceptions that are not ours: {sum(found.leaked.values())} {dict(found.leaked)}")
    print(f"  accepted, which the reference refuses: {sum(laxer.values())} {dict(laxer)}")
    print(f"  longest {found.slow:.3f} s, at most {most / 1e6:.1f} MB of Python's memory")
    for answer, times in stricter.most_common(12):
        print(f"  refused by us alone, {times:,} times: {answer} such as {shown[answer]!r}")
    sys.exit(1 if found.leaked or laxer else 0)


if __name__ == "__main__":
    main()
