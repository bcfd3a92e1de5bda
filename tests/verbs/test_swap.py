"""Swapping adapters, and changing checkpoints in place: one rounding, nothing else is written, one state or the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from loratool import Checkpoint, WeightedAdapter, merge, swap
from loratool.errors import OutputError, Unsupported
from loratool.files.in_place import READY_FOLDER, complete_interrupted_change, finish_change_in_place
from loratool.files.layout import open_layout
from loratool.files.writer import Writer
from loratool.numbers.rounding import ulp
from tests.conftest import examples
from tests.models import Tensors, kohya, llm, peft_adapter, save
from tests.verbs.test_merge import STEMS, base_tensors
from tests.verbs.test_unmerge import dora

pytestmark = [pytest.mark.filterwarnings("ignore")]

SHARDS = ("model-00001", "model-00002", "model-00003")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(seed=st.integers(0, 1000), old=st.floats(-2, 2), new=st.floats(-2, 2))
@settings(max_examples=examples(20), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_swap_is_the_merge_of_the_other_to_one_rounding(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, seed: int, old: float, new: float
) -> None:
    folder = tmp_path_factory.mktemp("swap")
    base = save(folder / "base.safetensors", base_tensors(dtype))
    a = WeightedAdapter(save(folder / "a.safetensors", kohya(STEMS, 3, 2.0, seed)), old)
    b = WeightedAdapter(save(folder / "b.safetensors", kohya(STEMS, 2, 1.0, seed + 1)), new)
    merge(base, [a], folder / "with-a.safetensors")
    merge(base, [b], folder / "with-b.safetensors")

    swap(folder / "with-a.safetensors", [a], [b], folder / "swapped.safetensors")

    merged, wanted = load_file(folder / "with-a.safetensors"), load_file(folder / "with-b.safetensors")
    for name, tensor in load_file(folder / "swapped.safetensors").items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, wanted[name])
            continue
        # Half a step of what was merged, and one of either result; float32's own error is some of its steps.
        slack = (ulp(merged[name]) + ulp(wanted[name]) + ulp(tensor)).double() / 2
        slack += 2.0**-20 * (merged[name].double().abs() + wanted[name].double().abs())
        assert bool(((tensor.double() - wanted[name].double()).abs() <= slack).all())


def test_what_is_no_sum_is_not_taken_out_but_may_be_put_in(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", base_tensors())
    lora, other = save(tmp_path / "a.safetensors", kohya(STEMS, 2, 1.0)), save(tmp_path / "d.safetensors", dora())
    with pytest.raises(Unsupported, match=r"d\.safetensors: lora_unet_fc: .* only the undo file of the merge"):
        swap(base, [other], [lora], tmp_path / "x.safetensors")
    assert swap(base, [lora], [other], tmp_path / "x.safetensors").matched == len(STEMS) + 1


def checkpoint(folder: Path) -> SimpleNamespace:
    """A sharded model that an adapter was merged into, another adapter, and what swapping them makes of it."""
    model = llm("llama").to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="16KB")
    for seed, name in enumerate("ab"):
        peft_adapter(llm("llama"), folder / name, seed, r=2, target_modules=["q_proj", "down_proj"])
    merge(folder / "base", [folder / "a"], folder / "model")
    shutil.rmtree(folder / "base")
    swap(folder / "model", [folder / "a"], [folder / "b"], folder / "wanted")
    return SimpleNamespace(model=folder / "model", a=folder / "a", b=folder / "b", wanted=folder / "wanted")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def values(path: Path) -> Tensors:
    return dict(Checkpoint(path))


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_in_place_is_what_a_copy_would_hold(tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    before = contents(files.model)
    report = swap(files.model, [files.a], [files.b], None)
    assert not report.warnings
    assert same(values(files.model), values(files.wanted))
    after = contents(files.model)
    assert after.keys() == before.keys()
    changed = {Checkpoint(files.model).layout.tensors[name][0] for name in report.changed}
    assert {name for name in after if after[name] != before[name]} == changed
    assert json.loads(open_layout(files.model).files[min(changed)].metadata["loratool"])["command"] == "swap"


def test_in_place_writes_what_changes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"fc.weight": torch.randn(64, 32), "other.weight": torch.randn(512, 512), "out.weight": torch.randn(8, 12)}
    base = save(tmp_path / "base.safetensors", tensors)
    adapter = save(tmp_path / "a.safetensors", kohya({"lora_unet_fc": (64, 32)}, 2, 1.0))
    os.chmod(base, 0o640)
    merge(base, [adapter], tmp_path / "wanted.safetensors")
    written = []
    write = Writer.write

    def counted(self: Writer, data: bytes, offset: int) -> None:
        written.append((offset, len(data)))
        write(self, data, offset)

    monkeypatch.setattr(Writer, "write", counted)
    report = merge(base, [adapter], None)

    info = open_layout(base).info("fc.weight")
    assert written == [(info.start, info.nbytes)]
    assert "no room to say what was merged" in report.warnings[0]
    assert same(values(base), values(tmp_path / "wanted.safetensors"))
    assert base.stat().st_mode & 0o777 == 0o640
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class Crash(BaseException):
    """What nothing catches, as nothing catches a power cut."""


def crashing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Lets nothing reach the disk any more after so many changes of it, cleaning up included."""
    left = after

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return function(*words, **named)

        return call

    for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "pwrite", "copy_file_range", "chmod"):
        monkeypatch.setattr(os, name, deadly(getattr(os, name)))


