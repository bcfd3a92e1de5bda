"""The library's arguments, as its messages name them between backticks, in the command line's words. No torch.

`base=` becomes --base, `to="kohya"` becomes --to kohya, `overwrite=True` becomes --overwrite, and
`resize(rule=Rule("rank", 8))` becomes loratool resize --rank 8. The parts of a `Rule` or a `Selection` are arguments of the
verb.
"""

from __future__ import annotations

import ast
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping
from typing import Final

FLAGS: Final[Mapping[str, str]] = {
    "out": "-o", "clamp": "--clamp-quantile", "from_format": "--from", "stochastic=": "--round stochastic",
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
ARGUMENTS: Final = (
    "allow_pickle", "allow_unmatched", "arch", "base", "clamp", "density", "device", "drop", "dry_run", "dtype", "exclude",
    "include", "keep", "method", "out", "overwrite", "rule", "scale", "stochastic", "to", "undo",
)  # fmt: skip
"""What messages name of functions' arguments."""
FUNCTIONS: Final = ("combine", "compare_to", "convert", "fix", "inspect", "merge", "resize", "to_lora")
"""What messages name of functions."""
LONGEST_REFERENCE: Final = 200
# An argument with its equals sign, or a call; a plain name between backticks is none and stays.
REFERENCE: Final = re.compile(r"`(\w+(?:=[^`]*|\([^`]*\)))`")


def in_flags(text: str) -> str:
    """`text` with every argument and call of ours between backticks in the command line's words; all else stays as it is."""
    return REFERENCE.sub(lambda found: _flags(found[1]) or found[0], text)


def _flags(reference: str) -> str:
    """The words for one reference; none where it is something else."""
    name = re.split(r"[=(]", reference, maxsplit=1)[0]
    known = ARGUMENTS if reference[len(name)] == "=" else (*_VALUES, *FUNCTIONS)
    # Our own references are short: what is longer came from a file.
    if name not in known or len(reference) > LONGEST_REFERENCE:
        return ""
    # An argument may stand without its value.
    complete = re.sub(r"=(?=[,)]|$)", "=...", reference)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, about strange literals
            call = ast.parse(complete if name in known and name not in ARGUMENTS else f"_({complete})", mode="eval").body
        return _of_call(call) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""


def _of_call(call: ast.Call) -> str:
    name, words = call.func.id if isinstance(call.func, ast.Name) else "", list(_of_arguments(call))
    if name == "_" or name in _VALUES:
        return " ".join(words)
    return " ".join(["loratool", COMMANDS.get(name, name), *words])


def _of_arguments(call: ast.Call) -> Iterator[str]:
    """The flags and values of a call's arguments."""
    # A rule's first argument names the flag, and its second is the flag's value; a `Rule()` without any is --to-lora.
    if isinstance(call.func, ast.Name) and call.func.id == "Rule" and (call.args or not call.keywords):
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
        return "" if value.value is True or value.value is ... else str(value.value)
    if isinstance(value, ast.Tuple):
        return "=".join(_text_of(each) for each in value.elts)
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Subscript):
        return _text_of(value.value.slice)  # a row of a table goes by its name
    return ast.unparse(value)
