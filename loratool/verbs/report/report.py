"""`report`: an HTML file that opens offline and shows what an adapter is, where it acts, and what less rank would lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from loratool._version import __version__
from loratool.adapter.adapter import inputs_of
from loratool.base.base import BaseCheckpoint, open_base
from loratool.errors import LoratoolError
from loratool.files.output import Input, NewOutput, require_target
from loratool.files.paths import path_of
from loratool.files.writer import Writer
from loratool.numbers.settings import steady_arithmetic
from loratool.text import LONGEST_MESSAGE, message, safe, size
from loratool.verbs.compare.compare import AdapterComparison, MatrixComparison, compare
from loratool.verbs.report import charts
from loratool.verbs.report.facts import AdapterFacts, facts_of
from loratool.verbs.reports import Report

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2937; --dim: #6b7280; --paper: #fff; --line: #e5e7eb; --card: #f9fafb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --dim: #9ca3af; --paper: #111827; --line: #374151; --card: #1f2937; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
p.dim, figcaption { color: var(--dim); font-size: .9rem; }
figure { margin: 0; overflow-x: auto; }
figcaption { margin-top: .25rem; max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
.note { background: var(--card); border-left: 3px solid #f97316; padding: .5rem .75rem; margin: .5rem 0;
  overflow-wrap: anywhere; }
.tags { display: flex; flex-wrap: wrap; gap: .1rem .7rem; align-items: baseline; line-height: 1.4; }
.tags span { max-width: 100%; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th { text-align: left; font-weight: 500; color: var(--dim); }
td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; }
svg text { font-family: system-ui, sans-serif !important; }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
"""
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The page's Content-Security-Policy: no scripts and no network, only its own styles and pictures."""
LARGEST: Final = 15
"""The number of modules that a table lists, the largest changes first."""


@dataclass(frozen=True, slots=True)
class PageReport(Report):
    """The page that was written: its adapters, its number of charts, and its bytes."""

    out: str
    adapters: tuple[str, ...]
    charts: int
    nbytes: int


@steady_arithmetic()
def report(
    paths: Sequence[str | Path], out: str | Path, *, base: str | Path | BaseCheckpoint | None = None, overwrite: bool = False
) -> PageReport:
    """Writes an HTML page about the adapters at `paths` to `out`: facts, a map of ‖ΔW‖, spectra, the frontier of size and
    error, what the metadata tells of the training, and the cosines of several adapters. `base` is for kinds whose ΔW depends
    on the weight.

    The page is one file, asks nothing of the network and runs no script. Equal adapters make equal pages. Raises
    `LoratoolError`, and writes nothing, where an adapter cannot be read or matplotlib is missing.
    """
    # What can fail at once fails before minutes of arithmetic: a missing library, a target that must not be written.
    charts.require_matplotlib()
    places, target = [path_of(path) for path in paths], path_of(out)
    weights = open_base(base)
    known: list[Input | Path] = [*places, *([weights.layout] if weights else [])]
    require_target(target, folder=False, overwrite=overwrite, inputs=known)
    found = [facts_of(path, weights) for path in places]
    inputs = inputs_of((facts.adapter for facts in found), weights)
    text = "\n".join(_page(found, weights))
    # POSIX lets names hold bytes that are no UTF-8; Python has them as lone surrogates, which UTF-8 cannot encode.
    raw = text.encode(errors="backslashreplace")
    with NewOutput(target, folder=False, overwrite=overwrite, nbytes=len(raw), inputs=inputs) as output:
        with Writer(output.path(""), len(raw)) as writer:
            writer.write(raw, 0)
        output.commit()
    # Adapters of one kind fail for the same reason: each reason is a warning once.
    why = [part for facts in found for part in (facts.delta, facts.frontier) if isinstance(part, str)]
    return PageReport(str(out), tuple(map(str, places)), text.count("<svg"), len(raw), warnings=tuple(dict.fromkeys(why)))


def _page(found: Sequence[AdapterFacts], base: BaseCheckpoint | None) -> Iterator[str]:
    names = [_name(facts.adapter.path) for facts in found]
    title = names[0] if len(names) == 1 else f"{len(names)} adapters"
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield f"<title>{title}</title><style>{STYLE}</style></head><body>"
    yield f'<header><h1>{title}</h1><p class="dim">made by loratool {__version__}</p></header>'
    if len(found) > 1:
        yield from _comparison(found, base)
    for facts in found:
        yield "<section>"
        if len(found) > 1:
            yield f"<h2>{_name(facts.adapter.path)}</h2>"
        yield from _adapter(facts)
        yield "</section>"
    yield "</body></html>"


def _adapter(facts: AdapterFacts) -> Iterator[str]:
    yield _list(facts.about)
    for note in facts.report.suspicions:
        yield f'<p class="note">{_sentence(note)}</p>'
    yield "<h3>Where it acts</h3>"
    if facts.map.cells:
        yield _figure(
            charts.heat_map(facts.map),
            "‖ΔW‖ of each block by sort of module: bright is strong, and where nothing is drawn there is no module.",
        )
    if facts.map.unmeasured:
        yield f'<p class="note">Left out, since what they add only the base could tell: {facts.map.unmeasured}.</p>'
    yield from _spectra(facts)
    yield from _frontier(facts)
    if facts.training:
        yield "<h3>Training, as the file tells it</h3>"
        yield _list(facts.training)
    if facts.tags:
        yield "<h3>Tags</h3>"
        yield _cloud(facts.tags)


