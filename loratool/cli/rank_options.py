"""The options that say how much rank to keep, and the `Rule` or `Budget` that a command makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from loratool.cli.options import KEEPING, keep, nbytes, share, steps

if TYPE_CHECKING:
    from loratool.numbers.ranks import Budget, Rule

_RULES: Final = ("rank", "max_error", "total_error", "energy", "keep", "size", "auto")
"""Options of which exactly one is given."""
BOUNDS: Final = ("min_rank", "max_rank", "conv_rank")
SERVED: Final = ("round_ranks", "pad")
"""Options for servers of adapters, which only some commands take."""


def rank_rules(command: Callable[..., None], *, without: Sequence[str] = ()) -> Callable[..., None]:
    """Adds to a command every option that says how much rank to keep, except those named in `without`."""
    names = ", ".join(KEEPING)
    options = {
        "rank": click.option("--rank", "--dim", type=click.IntRange(min=1), help="Rank of every module."),
        "conv_rank": click.option("--conv-rank", type=click.IntRange(min=1), help="Rank of k×k convolutions, if another."),
        "max_error": click.option("--max-error", type=share, metavar="SHARE", help="Largest error of a module: 5% or 0.05."),
        "total_error": click.option(
            "--total-error", type=share, metavar="SHARE", help="Largest error over all, in least bytes."
        ),
        "energy": click.option("--energy", type=share, metavar="SHARE", help="Least share of ‖ΔW‖² of a module: 99%."),
        "keep": click.option("--keep", type=keep, metavar="RULE=X", help=f"A rule of kohya's or LyCORIS's tools: {names}."),
        "size": click.option("--size", type=nbytes, metavar="BYTES", help="Largest size, spent where it saves most: 50MB."),
        "auto": click.option("--auto", is_flag=True, help="All that is more than rounding to the stored dtype."),
        "min_rank": click.option(
            "--min-rank", type=click.IntRange(min=0), help="Least rank of a module, whatever the rule."
        ),
        "max_rank": click.option(
            "--max-rank", type=click.IntRange(min=1), help="Largest rank of a module, whatever the rule."
        ),
        "round_ranks": click.option(
            "--round-ranks", type=steps, metavar="vllm|pow2|N,N…", help="Raise ranks to the next that a server allows."
        ),
        "pad": click.option("--pad", is_flag=True, help="Zeros up to the rank asked for, where a module has fewer."),
    }
    # Decorators apply from the inside out: the last one applied is the first on the help page.
    for name in reversed(options):
        command = command if name in without else options[name](command)
    return command


def rule_from_options(given: dict[str, Any], *, needed: bool = True) -> Rule | Budget | None:
    """Takes the options of this file out of `given` and makes one rule of them; None where none is given and none `needed`.

    Raises `click.UsageError` for none that is needed, for several, and for bounds that do not go with a budget.
    """
    from loratool.numbers.ranks import Budget, Rule

    # Commands pass what is left of `given` on to their verb, which knows none of these options.
    values = {name: given.pop(name) for name in _RULES if name in given}
    least, most, conv = bounds = [given.pop(name) for name in BOUNDS]
    allowed, pad = given.pop("round_ranks", None) or (), given.pop("pad", False)
    asked = [name for name, value in values.items() if value is not None and value is not False]
    # Bounds alone make the exact rule with bounds: all ranks above noise, of which so many stay.
    if not asked and not needed:
        return Rule("all", 0.0, conv, least, most, allowed, pad) if any(bounds) or allowed else None
    if len(asked) != 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in values)
        raise click.UsageError(f"give one of {names}" if not asked else f"give only one of {names}")
    (name,) = asked
    # A budget chooses each rank itself, by worth: ranks of convolutions, steps and padding would spend more than it has.
    if name in ("size", "total_error"):
        for option, value in (("--conv-rank", conv), ("--round-ranks", allowed), ("--pad", pad)):
            if value:
                raise click.UsageError(f"{option} does not go with --{name.replace('_', '-')}, which shares one budget")
        return Budget(nbytes=values["size"], error=values["total_error"], least=least or 0, most=most)
    method, value = values["keep"] if name == "keep" else (name, 0.0 if name == "auto" else values[name])
    return Rule(method, value, conv, least, most, allowed, pad)
