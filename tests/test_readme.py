"""The README is true: its transcripts are what the commands print, its Python runs, its help pages have examples."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from docs.tables import filled
from tests.conftest import FIXTURES

README = (FIXTURES.parent / "README.md").read_text()
TRANSCRIPTS = re.findall(r"<!-- transcript -->\n```console\n\$ (.*?)\n(.*?)```", README, re.DOTALL)


def stable(text: str) -> list[str]:
    """Lines without trailing blanks, and without times and memory, which differ from run to run, at the end of lines too."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    masked = [re.sub(r"in [\d.]+ s, peak memory [\d.]+ \w+", "in … s", line) for line in lines]
    return [re.sub(r" dB +\d\.\d\d$", " dB …", line) for line in masked]


@pytest.mark.parametrize(("command", "printed"), TRANSCRIPTS, ids=[command[:60] for command, _ in TRANSCRIPTS])
def test_transcripts_are_what_is_printed(tmp_path: Path, run, command: str, printed: str) -> None:
    (tmp_path / "fixtures").symlink_to(FIXTURES)

    done = [run(*shlex.split(each)[1:]) for each in command.split(" && ")]

    assert stable("".join(each.stdout + each.stderr for each in done)) == stable(printed)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    exec(compile(code, "README.md", "exec"), {})


def test_the_tables_are_those_of_the_code() -> None:
    """`python -m docs.tables` writes them anew."""
    assert filled(README) == README
