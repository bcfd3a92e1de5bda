"""An output and its undo file, stopped before and after every call that changes a folder: there is always a pair that leads
back, for whoever reads at once and for whoever writes next."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest

from loratool.errors import LoratoolError
from loratool.files import transaction
from loratool.files.locks import entry_hash
from loratool.files.output import NewOutput, commit_together
from loratool.files.transaction import decided_path, sweep

CALLS = ("rename", "replace", "link", "unlink", "rmdir", "fsync")


class Killed(BaseException):
    """What nothing catches, as nothing catches a power cut."""


def stopping(monkeypatch: pytest.MonkeyPatch, step: int, stop: BaseException, *, after: bool, exchanges: bool) -> None:
    """Has the call numbered `step` stopped before it is done, or after; what is killed does nothing from then on."""
    left = step

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if isinstance(stop, Killed) and left < -1:
                raise stop
            if left == -1 and not after:
                raise stop
            done = function(*words, **named)
            if left == -1:
                raise stop
            return done

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, guard(getattr(os, name)))
    exchange = transaction.exchange if exchanges else lambda one, other: False
    monkeypatch.setattr(transaction, "exchange", guard(exchange) if exchanges else exchange)


def write_pair(folder: Path, text: str) -> None:
    """Writes an output and its undo file, both with this text."""
    undo = NewOutput(folder / "undo.st", folder=False, overwrite=True, nbytes=0, inputs=[])
    output = NewOutput(folder / "out", folder=True, overwrite=True, nbytes=0, inputs=[], written=["a"])
    with undo, output:
        undo.path("").write_text(text)
        output.path("a").write_text(text)
        commit_together([undo, output])


def pair_in(folder: Path) -> tuple[str | None, str | None]:
    """What a reader finds of the output and of the undo file."""
    places = (decided_path(folder / "out") / "a", decided_path(folder / "undo.st"))
    out, undo = (path.read_text() if path.exists() else None for path in places)
    return out, undo


def is_free(descriptor: int) -> bool:
    """In place of the lock of a run that is gone, which is this very process."""
    return True


FAULTS_ON_THE_WAY = [
    pytest.param(
        how, after, old, exchanges,
        id="-".join((how, ("before", "after")[after], ("no pair", "old pair")[old], ("aside", "exchange")[exchanges])),
        # A kill runs through every call; errors end in the same code wherever the old pair is, and take minutes in all.
        marks=() if (how == "killed" and exchanges) or (how == "EIO" and old and not after) else pytest.mark.slow,
    )
    for how, after, old, exchanges in product(
        ("EIO", "ENOSPC", "interrupted", "killed"), (False, True), (True, False), (True, False)
    )
]  # fmt: skip


@pytest.mark.parametrize(("how", "after", "old", "exchanges"), FAULTS_ON_THE_WAY)
def test_there_is_always_a_pair_that_leads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, after: bool, old: bool, exchanges: bool
) -> None:
    for step in count():
        folder = tmp_path / str(step)
        folder.mkdir()
        if old:
            write_pair(folder, "old")
        before = ("old", "old") if old else (None, None)
        stop: BaseException = {
            "EIO": OSError(errno.EIO, "broken"),
            "ENOSPC": OSError(errno.ENOSPC, "full"),
            "interrupted": KeyboardInterrupt(),
            "killed": Killed(),
        }[how]
        with monkeypatch.context() as patched:
            stopping(patched, step, stop, after=after, exchanges=exchanges)
            try:
                write_pair(folder, "new")
                done = True
            except (LoratoolError, OSError, KeyboardInterrupt, Killed):
                done = False
        found = pair_in(folder)
        # An undo file alone is of a merge that never came to be, and harms nobody.
        assert found in (before, ("new", "new")) or (not old and found == (None, "new")), (step, found)
        with monkeypatch.context() as patched:
            patched.setattr("loratool.files.locks._try_lock", is_free)
            sweep(folder)
        assert pair_in(folder) in (before, ("new", "new")), step
        left = {path.name for path in folder.iterdir()}
        assert left in ({"out", "undo.st"}, set() if not old else {"out", "undo.st"}), (step, left)
        write_pair(folder, "next")
        assert pair_in(folder) == ("next", "next")
        if done:
            break
    assert step > 8


def test_a_strangers_journal_moves_nothing_elsewhere(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
    (mine / "thesis.txt").write_text("mine")
    name = f".loratool-{entry_hash('x')}-00000000.tmp"
    (mine / name).write_text("theirs")
    inode = (mine / name).stat().st_ino
    for where in ("../mine", str(mine)):
        rows = [[where, name, "thesis.txt", name, inode]]
        (theirs / f".loratool-{entry_hash('thesis.txt')}.journal").write_text(json.dumps({"steps": rows}))
        sweep(theirs)
        assert (mine / "thesis.txt").read_text() == "mine"
        assert decided_path(mine / "thesis.txt") == mine / "thesis.txt"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    write_pair(tmp_path, "new")
    assert pair_in(tmp_path) == ("new", "new")
    assert "cannot sync" in caplog.text
