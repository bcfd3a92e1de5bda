"""The library's arguments, as its messages name them between backticks, in the command line's words. No torch.

`base=` becomes --base, `to="kohya"` becomes --to kohya, `overwrite=True` becomes --overwrite, and
`resize(rule=Rule("rank", 8))` becomes loratool resize --rank 8. The parts of a `Rule` or a `Selection` are arguments of the
verb.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Final

FLAGS: Final[Mapping[str, str]] = {
    "out": "-o", "source": "--from", "stochastic=": "--round stochastic",
    "nbytes": "--size", "error": "--total-error", "conv": "--conv-rank", "least": "--min-rank", "most": "--max-rank",
    "steps": "--round-ranks",
}  # fmt: skip
"""Arguments whose flag is not called as they are; one with `=` stands for an argument with that value."""
_VALUES: Final = ("Rule", "Budget", "Selection", "Assumptions")
"""Classes of arguments whose parts are flags of their own."""
COMMANDS: Final[Mapping[str, str]] = {
    "compare_to": "compare --to",
    "to_lora": "convert --to-lora",
    "fix": "check --fix",
    "inspect": "inspect --modules",
}
"""Functions whose command is not called as they are."""
# An argument with its equals sign, or a call; a plain name between backticks is none and stays.
REFERENCE: Final = re.compile(r"`(\w+(?:=[^`]*|\([^`]*\)))`")


def in_flags(text: str) -> str:
    """`text` with every argument and call between backticks as the command line spells it; all other text is unchanged."""
    return REFERENCE.sub(lambda found: _flags(found[1]) or found[0], text)


def _flags(reference: str) -> str:
    """The command line's words for one reference, empty where the text is no argument and no call."""
    # An argument may stand without its value: an ellipsis makes Python of it. A lone argument becomes one of the call _(…).
    complete = re.sub(r"=(?=[,)]|$)", "=...", reference)
    # Messages may quote a stranger's file: text that is no Python, or too deep for the parser, stays what it is.
    try:
        call = ast.parse(complete if re.match(r"\w+\(", complete) else f"_({complete})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return ""
    name, words = call.func.id, " ".join(_of_arguments(call))
    if name == "_" or name in _VALUES:
        return words
    return f"loratool {COMMANDS.get(name, name)} {words}".rstrip()


def _of_arguments(call: ast.Call) -> Iterator[str]:
    """The flags and values of a call's arguments."""
    # A rule's first argument names the flag, and its second is the flag's value; a `Rule()` without any is --to-lora.
    if isinstance(call.func, ast.Name) and call.func.id == "Rule":
        method, *words = [_text_of(argument) for argument in call.args] or ["to_lora"]
        yield " ".join([_flag(method), *(word for word in words if word)])
    for keyword in call.keywords:
        value: ast.expr = keyword.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in _VALUES:
            yield from _of_arguments(value)
        # A tuple repeats its flag, but a tuple for `scale` is one GLOB=NUMBER. Globs need quotes in a shell.
        elif isinstance(value, ast.Tuple) and keyword.arg != "scale":
            yield from (f"{_flag(keyword.arg)} {shlex.quote(_text_of(each))}" for each in value.elts)
        else:
            yield FLAGS.get(f"{keyword.arg}={_text_of(value)}") or f"{_flag(keyword.arg)} {_text_of(value)}".rstrip()


def _flag(argument: str | None) -> str:
    argument = argument or ""
    return FLAGS.get(argument, f"--{argument.replace('_', '-')}")


def _text_of(value: ast.expr) -> str:
    """A value as the user types it, empty for True (a bare flag) and for an ellipsis (a value left open)."""
    if isinstance(value, ast.Constant):
        return "" if value.value in (True, ...) else str(value.value)
    if isinstance(value, ast.Tuple):
        return "=".join(_text_of(each) for each in value.elts)
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Subscript):
        return _text_of(value.value.slice)  # a row of a table goes by its name
    return ast.unparse(value)
