"""`loratool check`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli.inputs import input_path
from loratool.cli.options import base_option, json_option, output_option, overwrite_option, quiet_option
from loratool.cli.render import print_facts, show_report
from loratool.formats.consumers import CONSUMERS
from loratool.text import message, safe, size

if TYPE_CHECKING:
    from loratool.verbs.check.check import CheckReport


@click.command("check", short_help="Say what vLLM, ComfyUI or another makes of an adapter.")
@click.argument("adapter", type=input_path)
@click.option("--for", "target", required=True, type=click.Choice(list(CONSUMERS)), help="The program.")
@base_option("Look for the modules in this model; and for kinds that depend on it.")
@click.option("--fix", is_flag=True, help="Write an adapter that the program takes, and say what that cost.")
@output_option("What --fix writes.", required=False)
@overwrite_option
@json_option
@quiet_option
@click.pass_context
def check_command(
    context: click.Context,
    adapter: Path,
    target: str,
    base: Path | None,
    fix: bool,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what a program makes of ADAPTER, by rules read from its source: whether it loads, whether it acts as it is meant,
    and what would help. Exit code 1 where it does not, unless --fix wrote one that does.

    \b
    Example:
      loratool check style.safetensors --for comfyui
      loratool check adapter_folder/ --for vllm --fix -o fixed/
    """
    from loratool.verbs.check.check import check
    from loratool.verbs.check.fix import fix as fixed

    if fix != (out is not None):
        raise click.UsageError("--fix and -o OUT go together")
    report = fixed(adapter, target, out, base=base, overwrite=overwrite) if out else check(adapter, target, base=base)
    if show_report(report, as_json=as_json, quiet=quiet):
        print_facts(f"{report.path} in {report.target}", _facts(report))
    # With --fix the file that was written is what counts; the verdict printed is still that of the input.
    context.exit(0 if report.good or out else 1)


def _facts(report: CheckReport) -> Iterator[tuple[str, str]]:
    yield "verdict", report.verdict
    for finding in report.findings:
        lost = f" (‖ΔW‖ = {finding.lost:.4g})" if finding.lost else ""
        yield finding.level, f"{message(finding.what)}{lost}"
        yield "", f"→ {message(finding.way)}"
    if report.out:
        for step in report.done:
            yield "done", step
        yield "error", f"{report.error:.2%} of ‖ΔW‖"
        yield "wrote", f"{safe(report.out)}, {size(report.nbytes)}"
    yield "source", report.source
