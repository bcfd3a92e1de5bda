"""`loratool report`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.inputs import expand_inputs, input_name
from loratool.cli.options import base_option, json_option, output_option, overwrite_option, quiet_option
from loratool.cli.render import print_facts, show_report
from loratool.text import size


@click.command("report", short_help="Make a page about adapters, to look at in a browser.")
@click.argument("adapters", nargs=-1, required=True, type=input_name, callback=expand_inputs)
@output_option("The HTML file to write.")
@base_option()
@overwrite_option
@json_option
@quiet_option
def report_command(
    adapters: tuple[Path, ...], out: Path, base: Path | None, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Make an HTML page about ADAPTERS: what they are, where in the network they act, their spectra, what they would lose at
    each size, what their training tells, and how they relate to each other.

    It is one file, opens without a network and runs no script. It needs the extra loratool[report].

    \b
    Example:
      loratool report style.safetensors -o style.html
      loratool report style.safetensors detail.safetensors -o both.html
    """
    # torch and matplotlib come with this import.
    from loratool.verbs.report.report import report

    found = report(adapters, out, base=base, overwrite=overwrite)
    if show_report(found, as_json=as_json, quiet=quiet):
        print_facts(f"wrote {found.out}", [("size", size(found.nbytes)), ("charts", str(found.charts))])