def _spectra(facts: AdapterFacts) -> Iterator[str]:
    yield "<h3>Directions</h3>"
    if isinstance(facts.delta, str):
        yield f'<p class="note">{_sentence(facts.delta)}</p>'
        return
    # A ΔW of zero has no directions, and no first singular value to relate others to.
    modules = [module for module in facts.delta.modules if module.norm]
    yield f"<p>‖ΔW‖ = {facts.delta.norm:.4g} over {len(modules)} modules.</p>"
    # A norm's difference or a bias is a vector: one singular value makes no spectrum.
    several = [module.spectrum for module in modules if len(module.spectrum) > 1]
    if several:
        yield _figure(
            charts.spectra(several),
            "Singular values of each module's ΔW, relative to its first: the line is the median module, the bands hold half "
            "and four fifths of them. What falls off quickly can be resized without much loss.",
        )
        ranks = [module.effective_rank for module in modules if module.effective_rank is not None]
        stored = max(facts.report.ranks, default=max(map(len, several)))
        yield _figure(
            charts.effective_ranks(ranks, stored),
            "How many directions each module really uses (the exponential of its singular values' entropy), beside the rank "
            "that it is stored with.",
        )
    yield _largest(facts)


def _largest(facts: AdapterFacts) -> str:
    assert not isinstance(facts.delta, str)
    ordered = sorted(facts.delta.modules, key=lambda module: -module.norm)[:LARGEST]
    rows = []
    for module in ordered:
        shape = "×".join(map(str, module.shape))
        figures = (shape, f"{module.norm:.4g}", f"{module.share:.2%}", f"{module.sigma:.4g}", f"{module.stable_rank:.3g}")
        cells = "".join(f"<td class=n>{figure}</td>" for figure in figures)
        rows.append(f"<tr><td>{_text(module.name)}</td>{cells}</tr>")
    head = "<tr><th>largest changes</th><th class=n>shape</th><th class=n>‖ΔW‖</th><th class=n>share</th><th class=n>σ₁</th>"
    return f'<div class="scroll"><table>{head}<th class=n>stable rank</th></tr>{"".join(rows)}</table></div>'


def _frontier(facts: AdapterFacts) -> Iterator[str]:
    yield "<h3>What it would cost to be smaller</h3>"
    if isinstance(facts.frontier, str):
        yield f'<p class="note">{_sentence(facts.frontier)}</p>'
        return
    choices = [(choice.nbytes / 1e6, choice.error, choice.shared, choice.rank) for choice in facts.frontier.choices]
    if choices:
        yield _figure(
            charts.frontier(choices),
            f"It has {size(facts.nbytes)} now. Points are ranks; the dashed line spends the same bytes where they "
            "save most: <code>loratool resize --size</code>.",
        )


def _comparison(found: Sequence[AdapterFacts], base: BaseCheckpoint | None) -> Iterator[str]:
    yield "<h3>Each with each</h3>"
    try:
        result = compare([facts.adapter for facts in found], base=base)
    except LoratoolError as error:
        yield f'<p class="note">They cannot be compared: {_sentence(error)}</p>'
        return
    # Two adapters are compared module by module, three or more each with each: one cosine, or a matrix of them.
    cosines: Sequence[Sequence[float | None]] = ()
    if isinstance(result, MatrixComparison):
        cosines = result.cosines
    elif isinstance(result, AdapterComparison):
        cosines = ((1.0, result.cosine), (result.cosine, 1.0))
    yield _figure(
        charts.matrix([safe(_plain_name(facts.adapter.path), 40) for facts in found], cosines),
        "The cosine of their ΔW: 1 is the same direction, 0 has nothing in common, −1 takes back what the other adds.",
    )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _list(facts: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(what)}</dd>' for name, what in facts)}</dl>"


def _cloud(tags: Sequence[tuple[str, int]]) -> str:
    """Tags in alphabetical order, the more frequent the larger."""
    most = max(times for _, times in tags)
    words = []
    for tag, times in sorted(tags):
        # The root, since counts differ by hundreds and sizes that people can read do not.
        height = 0.75 + 1.25 * (times / most) ** 0.5
        words.append(f'<span style="font-size:{height:.2f}rem" title="{times:,}">{_text(safe(tag, 60))}</span>')
    return f'<div class="tags">{"".join(words)}</div>'


def _plain_name(path: Path) -> str:
    return path.name or str(path)


def _name(path: Path) -> str:
    return _text(_plain_name(path))


def _text(text: object) -> str:
    """Text from outside: made safe, and no markup."""
    return escape(safe(text, LONGEST_MESSAGE))


def _sentence(text: object) -> str:
    """A sentence of ours, in the command line's words, with what it says of a file made safe."""
    return escape(message(str(text)))
