"""`loratool formats`: what is known."""

from __future__ import annotations

import click

from loratool.archs import ARCHS
from loratool.cli.options import json_option
from loratool.cli.render import print_facts, print_json, print_table
from loratool.formats.recognise import KNOWN
from loratool.formats.table import FORMATS
from loratool.keys.routes import example


@click.command("formats", short_help="List the formats and the architectures that are known.")
@json_option
def formats_command(as_json: bool) -> None:
    """List the formats that --to takes, those that are recognised and refused, and the architectures that --arch takes.

    An architecture without a table is still inspected, merged, resized and converted to LoRA; only names in another naming
    need a table.

    \b
    Example:
      loratool formats
    """
    if as_json:
        print_json(
            {
                "formats": [
                    {"name": row.name, "title": row.title, "alpha": row.alpha, "key": example(row)} for row in FORMATS
                ],
                "refused": KNOWN,
                "architectures": [{"name": arch.name, "title": arch.title} for arch in ARCHS],
            }
        )
        return
    # What tells formats apart for people is how a key looks and where alpha is.
    print_table(["format", "alpha", "key of a down factor"], [[row.name, row.alpha, example(row)] for row in FORMATS])
    click.echo()
    print_table(["architecture", "name"], [[arch.name, arch.title] for arch in ARCHS])
    click.echo()
    print_facts("recognised, and refused", KNOWN.items())
