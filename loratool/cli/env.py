"""`loratool env`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from loratool.cli.options import json_option
from loratool.cli.render import print_facts, print_json
from loratool.text import size


@click.command("env", short_help="Show devices, memory and versions, for bug reports.")
@json_option
def env_command(as_json: bool) -> None:
    """Show what loratool runs on: versions, the processor, memory and its limits, and every device it can compute on.

    \b
    Example:
      loratool env
      loratool env --json
    """
    # This verb imports torch, to ask for its devices.
    from loratool.verbs.env import Environment, environment

    found = environment()
    if as_json:
        print_json(found)
        return

    def facts(found: Environment) -> Iterator[tuple[str, str]]:
        yield from found.versions.items()
        yield "system", found.system
        yield "processor", f"{found.processor}, {found.cores} cores for this process"
        limit = f", limited to {size(found.memory_limit)}" if found.memory_limit else ""
        yield "memory", f"{size(found.memory)}{limit}, {size(found.memory_free)} free"
        for device in found.devices:
            # The CPU and Apple's GPU share the memory that is shown above.
            more = f", {size(device.memory)}, {size(device.memory_free)} free" if device.memory else ""
            wrong = f" {device.trouble}" if device.trouble else ""
            yield device.name, f"{device.title}{more}{wrong}"
        yield "--device auto", f"takes {found.auto}"

    print_facts("loratool's environment", facts(found))
