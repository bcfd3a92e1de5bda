"""Writes what the README and the manual have from the code: `python -m docs.tables`. A test fails where it is stale.

Tables of kinds, formats, architectures and programs, every command's help page, and the list of public names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click

import loratool
from loratool.archs import ARCHS
from loratool.cli import cli
from loratool.deltas.base import Delta
from loratool.deltas.registry import WRITERS, class_of
from loratool.formats.consumers import CONSUMERS
from loratool.formats.recognise import KNOWN
from loratool.formats.table import FORMATS, LLM
from loratool.keys.routes import example

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
WIDTH = 80


def formats() -> Iterator[str]:
    """Format × what it is."""
    yield "| `--to` | whose | a key | alpha |"
    yield "|---|---|---|---|"
    for row in FORMATS:
        yield f"| `{row.name}` | {row.title} | `{example(row)}` | {row.alpha} |"
    for name, what in KNOWN.items():
        yield f"| – | {name} | {what} | refused |"


def matrix() -> Iterator[str]:
    """Architecture × format: ✓ where it is read and written."""
    yield f"| `--arch` | model | {' | '.join(row.name for row in FORMATS)} |"
    yield f"|---|---|{'---|' * len(FORMATS)}"
    for name, title in [*((arch.name, arch.title) for arch in ARCHS), (LLM, "language models")]:
        cells = ("✓" if row.holds(name) else "–" for row in FORMATS)
        yield f"| {'–' if name == LLM else name} | {title} | {' | '.join(cells)} |"


def kinds() -> Iterator[str]:
    """Kind × verb: what each verb does with each kind."""
    yield "| kind | what writes it | inspect, merge | convert `--to-lora` | resize | exact factors |"
    yield "|---|---|---|---|---|---|"
    for name, writer in WRITERS.items():
        kind = class_of(name)
        columns = [name, writer, "yes", *_verbs(name, kind), "yes" if _has_factors(kind) else "–"]
        yield f"| {' | '.join(columns)} |"


def _verbs(name: str, kind: type[Delta]) -> tuple[str, str]:
    """What convert and resize do: by whether the kind is kept as it is, is a sum, or depends on its weight."""
    if kind.stacked:
        return "refused", "refused"
    if kind.fits_lora_file or name == "lora bias":
        return "kept", "yes" if kind.resizable else "kept"
    verb = "yes" if kind.additive else "with `--base`"
    return verb, verb


def _has_factors(kind: type[Delta]) -> bool:
    return kind.factors is not Delta.factors


def consumers() -> Iterator[str]:
    """What `check --for` takes, and where its rules come from."""
    yield "| `--for` | reads | kinds | scale | source |"
    yield "|---|---|---|---|---|"
    for row in CONSUMERS.values():
        kinds = ", ".join(sorted(row.kinds))
        yield f"| `{row.name}` | {', '.join(row.reads)} | {kinds} | {row.scale} | {row.source} |"


def help_of(name: str) -> Iterator[str]:
    """The help pages of a command and of those below it, as they are printed at 80 columns."""
    command = cli.commands[name]
    below = command.commands if isinstance(command, click.Group) else {}
    for path, page in {name: command, **{f"{name} {each}": found for each, found in below.items()}}.items():
        how = {"info_name": f"loratool {path}", "terminal_width": WIDTH, "max_content_width": WIDTH}
        with click.Context(page, **how, help_option_names=["-h", "--help"]) as context:
            yield from ("```text", f"$ loratool {path} -h", *page.get_help(context).splitlines(), "```", "")


def names() -> Iterator[str]:
    """The public names, for mkdocstrings to explain, each where it lives."""
    yield ""
    for name in loratool.__all__:
        yield from (
            f"::: {getattr(loratool, name).__module__}.{name}",
            "    options:",
            f"      heading: loratool.{name}",
            f"      toc_label: {name}",
        )


TABLES: Mapping[str, Callable[[], Iterator[str]]] = {
    "kinds": kinds,
    "formats": formats,
    "matrix": matrix,
    "consumers": consumers,
}


def filled(text: str) -> str:
    """`text` with what stands between each table's marks written anew."""
    for name, rows in TABLES.items():
        marks = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(marks, lambda found, rows=rows: found[1] + "\n".join(rows()) + "\n" + found[2], text, flags=re.DOTALL)  # type: ignore[misc]
    for name in re.findall(r"<!-- help: (\w+) -->", text):
        text = _put(text, f"help: {name}", help_of(name))
    return _put(text, "api", names())


def _put(text: str, mark: str, lines: Iterator[str]) -> str:
    body = "\n".join(line.rstrip() for line in lines)
    return re.sub(
        rf"(<!-- {mark} -->\n).*?(<!-- end -->)", lambda found: found[1] + body + "\n" + found[2], text, flags=re.DOTALL
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
