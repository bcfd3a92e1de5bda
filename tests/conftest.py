"""Fixtures that several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

FIXTURES = Path(__file__).parent.parent / "fixtures"

EXAMPLES = int(os.environ.get("LORATOOL_EXAMPLES", "0"))

if EXAMPLES:
    settings.register_profile("thorough", max_examples=EXAMPLES)
    settings.load_profile("thorough")

Run = Callable[..., subprocess.CompletedProcess[str]]


def examples(few: int) -> int:
    """How many examples a law is tried with: few, unless LORATOOL_EXAMPLES asks for more."""
    return max(few, EXAMPLES)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `loratool` in this process, which is quicker, in an empty folder."""
    from click.testing import CliRunner

    from loratool.cli import cli

    monkeypatch.chdir(tmp_path)

    def loratool(*words: str | Path) -> subprocess.CompletedProcess[str]:
        done = CliRunner().invoke(cli, [*map(str, words)])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)

    return loratool


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `loratool` as its users do, in a process of its own, in an empty folder."""

    def loratool(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "loratool", *map(str, words)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **environment},
            timeout=120,
            check=False,
        )

    return loratool
