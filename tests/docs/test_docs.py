"""The README and the manual are true: transcripts are what commands print, code runs, tables and help are fresh."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.tables import PAGES, filled
from tests.cli.test_help import prepared
from tests.conftest import FIXTURES, Run

ROOT = FIXTURES.parent
README = (ROOT / "README.md").read_text()


def blocks(pattern: str) -> dict[str, tuple[str, ...]]:
    """Everything that a pattern finds in the README and the manual, each once, by page and first words."""
    found: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        for match in re.findall(pattern, page.read_text(), re.DOTALL):
            groups = match if isinstance(match, tuple) else (match,)
            found.setdefault(groups, f"{page.stem}: {groups[0][:60]}")
    return {name: groups for groups, name in found.items()}


TRANSCRIPTS = blocks(r"<!-- transcript -->\n```console\n\$ (.*?)\n(.*?)```")
RECIPES = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/recipes.md").read_text(), re.DOTALL | re.MULTILINE)


def stable(text: str) -> list[str]:
    """Lines without trailing blanks, and without what differs from run to run and from machine to machine: times and memory,
    at the end of lines too, and where a verb computed."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith("computed on ")]
    masked = [re.sub(r"in [\d.]+ s, peak memory [\d.]+ \w+", "in … s", line) for line in lines]
    return [re.sub(r" dB +\d\.\d\d$", " dB …", line) for line in masked]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcripts_are_what_is_printed(tmp_path: Path, invoke: Run, name: str) -> None:
    command, printed = TRANSCRIPTS[name]
    (tmp_path / "fixtures").symlink_to(FIXTURES)
    done = [invoke(*shlex.split(each)[1:]) for each in command.split(" && ")]
    assert stable("".join(each.stdout + each.stderr for each in done)) == stable(printed)


@pytest.mark.slow
@pytest.mark.parametrize(("title", "text"), RECIPES, ids=[title for title, _ in RECIPES])
def test_recipes_work(tmp_path: Path, invoke: Run, title: str, text: str) -> None:
    """Every block of a recipe in one shell, with small files under the names that it has."""
    script = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    outputs = {name.rstrip("/") for name in re.findall(r"(?:-o|--undo) (\S+)", script)}
    lines = [line for line in script.splitlines() if "loratool" in line]
    for line in lines:
        words = [word for word in line.split() if word.strip('"').rstrip("/") not in outputs]
        prepared(" ".join(words[words.index("loratool") + 1 :]), tmp_path, invoke)
    if "loras/" in script and not (tmp_path / "loras").exists():
        prepared("inspect loras/", tmp_path, invoke)
    bin_folder = tmp_path / ".bin"
    bin_folder.mkdir()
    (bin_folder / "loratool").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loratool "$@"\n')
    (bin_folder / "loratool").chmod(0o755)
    here = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    # `check` ends with 1 where it finds something, which is what it is for.
    fails = "loratool check" in script and "--fix" not in script
    command = ["bash", "-uo" if fails else "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, check=False)
    assert "error:" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    for (code,) in blocks(r"```python\n(.*?)```").values():
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_comes_from_the_code_is_fresh(page: Path) -> None:
    """`python -m docs.tables` writes it anew."""
    text = page.read_text()
    assert filled(text) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_verb_has_its_page() -> None:
    from loratool.cli import cli

    written = " ".join(page.read_text() for page in PAGES)
    assert not [name for name in cli.commands if f"<!-- help: {name} -->" not in written]
    nav = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in PAGES if page.name != "README.md" and page.name not in nav]


@pytest.mark.slow
def test_the_manual_becomes_a_site(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is in the extra loratool[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Rule" in (tmp_path / "site" / "api" / "index.html").read_text()
