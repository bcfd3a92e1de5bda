"""Every help page has examples, and they work as they are printed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch

from loratool.cli import cli
from tests.conftest import FIXTURES, Run
from tests.models import kohya, save


def commands(command: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if path:
        yield path, command
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from commands(each, (*path, name))


def examples_of(command: click.Command) -> list[str]:
    return re.findall(r"^ *loratool (.*)$", (command.help or "").partition("Example:")[2], re.MULTILINE)


PAGES = dict(commands())
EXAMPLES = [
    pytest.param(line, marks=[pytest.mark.slow] if place else [], id=line[:70])
    for command in PAGES.values()
    for place, line in enumerate(examples_of(command))
]
"""The first of each page is run each time, the others with the slow tests."""
PEFT = ["adapter_folder", "adapter", "my-adapter", "a", "b", "c", "task-a", "task-b"]
STYLES = ["style", "big", "a", "b", "c", "character"]
COPIES = {
    **dict.fromkeys(PEFT, "llama-lora"),
    **{f"{name}.safetensors": "style.safetensors" for name in STYLES},
    "detail.safetensors": "detail.safetensors",
    "sdxl.safetensors": "sdxl.safetensors",
    "tuned.safetensors": "sdxl-tuned.safetensors",
    "Llama-3-8B": "llama",
    "my-finetune": "llama-tuned",
    "base": "llama",
    "tuned": "llama-tuned",
}
"""What the names in the examples stand for."""


def prepared(line: str, place: Path, invoke: Run) -> None:
    """The inputs of an example, under the names that it has for them."""
    inputs = re.sub(r"(-o|--undo(?= back.safetensors$)) \S+", "", line)
    names = {word.partition(":")[0].rstrip("/") for word in re.split(r"[\s+]", inputs)}
    if names & {"style-diffusers.safetensors", "merged.safetensors"}:
        names.add("style.safetensors")
    for name in names & COPIES.keys():
        # One with text encoders, for examples that leave these out.
        wide = line.startswith(("edit", "combine")) and COPIES[name] == "style.safetensors"
        source = FIXTURES / ("detail.safetensors" if wide else COPIES[name])
        if not (place / name).exists():
            (shutil.copytree if source.is_dir() else shutil.copy)(source, place / name)
    for name in names & MADE.keys():
        MADE[name](place, invoke)


def diffusers(place: Path, invoke: Run) -> None:
    words = ["convert", "style.safetensors", "--to", "diffusers", "-o", "style-diffusers.safetensors"]
    assert invoke(*words).returncode == 0


def merged_file(place: Path, invoke: Run) -> None:
    words = ["merge", FIXTURES / "sdxl.safetensors", "style.safetensors:0.8", "-o", "merged.safetensors"]
    assert invoke(*words).returncode == 0


def merged_folder(place: Path, invoke: Run) -> None:
    words = ["merge", FIXTURES / "llama", FIXTURES / "llama-lora", "-o", "merged", "--undo", "back.safetensors"]
    assert invoke(*words).returncode == 0


def flux(place: Path, invoke: Run) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 3072), f"{stem}.lora_B.weight": torch.ones(3072, 2)}
    save(place / "flux.safetensors", tensors)


def loha(place: Path, invoke: Run) -> None:
    stem = "lora_unet_input_blocks_4_1_proj_in"
    leaves = [f"hada_w{side}_{half}" for side in (1, 2) for half in "ab"]
    save(place / "loha.safetensors", {f"{stem}.{leaf}": torch.randn(4, 4) for leaf in leaves})


def loras(place: Path, invoke: Run) -> None:
    (place / "loras").mkdir()
    for name in ("style.safetensors", "detail.safetensors"):
        shutil.copy(FIXTURES / name, place / "loras")
    save(place / "loras" / "third.safetensors", dict(kohya({"lora_unet_q": (8, 8)}, 2, 1.0)))


MADE: dict[str, Callable[[Path, Run], None]] = {
    "style-diffusers.safetensors": diffusers,
    "merged.safetensors": merged_file,
    "merged": merged_folder,
    "flux.safetensors": flux,
    "loha.safetensors": loha,
    "loras": loras,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_work(tmp_path: Path, invoke: Run, line: str) -> None:
    prepared(line, tmp_path, invoke)
    done = invoke(*shlex.split(line))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PAGES, ids=" ".join)
def test_every_page_says_what_and_shows_how(invoke: Run, path: tuple[str, ...]) -> None:
    page = invoke(*path, "-h")
    assert page.returncode == 0
    assert max(map(len, page.stdout.splitlines())) <= 80
    assert examples_of(PAGES[path])
    assert PAGES[path].short_help
    for parameter in PAGES[path].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_put_where_the_shell_looks(
    tmp_path: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    done = invoke("--install-completion")
    assert done.returncode == 0, done.stderr
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert str(path) in done.stdout
    assert path.read_text() == invoke("--show-completion", shell).stdout.removesuffix("\n")
    assert "_LORATOOL_COMPLETE" in path.read_text()


def test_an_unknown_shell_is_an_error(invoke: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    done = invoke("--install-completion")
    assert (done.returncode, "no script for the shell tcsh; name bash, zsh or fish" in done.stderr) == (1, True)


def test_commands_and_options_are_completed() -> None:
    from click.shell_completion import BashComplete

    complete = BashComplete(cli, {}, "loratool", "_LORATOOL_COMPLETE")
    assert [item.value for item in complete.get_completions([], "insp")] == ["inspect"]
    assert "--rank" in [item.value for item in complete.get_completions(["resize"], "--ra")]
    for words in (
        ["inspect"],
        ["merge", "base"],
        ["merge"],
        ["combine"],
        ["swap", "merged", "--in"],
        ["compare"],
        ["meta", "show"],
    ):
        assert [(item.type, item.value) for item in complete.get_completions(words, "sty")] == [("file", "sty")], words


def test_folders_become_a_table(tmp_path: Path, invoke: Run) -> None:
    prepared("inspect loras/", tmp_path, invoke)
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"no")
    shutil.copytree(FIXTURES / "llama-lora", tmp_path / "loras" / "Llama")
    done = invoke("inspect", "loras")
    names = [line.split()[0] for line in done.stdout.splitlines()[1:5]]
    assert names == ["detail.safetensors", "Llama", "style.safetensors", "third.safetensors"]
    assert "unread" in done.stdout
    report = json.loads(invoke("inspect", "loras", "--json").stdout)
    assert [len(report["adapters"]), len(report["errors"])] == [4, 1]


def test_the_map_is_drawn_by_block(invoke: Run) -> None:
    lines = invoke("inspect", "--plot", FIXTURES / "style.safetensors").stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip().startswith(("IN", "M0", "OUT"))}
    assert list(rows)[:5] == ["IN04", "IN05", "IN07", "IN08", "M00"]
    assert {len(cells) for cells in rows.values()} == {12}
    assert {mark for cells in rows.values() for mark in cells} <= set("░▒▓█·")
    assert any("attn1.to_k" in line for line in lines)


def test_colour_is_for_terminals_that_want_it() -> None:
    """What a pipe gets has no escapes; a terminal gets them, unless NO_COLOR says otherwise."""
    import pty
    import subprocess
    import sys

    def seen(**environment: str) -> str:
        controller, terminal = pty.openpty()
        command = [sys.executable, "-m", "loratool", "inspect", str(FIXTURES / "llama-lora")]
        here = {"TERM": "xterm-256color", "COLUMNS": "80", **environment}
        with os.fdopen(controller, "rb", buffering=0) as reading:
            process = subprocess.Popen(command, stdout=terminal, env={**os.environ, **here})
            process.wait()
            os.close(terminal)
            return reading.read(1 << 16).decode()

    assert "\x1b[" in seen()
    plain = seen(NO_COLOR="1", TERM="dumb")
    assert "\x1b[" not in plain
    assert max(map(len, plain.splitlines())) <= 80
