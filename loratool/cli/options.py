"""Options that several commands share, their types, and the parsers of arguments such as ADAPTER:STRENGTH."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import click

from loratool.archs import ARCHS
from loratool.cli.inputs import exists, input_path, resolve_input
from loratool.errors import LoratoolError
from loratool.files import hub
from loratool.files.header import STORED_DTYPES
from loratool.formats.consumers import CONSUMERS
from loratool.formats.table import FORMATS
from loratool.names import COMPONENTS

if TYPE_CHECKING:
    from loratool.adapter.strengths import WeightedAdapter

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

KEEPING = ("sv_ratio", "sv_fro", "sv_cumulative", "threshold")
"""Rules of kohya's and LyCORIS's tools, which --keep takes by their own names."""

STEPS: Final[Mapping[str, tuple[int, ...]]] = {
    "vllm": CONSUMERS["vllm"].ranks,
    "pow2": tuple(2**power for power in range(15)),
}
"""Lists of ranks that servers allow, by the names that --round-ranks takes."""

a_format = click.Choice([row.name for row in FORMATS])
an_arch = click.Choice([arch.name for arch in ARCHS])


class Dtype(click.Choice[str]):
    """A dtype that outputs are stored in: float32, float16 or bfloat16, or the short names that trainers use."""

    short: ClassVar[Mapping[str, str]] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

    def __init__(self) -> None:
        super().__init__(list(STORED_DTYPES))

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The dtype's full name."""
        return super().convert(self.short.get(value, value), param, ctx)


def output_option(help: str = "What to write.", *, required: bool = True) -> Decorator:
    """The option of the output's path."""
    return click.option("-o", "--output", "out", required=required, type=click.Path(path_type=Path), help=help)


def base_option(help: str = "The base, for kinds that depend on it.") -> Decorator:
    """The option of the checkpoint that an adapter belongs to."""
    return click.option("--base", type=input_path, help=help)


def arch_option(help: str = "Base architecture, where the names fit several.") -> Decorator:
    """The option of the architecture, for files whose names fit several."""
    return click.option("--arch", type=an_arch, metavar="NAME", help=help)


def to_option(help: str = "Format to write; `loratool formats` lists them.") -> Decorator:
    """The option of the format to write."""
    return click.option("--to", type=a_format, metavar="FORMAT", help=help)


def dtype_option(help: str) -> Decorator:
    """The option of the dtype to store."""
    return click.option("--dtype", type=Dtype(), help=help)


def dry_run_option(help: str = "Print the plan and write nothing.") -> Decorator:
    """The option of a run that only says what it would do."""
    return click.option("--dry-run", is_flag=True, help=help)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Print more.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
pickle_option = click.option(
    "--allow-pickle", is_flag=True, help="Read .bin adapters, with torch's restricted loader in a separate process."
)
include_option = click.option(
    "--include", multiple=True, metavar="GLOB", help="Only modules whose name or path matches. Repeatable."
)
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="Where to compute: auto, cpu, cuda, cuda:N or mps."
)
factors_device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="NAME", help="Where to compute: auto, cpu, cuda, cuda:N or mps."
)
"""The device option of verbs on factors, which are small, so that a GPU seldom gains anything: the CPU is the default."""
in_place_option = click.option(
    "--in-place", is_flag=True, help="Change the checkpoint itself, by clones that replace its files once they are complete."
)
exclude_option = click.option(
    "--exclude", multiple=True, metavar="GLOB", help="No modules whose name or path matches. Repeatable."
)


class Share(click.ParamType[float]):
    """A share of a whole: 5% or 0.05."""

    name = "share"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a number between 0 and 1."""
        text = str(value)
        try:
            number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            # Fails below, as NaN does.
            number = -1.0
        if not 0 <= number < 1:
            self.fail(f"{text!r} is not a share of a whole, such as 5% or 0.05", param, ctx)
        return number


class Slots(click.ParamType[tuple[bool, ...]]):
    """Marks of the slots of a fused weight that were trained: 1,0,1."""

    name = "slots"

    def convert(
        self, value: str | tuple[bool, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[bool, ...]:
        """One boolean for each slot."""
        # Click converts defaults too, and asks that a value of the right type passes through.
        if isinstance(value, tuple):
            return value
        marks = value.split(",")
        if not set(marks) <= {"0", "1"}:
            self.fail(f"{value!r} is not a list of 0 and 1, such as 1,0,1", param, ctx)
        return tuple(mark == "1" for mark in marks)


class Bytes(click.ParamType[int]):
    """A size: 50MB, 1.5GB, 800kB, 48MiB, or a number of bytes."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The size in bytes."""
        if isinstance(value, int):
            return value
        # Thousands, as disks and sites count; powers of 1024 are meant only where an i says so.
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG]?)(i?)B?", value, re.IGNORECASE)
        if not found:
            self.fail(f"{value!r} is not a size, such as 50MB or 48MiB", param, ctx)
        number, unit, binary = found.groups()
        # The unit's place in " kmg" is its exponent.
        count = float(number) * (1024 if binary else 1000) ** " kmg".index(unit.lower() or " ")
        if count >= 2**63:
            self.fail(f"{value[:40]!r} is larger than any file", param, ctx)
        return int(count)


