"""The library's arguments, as its messages name them between backticks, in the command line's words. No torch.

`base=` becomes --base, `to="kohya"` --to kohya, `overwrite=True` --overwrite, and `resize(rule=Rule("rank", 8))`
loratool resize --rank 8. A value inside another (a `Rule`, a `Selection`) counts as one argument of the verb.
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
"""Arguments whose flag has another name."""
_VALUES: Final = ("Rule", "Budget", "Selection", "Assumptions")
"""Values whose parts are flags of their own."""
COMMANDS: Final[Mapping[str, str]] = {
    "compare_to": "compare --to",
    "to_lora": "convert --to-lora",
    "fix": "check --fix",
    "inspect": "inspect --modules",
}
"""Functions whose command has another name."""
REFERENCE: Final = re.compile(r"`(\w+(?:=[^`]*|\([^`]*\)))`")


def in_flags(text: str) -> str:
    """`text` with every argument and call between backticks as the command line has it; all else stays what it is."""
    return REFERENCE.sub(lambda found: _flags(found[1]) or found[0], text)


def _flags(reference: str) -> str:
    """The words for one reference; none where it is something else."""
    # An argument may stand without its value.
    complete = re.sub(r"=(?=[,)]|$)", "=...", reference)
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
    if isinstance(call.func, ast.Name) and call.func.id == "Rule":
        method, *words = [_text_of(argument) for argument in call.args] or ["to_lora"]
        yield " ".join([_flag(method), *(word for word in words if word)])
    for keyword in call.keywords:
        value: ast.expr = keyword.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in _VALUES:
            yield from _of_arguments(value)
        elif isinstance(value, ast.Tuple) and keyword.arg != "scale":
            yield from (f"{_flag(keyword.arg)} {shlex.quote(_text_of(each))}" for each in value.elts)
        else:
            yield FLAGS.get(f"{keyword.arg}={_text_of(value)}") or f"{_flag(keyword.arg)} {_text_of(value)}".rstrip()


def _flag(argument: str | None) -> str:
    argument = argument or ""
    return FLAGS.get(argument, f"--{argument.replace('_', '-')}")


def _text_of(value: ast.expr) -> str:
    """A value as one types it; nothing for True, and for one that is left open."""
    if isinstance(value, ast.Constant):
        return "" if value.value in (True, ...) else str(value.value)
    if isinstance(value, ast.Tuple):
        return "=".join(_text_of(each) for each in value.elts)
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Subscript):
        return _text_of(value.value.slice)  # a row of a table goes by its name
    return ast.unparse(value)
