"""Completion in the shell, by Click's own scripts, written where each shell looks for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import get_completion_class

from loratool.errors import LoratoolError
from loratool.text import message

_PLACES: Final = {
    "bash": ("XDG_DATA_HOME", ".local/share", "bash-completion/completions/loratool"),
    "zsh": ("ZDOTDIR", "", ".zfunc/_loratool"),
    "fish": ("XDG_CONFIG_HOME", ".config", "fish/completions/loratool.fish"),
}
"""The place of each shell's script: a variable that names a folder, the folder in the home where that is not set, and the
file below the folder."""
AFTERWARDS: Final = {
    "bash": "it works in new shells that have bash-completion",
    "zsh": "add `fpath+=~/.zfunc; autoload -Uz compinit; compinit` to ~/.zshrc where it is not yet",
    "fish": "it works in new shells",
}


def script(group: click.Command, shell: str) -> str:
    """Click's script for a shell."""
    found = get_completion_class(shell)
    assert found
    # Click itself looks for this variable, whose name it makes of the program's.
    return found(group, {}, "loratool", "_LORATOOL_COMPLETE").source()


def place_of(shell: str) -> Path:
    """The file that a shell reads the script from."""
    variable, otherwise, rest = _PLACES[shell]
    root = os.environ.get(variable)
    return Path(root or Path.home() / otherwise, rest)


def _shell(given: str) -> str:
    """The name of the shell asked for, or of the user's own; raises `LoratoolError` for a shell without a script."""
    name = Path(os.environ.get("SHELL", "")).name if given == "auto" else given
    if name not in _PLACES:
        called = name or "without a name"
        raise LoratoolError(f"--install-completion: no script for the shell {called}; name bash, zsh or fish")
    return name


def install(context: click.Context, parameter: click.Parameter, given: Any) -> None:
    """Writes the completion script and prints its path; the callback of --install-completion."""
    # While a shell asks for completions Click parses the words with resilient_parsing, and options must not act.
    if not given or context.resilient_parsing:
        return
    shell = _shell(given)
    path = place_of(shell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script(context.command, shell))
    except OSError as error:
        raise LoratoolError(f"{path}: {error.strerror}") from error
    click.echo(f"wrote {message(str(path))}; {AFTERWARDS[shell]}")
    context.exit()


def show(context: click.Context, parameter: click.Parameter, given: Any) -> None:
    """Prints the completion script; the callback of --show-completion."""
    if given and not context.resilient_parsing:
        click.echo(script(context.command, _shell(given)))
        context.exit()


SHELLS: Final = click.Choice(["auto", *_PLACES])
# Eager options act before Click misses a command. The value may be left out, and is then the flag's: the user's own shell.
install_option = click.option(
    "--install-completion", type=SHELLS, is_flag=False, flag_value="auto", expose_value=False, is_eager=True,
    callback=install, metavar="[SHELL]", help="Have bash, zsh or fish complete commands and options.",
)  # fmt: skip
show_option = click.option(
    "--show-completion", type=SHELLS, is_flag=False, flag_value="auto", expose_value=False, is_eager=True,
    callback=show, metavar="[SHELL]", help="Print the script instead.",
)  # fmt: skip