class Keep(click.ParamType[tuple[str, float]]):
    """A rule of kohya's or LyCORIS's tools and its value: sv_fro=0.95."""

    name = "rule"

    def convert(
        self, value: str | tuple[str, float], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        """The rule's name and its value."""
        if isinstance(value, tuple):
            return value
        # An unknown rule and a bad number get one message: it shows what is expected of both.
        name, _, number = value.partition("=")
        try:
            if name in KEEPING:
                return name, float(number)
        except ValueError:
            pass
        return self.fail(f"{value!r} is not one of {', '.join(KEEPING)} with =NUMBER, such as sv_fro=0.95", param, ctx)


class Steps(click.ParamType[tuple[int, ...]]):
    """Ranks that a server allows: vllm, pow2, or a list such as 8,16,32."""

    name = "ranks"

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The ranks, smallest first."""
        if isinstance(value, tuple):
            return value
        if value in STEPS:
            return STEPS[value]
        numbers = value.split(",")
        if not all(number.isdecimal() and int(number) for number in numbers):
            self.fail(f"{value!r} is not {', '.join(STEPS)}, or a list of ranks such as 8,16,32", param, ctx)
        return tuple(sorted(set(map(int, numbers))))


class Vector(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between them."""

    name = "vector"

    def convert(
        self, value: str | tuple[float, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """The numbers, in order."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(number) for number in value.split(","))
        except ValueError:
            return self.fail(f"{value!r} is not a list of numbers such as 1,0,0.5", param, ctx)


share = Share()
vector = Vector()
steps = Steps()
nbytes = Bytes()
keep = Keep()
slots = Slots()


alpha_option = click.option("--alpha", type=float, help="For files that do not say: loralib's, or PEFT's without a config.")
slots_option = click.option(
    "--slots", type=slots, metavar="1,0,1", help="Slots of a fused q, k, v that a loralib file trained."
)


def output_or_in_place(out: Path | None, *, in_place: bool) -> Path | None:
    """The output's path, None for the input's own; raises `click.UsageError` unless one of both is asked for."""
    if (out is None) != in_place:
        raise click.UsageError("give either -o OUT, or --in-place")
    return out


def _split(text: str) -> tuple[str, float]:
    """(path, strength) of `PATH[:STRENGTH]`; the last colon counts only before a number, if no file has the whole name."""
    # Colons are allowed in POSIX names, stand behind drives on Windows, and in hf:ORG/NAME.
    path, colon, number = text.rpartition(":")
    if not colon or exists(text):
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:
        return text, 1.0


def parse_weighted_adapter(text: str) -> WeightedAdapter:
    """The adapter and strength of `PATH[:STRENGTH[:PARTS]]`, with PARTS separated by commas: a number for each block, or
    NAME=NUMBER. Raises `LoratoolError` where PARTS are neither."""
    from loratool.adapter.strengths import Strength, WeightedAdapter

    # Only parts have commas or equals signs, which tells PATH:STRENGTH from PATH:PARTS.
    head, _, tail = text.rpartition(":")
    if not head or exists(text) or not {",", "="} & set(tail):
        path, value = _split(text)
        return WeightedAdapter(resolve_input(path), value)
    path, value = _split(head)
    pairs = [part.partition("=") for part in tail.split(",")]
    try:
        if all(not equals for _, equals, _ in pairs):
            strength = Strength(value, tuple(float(number) for number, _, _ in pairs))
        else:
            strength = Strength(value, parts={name: float(number) for name, _, number in pairs})
    except ValueError as error:
        raise LoratoolError(
            f"{text}: expected numbers separated by commas, or NAME=NUMBER, behind the last colon"
        ) from error
    return WeightedAdapter(resolve_input(path), strength)


def parse_base_and_adapters(text: str) -> tuple[Path, list[WeightedAdapter]]:
    """The base and the adapters of `BASE+ADAPTER[:STRENGTH]…`; raises `LoratoolError` where there is no adapter.

    A plus sign separates only where what stands before it is a file, a folder, or a name on the hub.
    """
    # Names may hold plus signs: each part is the shortest run of words that is there, or else all that is left, so that the
    # error names what was not found.
    words, parts = text.split("+"), list[str]()
    while words:
        counts = range(1, len(words) + 1)
        count = next((n for n in counts if _is_there("+".join(words[:n]))), len(words))
        parts.append("+".join(words[:count]))
        words = words[count:]
    base, *adapters = parts
    if not adapters:
        raise LoratoolError(f"--to {text}: expected BASE+ADAPTER:STRENGTH, of files or folders that exist")
    return resolve_input(_split(base)[0]), [parse_weighted_adapter(each) for each in adapters]


def _is_there(text: str) -> bool:
    """Whether `text`, with or without a strength behind it, names a file, a folder, or something on the hub."""
    path = _split(text)[0]
    return hub.is_named(path) or exists(path)


def parse_factors(option: str, pairs: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """(glob, number) of each `GLOB=NUMBER`, cut at its last equals sign; raises `LoratoolError` where no number follows."""
    read = []
    for pair in pairs:
        glob, _, number = pair.rpartition("=")
        try:
            read.append((glob, float(number)))
        except ValueError as error:
            raise LoratoolError(f"{option} {pair}: expected GLOB=NUMBER") from error
    return tuple(read)


def parse_component_strengths(pairs: tuple[str, ...]) -> dict[str, float]:
    """The number of each component, from texts such as `te1=0.5`; raises `LoratoolError` for an unknown component, and where
    there is no number."""
    strengths = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if name not in (*COMPONENTS, "model"):
            raise LoratoolError(f"--component {pair}: no component {name!r}; there are {', '.join(COMPONENTS)} and model")
        try:
            strengths[name] = float(number)
        except ValueError as error:
            raise LoratoolError(f"--component {pair}: expected {name}=NUMBER") from error
    return strengths
