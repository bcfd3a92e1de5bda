"""torch's settings are the caller's: within a verb one core for each thread, afterwards as before."""

from __future__ import annotations

import contextlib
import inspect
import re
import threading
from pathlib import Path

import pytest
import torch

import loratool
from loratool import block_map, check, load, merge, resize
from loratool.numbers import threads
from loratool.numbers.settings import steady_arithmetic
from tests.models import kohya, save
from tests.verbs.test_merge import STEMS, base_tensors

PACKAGE = Path(loratool.__file__).parent
WITHOUT = {
    "check", "copy_metadata", "delete_metadata", "fetch", "hash_file", "inspect", "iter_deltas", "read_metadata",
    "set_metadata", "strip_metadata",
}  # fmt: skip
"""Public functions that compute nothing themselves: what they call does so within `steady_arithmetic`, or nothing does."""


@pytest.fixture
def settings() -> object:
    """Settings of a caller that nobody would choose, which are put back at the end."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_num_threads(before[0])
    torch.set_float32_matmul_precision(before[1])


def test_every_public_function_that_computes_has_one_core_for_each_thread() -> None:
    found = {name: getattr(loratool, name) for name in loratool.__all__ if inspect.isfunction(getattr(loratool, name))}
    assert {name for name, function in found.items() if not hasattr(function, "__wrapped__")} == WITHOUT


def test_a_verb_wakes_no_team_of_threads_and_puts_the_settings_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: None
) -> None:
    seen: list[int] = []

    class Pool(threads.ThreadPoolExecutor):
        def __init__(self, *words: object, **options: object) -> None:
            seen.append(torch.get_num_threads())
            super().__init__(*words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Pool)
    base = save(tmp_path / "base.safetensors", base_tensors(torch.bfloat16))
    adapter = save(tmp_path / "a.safetensors", kohya(STEMS, 3, 2.0))
    merge(base, [adapter], tmp_path / "out.safetensors", device="cpu")
    resize(adapter, tmp_path / "r.safetensors", loratool.Rule("rank", 2))
    block_map(load(adapter))
    check(adapter, "comfyui")
    assert set(seen) == {1}
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (3, "medium")


def test_settings_are_put_back_after_an_error_and_by_the_last_of_several_threads(settings: None) -> None:
    inside, leave = threading.Barrier(3), threading.Event()
    after: list[int] = []

    def work() -> None:
        with contextlib.suppress(ValueError), steady_arithmetic(), steady_arithmetic():
            inside.wait()
            leave.wait()
            raise ValueError
        after.append(torch.get_num_threads())

    running = [threading.Thread(target=work) for _ in range(2)]
    for each in running:
        each.start()
    inside.wait()
    assert torch.get_float32_matmul_precision() == "highest"
    leave.set()
    for each in running:
        each.join()
    assert after == [3, 3]
    assert torch.get_float32_matmul_precision() == "medium"


def test_numpy_multiplies_nothing() -> None:
    """numpy's BLAS has threads of its own, which no setting of torch reaches."""
    used = re.compile(r"\bnp\.(?:dot|vdot|inner|matmul|einsum|tensordot|linalg)\b")
    assert [path.name for path in PACKAGE.rglob("*.py") if used.search(path.read_text())] == []