def test_a_crash_at_any_step_leaves_either_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = checkpoint(tmp_path)
    states = {"old": values(files.model), "new": values(files.wanted)}
    pristine = contents(files.model)
    seen = []
    for step in count():
        victim = tmp_path / f"victim-{step}"
        shutil.copytree(files.model, victim)
        with monkeypatch.context() as patched:
            crashing(patched, step)
            try:
                swap(victim, [files.a], [files.b], None)
                done = True
            except Crash:
                done = False
        found = values(victim)
        seen.append(next(name for name, state in states.items() if same(state, found)))
        # Whatever it was, it can be done, and leaves nothing behind once the process is gone.
        with monkeypatch.context() as patched:
            patched.setattr("loratool.files.locks._try_lock", lambda descriptor: True)
            if seen[-1] == "old":
                swap(victim, [files.a], [files.b], None)
            else:
                swap(victim, [files.b], [files.b], None)
        assert contents(victim).keys() == pristine.keys()
        assert seen[-1] == "new" or same(values(victim), states["new"])
        if done:
            break
    assert seen == sorted(seen, reverse=True)
    assert seen.count("old") > 20
    assert seen.count("new") > 3


KILL = """
import os, sys, loratool
from loratool.files import output
output.sync = lambda path: os.kill(os.getpid(), 9)
loratool.swap(*([each] if i else each for i, each in enumerate(sys.argv[1:])), None)
"""


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    before = contents(files.model)
    command = [sys.executable, "-c", KILL, str(files.model), str(files.a), str(files.b)]
    assert subprocess.run(command, check=False, timeout=120).returncode == -9
    left = contents(files.model)
    assert left.keys() > before.keys()
    assert all(left[name] == before[name] for name in before)
    swap(files.model, [files.a], [files.b], None)
    assert same(values(files.model), values(files.wanted))
    assert contents(files.model).keys() == before.keys()


def test_an_interrupted_change_is_read_where_it_lies_and_finished_by_the_next_change(tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    ready = files.model / READY_FOLDER
    ready.mkdir()
    shard = sorted(files.wanted.glob("*.safetensors"))[0].name
    shutil.copy(files.wanted / shard, ready / shard)
    before = contents(files.model)
    index = next(files.model.glob("*.index.json"))
    for name in (files.model, index):
        assert open_layout(name).files[shard].path == ready / shard
    assert open_layout(files.model / shard).files[""].path == ready / shard
    # Reading changes nothing.
    assert contents(files.model) == before
    for path in (ready / shard, ready):
        finish_change_in_place(files.model / shard)
        assert not path.exists()
    assert (files.model / shard).read_bytes() == (files.wanted / shard).read_bytes()


@pytest.mark.parametrize("name", ["README.md", "more.safetensors"])
def test_only_weights_that_are_there_are_replaced_by_what_lies_ready(tmp_path: Path, name: str) -> None:
    (tmp_path / READY_FOLDER).mkdir()
    (tmp_path / READY_FOLDER / name).write_text("a stranger's")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(OutputError, match="remove "):
        complete_interrupted_change(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not (tmp_path / "more.safetensors").exists()


def test_a_strangers_folder_moves_files_nowhere_else(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = tmp_path / "model"
    (root / READY_FOLDER / "unet").mkdir(parents=True)
    (root / READY_FOLDER / "unet" / "x.safetensors").write_text("evil")
    (root / READY_FOLDER / "link.safetensors").symlink_to(elsewhere)
    (root / "unet").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="has no place in"):
        complete_interrupted_change(root)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("case", ["dtype", "link", "read-only", "vocabulary"])
def test_what_cannot_be_done_in_place_is_refused_with_the_way_out(tmp_path: Path, case: str) -> None:
    if case == "read-only" and os.geteuid() == 0:
        pytest.skip("root may write whatever the mode says")
    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"dtype": "bfloat16"} if case == "dtype" else {}
    config = {"modules_to_save": ["embed_tokens", "lm_head"]} if case == "vocabulary" else {}
    if case == "vocabulary":
        model.resize_token_embeddings(56)
    peft_adapter(model, tmp_path / "a", r=2, target_modules=["q_proj"], **config)
    weights = tmp_path / "base" / "model.safetensors"
    if case == "link":
        weights.rename(tmp_path / "blob")
        weights.symlink_to(tmp_path / "blob")
    if case == "read-only":
        weights.chmod(0o400)
    before = contents(tmp_path)
    with pytest.raises((Unsupported, OutputError), match="-o"):
        merge(tmp_path / "base", [tmp_path / "a"], None, **options)
    assert contents(tmp_path) == before


def test_the_command_line_swaps_and_changes_in_place(tmp_path: Path, invoke) -> None:
    files = checkpoint(tmp_path)
    done = invoke("swap", "model", "--out", "a", "--in", "b", "-o", "swapped")
    assert (done.returncode, done.stderr) == (0, "")
    assert "swapped 1 for 1 in swapped" in done.stdout
    assert contents(tmp_path / "swapped") == contents(files.wanted)
    assert invoke("swap", "model", "--out", "a", "--in", "b").returncode == 2
    assert invoke("swap", "model", "--out", "a", "--in", "b", "-o", "x", "--in-place").returncode == 2
    assert invoke("swap", "model", "--out", "a", "--in", "b", "--in-place", "-q").returncode == 0
    assert same(values(files.model), values(files.wanted))
    wrong = invoke("swap", "model", "--out", "a:0.5", "--in", "b", "-o", "y")
    assert "warning: model says that a:-1, b:1 was merged into it, not a:0.5" in wrong.stderr
    assert invoke("merge", "model", "a", "--in-place", "--undo", "u").returncode == 0
    assert invoke("unmerge", "model", "--undo", "u", "-o", "back").returncode == 0
    assert same(values(tmp_path / "back"), values(files.wanted))
