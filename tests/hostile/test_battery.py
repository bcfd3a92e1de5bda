"""Every case through every verb: it ends rightly or with one message that names the file, and leaves nothing behind."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.hostile.cases import BAD, CASES, GOOD, MISFIT, WARNS, Case, base_tensors, stored

VERBS = ("merge", *(pytest.param(verb, marks=pytest.mark.slow) for verb in ("inspect", "convert", "resize")))
"""What changes weights is tried each time, the others where there is time for it."""
pytestmark = [pytest.mark.filterwarnings("ignore")]


def words(verb: str, adapter: str) -> list[str]:
    return {
        "inspect": ["inspect", "--", adapter],
        "convert": ["convert", "--to", "peft", "-o", "out", "--", adapter],
        "merge": ["merge", "-o", "out", "--", "base.safetensors", adapter],
        "resize": ["resize", "--rank", "2", "-o", "out", "--", adapter],
    }[verb]


def contents(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        regular = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_bytes() if regular else os.lstat(path).st_mode
    return found


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_it_ends_rightly(tmp_path: Path, invoke: Run, case: Case, verb: str) -> None:
    (tmp_path / "base.safetensors").write_bytes(stored(base_tensors()))
    case.write(tmp_path / case.file)
    before = contents(tmp_path)

    done = invoke(*words(verb, case.file))

    after = contents(tmp_path)
    text = done.stdout + done.stderr
    assert not [letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf") and letter != "\n"]
    assert {name: after[name] for name in before} == before
    if done.returncode == 0:
        assert verb == "inspect" or case.ends != BAD
        assert verb != "merge" or case.ends != MISFIT
        assert {name.partition("/")[0] for name in after.keys() - before.keys()} == ({"out"} if verb != "inspect" else set())
        if verb == "merge" and case.ends == WARNS:
            assert done.stderr.startswith("warning: ")
    else:
        assert done.returncode == 1
        # PEFT has no place for a difference, and what a DoRA is as a LoRA depends on the weight.
        unheld = (verb, case.name) in (("convert", "adapter: a difference"), ("resize", "adapter: a DoRA"))
        assert case.ends not in (GOOD, WARNS) or unheld, done.stderr
        assert after == before
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert done.stderr.splitlines()[-1] == errors[0]
        assert len(errors[0]) < 4200
        assert Path(case.file).stem[:3] in errors[0] or "out" in errors[0]


OTHERS = (
    "hash --check",
    "meta show",
    "meta strip -o out",
    "meta strip --private -o out",
    "check --for comfyui",
    "check --for vllm --fix -o out",
    "inspect --plot",
    "report -o out",
)


@pytest.mark.slow
@pytest.mark.parametrize("words", OTHERS)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_only_looks_ends_in_words(tmp_path: Path, invoke: Run, case: Case, words: str) -> None:
    """What describes or relabels a file, whatever it is: a result or one error, and nothing else is left."""
    case.write(tmp_path / case.file)
    before = contents(tmp_path)

    done = invoke(*words.split(), "--", case.file)

    after = contents(tmp_path)
    text = done.stdout + done.stderr
    assert not [letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf") and letter != "\n"]
    assert done.returncode in (0, 1)
    assert {name: after[name] for name in before} == before
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} <= ({"out"} if done.returncode == 0 else set())
