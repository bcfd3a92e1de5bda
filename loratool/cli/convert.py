"""`loratool convert`: other formats, and any kind as LoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.options import a_format, arch_option, pickle_option, to_option
from loratool.cli.rank_options import rule_from_options
from loratool.cli.render import print_facts, show_report, warn
from loratool.cli.resize import print_converted, rank_options, run_low_rank
from loratool.errors import LoratoolError
from loratool.files.adapter_files import is_adapter_folder
from loratool.formats.table import format_named
from loratool.text import histogram, size

if TYPE_CHECKING:
    from loratool.verbs.convert import ConvertReport

ALPHAS = {
    "tensor": "beside the factors, as it was",
    "config": "in adapter_config.json",
    "metadata": "in the file's metadata (lora_adapter_metadata)",
    "folded": "folded into the factors, where it was given",
}
"""Where a format keeps alpha, in words, by the values of `Format.alpha`."""


@click.command("convert", short_help="Write an adapter in another format, or any kind as LoRA.")
@to_option()
@click.option("--to-lora", is_flag=True, help="Write LoHa, LoKr, DoRA, OFT … as LoRA, and print the error.")
@arch_option()
@click.option("--from", "from_format", type=a_format, metavar="FORMAT", help="Format of ADAPTER, where it is not clear.")
@pickle_option
@rank_options
def convert_command(adapter: Path, to: str | None, to_lora: bool, out: Path, **options: Any) -> None:
    """Write ADAPTER to OUT in another format, with the same ΔW: renamed, cut and stacked as the format asks for.

    What was written is read again and compared with ADAPTER before it appears. A folder of adapters becomes a folder.
    With --to-lora every delta on a matrix or a kernel becomes a LoRA, and what that leaves out is printed; kinds that
    depend on the weight they change (DoRA, OFT, BOFT, (IA)³, GLoRA) then need --base.

    \b
    Example:
      loratool convert style.safetensors -o new.safetensors --to diffusers
      loratool convert flux.safetensors -o a.safetensors --to comfyui --arch flux1
      loratool convert loha.safetensors -o lora.safetensors --to-lora --rank 16
    """
    if not to and not to_lora:
        raise click.UsageError("give --to FORMAT, --to-lora, or both")
    rule = rule_from_options(options, needed=False)
    # Without --to the adapter keeps its own spelling, so that nothing has to be known of its names.
    if not to:
        for name in ("arch", "from_format", "allow_pickle"):
            if options.pop(name):
                raise click.UsageError(f"--{name.removesuffix('_format').replace('_', '-')} goes with --to")
        from loratool.verbs.resize import to_lora as run

        run_low_rank("converted", adapter, run, rule, out=out, **options)
        return
    if not to_lora and (rule or options["dtype"]):
        raise click.UsageError("--rank and other rules, and --dtype, go with --to-lora")
    # --to-lora alone makes exact LoRAs: Rule() keeps all ranks above noise.
    from loratool.numbers.ranks import Rule

    options["rule"] = (rule or Rule()) if to_lora else None
    if adapter.is_dir() and not is_adapter_folder(adapter):
        _convert_folder(adapter, to, out, **options)
    else:
        _convert(adapter, to, out, **options)


def _convert_folder(folder: Path, to: str, out: Path, **options: Any) -> None:
    """Converts every adapter of a folder under its own name; raises `LoratoolError` at the end where any of them failed."""
    adapters = [
        path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin") or is_adapter_folder(path)
    ]
    if not adapters:
        raise LoratoolError(f"{folder}: has no adapters in it; expected .safetensors files or PEFT folders")
    if out.exists() and not out.is_dir():
        raise LoratoolError(f"{out}: is a file; a folder of adapters becomes a folder")
    out.mkdir(exist_ok=True)
    folders = format_named(to).folder
    failed = []
    for path in adapters:
        name = path.stem if path.is_file() else path.name
        try:
            _convert(path, to, out / (name if folders else f"{name}.safetensors"), **options)
        except LoratoolError as error:
            # The others are still wanted; the exit code is that of a failure all the same.
            failed.append(path.name)
            warn(str(error))
    if failed:
        raise LoratoolError(f"{folder}: {len(failed)} of {len(adapters)} were not converted: {', '.join(failed)}")


def _convert(
    adapter: Path,
    to: str,
    out: Path,
    *,
    alpha: float | None,
    slots: tuple[bool, ...] | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    from loratool.adapter.adapter import Assumptions
    from loratool.verbs.convert import convert

    report = convert(adapter, out, to, assume=Assumptions(alpha, slots or ()), **options)
    if show_report(report, as_json=as_json, quiet=quiet):
        print_facts(f"converted {adapter} to {report.out}", _facts(report))
        if verbose and report.lowered:
            print_converted(report.lowered)


def _facts(report: ConvertReport) -> Iterator[tuple[str, str]]:
    yield "format", report.format
    yield "for", report.arch
    changed = [f"{count} {what}" for count, what in ((report.cut, "cut apart"), (report.stacked, "stacked")) if count]
    how = ", ".join(changed) if changed else "only renamed"
    yield "modules", f"{report.before} became {report.after} ({how})"
    if report.lowered:
        kinds = histogram(Counter(module.kind for module in report.lowered))
        yield "to LoRA", f"{len(report.lowered)} ({kinds}), leaving out {report.error:.2%} of their ΔW"
    yield "alpha", ALPHAS[report.alpha]
    differs = f"differs by at most {report.difference:.1e} of a module"
    yield "checked", f"read back and compared: {differs if report.difference else 'every number is the same'}"
    yield "size", size(report.nbytes)
