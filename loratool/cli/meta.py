"""`loratool meta`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.inputs import input_path
from loratool.cli.options import json_option, output_or_in_place, overwrite_option, quiet_option
from loratool.cli.render import print_facts, print_json, show_report
from loratool.errors import LoratoolError
from loratool.text import safe

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratool.verbs.meta.meta import MetaReport

path_argument = click.argument("file", type=input_path)


def _changing(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of a subcommand that changes a file."""
    for option in (
        click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT", help="Write a copy with the change."),
        click.option("--in-place", is_flag=True, help="Change FILE itself: a new file takes its place once it is complete."),
        overwrite_option,
        json_option,
        quiet_option,
    ):
        command = option(command)
    return command


@click.group("meta", short_help="Show and change what a file says of itself.")
def meta_command() -> None:
    """Show and change the metadata of a safetensors file, or of a PEFT folder's. The bytes of its tensors stay as they are.

    \b
    Example:
      loratool meta show style.safetensors
    """


@meta_command.command("show", short_help="Print all metadata.")
@path_argument
@click.argument("keys", nargs=-1)
@json_option
def show_command(file: Path, keys: tuple[str, ...], as_json: bool) -> None:
    """Print all metadata of FILE, or that of KEYS alone, in full.

    \b
    Example:
      loratool meta show style.safetensors
      loratool meta show style.safetensors ss_network_dim
    """
    from loratool.verbs.meta.meta import read_metadata

    metadata = read_metadata(file)
    missing = [key for key in keys if key not in metadata]
    if missing:
        raise LoratoolError(f"{file}: has no metadata called {', '.join(missing)}")
    # Keys come in the order in which they were asked for.
    chosen = {key: metadata[key] for key in (keys or sorted(metadata))}
    if as_json:
        print_json(chosen)
    else:
        print_facts(str(file), chosen.items())


@meta_command.command("set", short_help="Set values.")
@path_argument
@click.argument("pairs", nargs=-1, required=True, metavar="KEY=VALUE...")
@_changing
def set_command(file: Path, pairs: tuple[str, ...], output: Path | None, in_place: bool, **how: Any) -> None:
    """Set metadata of FILE. What begins with modelspec. is checked against its specification.

    \b
    Example:
      loratool meta set style.safetensors modelspec.title="My style" --in-place
    """
    from loratool.verbs.meta.meta import set_metadata

    values = {}
    for pair in pairs:
        # The first equals sign: values may hold others, and keys of the usual tools hold none.
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise LoratoolError(f"{pair}: expected KEY=VALUE")
        values[key] = value
    out = output_or_in_place(output, in_place=in_place)
    _tell(set_metadata(file, values, out, overwrite=how["overwrite"]), how)


@meta_command.command("delete", short_help="Delete keys.")
@path_argument
@click.argument("globs", nargs=-1, required=True, metavar="GLOB...")
@_changing
def delete_command(file: Path, globs: tuple[str, ...], output: Path | None, in_place: bool, **how: Any) -> None:
    """Delete what GLOBs match of FILE's metadata.

    \b
    Example:
      loratool meta delete style.safetensors "ss_network_*" -o less.safetensors
    """
    from loratool.verbs.meta.meta import delete_metadata

    out = output_or_in_place(output, in_place=in_place)
    _tell(delete_metadata(file, globs, out, overwrite=how["overwrite"]), how)


# SOURCE comes before FILE, as with cp(1).
@meta_command.command("copy", short_help="Copy another file's metadata.")
@click.argument("source", type=input_path)
@path_argument
@click.argument("globs", nargs=-1, metavar="[GLOB]...")
@_changing
def copy_command(source: Path, file: Path, globs: tuple[str, ...], output: Path | None, in_place: bool, **how: Any) -> None:
    """Give FILE the metadata of SOURCE, or what GLOBs match of it. Hashes and histories stay each file's own.

    \b
    Example:
      loratool meta copy a.safetensors b.safetensors "ss_*" --in-place
    """
    from loratool.verbs.meta.meta import copy_metadata

    out = output_or_in_place(output, in_place=in_place)
    _tell(copy_metadata(source, file, globs, out, overwrite=how["overwrite"]), how)


@meta_command.command("strip", short_help="Take metadata away.")
@path_argument
@click.option("--private", is_flag=True, help="Only paths, and the names of datasets and users.")
@_changing
def strip_command(file: Path, private: bool, output: Path | None, in_place: bool, **how: Any) -> None:
    """Take all metadata from FILE, but for what readers need; or, with --private, what tells of people and their disks.

    \b
    Example:
      loratool meta strip --private style.safetensors -o public.safetensors
    """
    from loratool.verbs.meta.meta import strip_metadata

    out = output_or_in_place(output, in_place=in_place)
    _tell(strip_metadata(file, out, private=private, overwrite=how["overwrite"]), how)


def _tell(report: MetaReport, how: dict[str, Any]) -> None:
    """Prints which keys a change added, changed and removed."""
    if not show_report(report, as_json=how["as_json"], quiet=how["quiet"]):
        return
    facts = {"added": report.added, "changed": report.changed, "removed": report.removed}
    lines = [(name, ", ".join(map(safe, keys))) for name, keys in facts.items() if keys]
    print_facts(f"wrote {report.out}" if lines else f"{report.out}: nothing to change", lines)
