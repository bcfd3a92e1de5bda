"""Unmerging: the base to the bit with an undo file, and without one as near as it can be, which is counted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from loratool import Assumptions, Checkpoint, LoratoolError, WeightedAdapter, delta, load, merge, unmerge
from loratool.adapter.selection import Selection
from loratool.adapter.strengths import Strength
from loratool.errors import InvalidFile, OutputError, Unsupported
from loratool.files.layout import open_layout
from loratool.numbers.residuals import pack_residual, unpack_residual
from loratool.numbers.rounding import INTEGERS, adjacent_values
from loratool.verbs.merge import blocks as streaming
from loratool.verbs.merge.added import PlannedChange
from loratool.verbs.merge.plan import MergeInput, make_plan
from tests.conftest import examples
from tests.models import Tensors, kohya, llm, peft_adapter, save
from tests.verbs.test_merge import STEMS, base_tensors

pytestmark = [pytest.mark.filterwarnings("ignore")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
strengths = st.floats(-2, 2).filter(lambda value: abs(value) > 1e-3)


def other_kinds() -> Tensors:
    """A LoHa, a LoKr, a difference and a norm's, for the modules of `base_tensors`."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "lora_unet_fc.hada_w1_a": (12, 2), "lora_unet_fc.hada_w1_b": (2, 8),
        "lora_unet_fc.hada_w2_a": (12, 2), "lora_unet_fc.hada_w2_b": (2, 8),
        "lora_unet_out.lokr_w1": (4, 3), "lora_unet_out.lokr_w2": (2, 4),
        "lora_unet_point.diff": (5, 7, 1, 1), "lora_unet_fc.diff_b": (12,),
    }  # fmt: skip
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def dora() -> Tensors:
    tensors = kohya({"lora_unet_fc": (12, 8)}, 2, 1.0)
    return tensors | {"lora_unet_fc.dora_scale": torch.rand(12, 1) + 0.5}


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 300), near=st.booleans())
@settings(max_examples=examples(25), deadline=None)
def test_what_was_packed_is_unpacked_to_the_bit(dtype: torch.dtype, seed: int, count: int, near: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = dtype.itemsize
    bits = torch.randint(0, 256, (2, count * width), dtype=torch.uint8, generator=generator)
    values, guess = (torch.tensor(row, dtype=torch.uint8).view(dtype) for row in bits.tolist())
    if near:
        guess = (values.double() * (1 + 0.01 * torch.randn(count, generator=generator))).to(dtype)

    again = unpack_residual(pack_residual(values, guess), guess)

    assert torch.equal(again.view(INTEGERS[width]), values.view(INTEGERS[width]))


@given(raw=st.binary(max_size=200), count=st.integers(0, 50))
@settings(max_examples=examples(200), deadline=None)
def test_what_was_never_packed_is_an_error(raw: bytes, count: int) -> None:
    guess = torch.zeros(count, dtype=torch.bfloat16)
    good = pack_residual(guess + 1, guess)
    with pytest.raises(InvalidFile, match="damaged"):
        unpack_residual(raw, guess)
    with pytest.raises(InvalidFile, match="damaged"):
        unpack_residual(good, torch.zeros(count + 9, dtype=torch.bfloat16))


def test_what_is_unpacked_is_never_more_than_was_asked_for() -> None:
    bomb = pack_residual(torch.zeros(1 << 24, dtype=torch.bfloat16), torch.zeros(1 << 24, dtype=torch.bfloat16))
    assert len(bomb) < 2000
    with pytest.raises(InvalidFile, match="damaged"):
        unpack_residual(bomb, torch.zeros(4, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_have_nothing_between_them(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.75, -2.0]).to(dtype)
    below, above = (each.double() for each in adjacent_values(values))
    middle = values.double()
    assert bool((below < middle).all())
    assert bool((middle < above).all())
    for lower, upper in ((below, middle), (middle, above)):
        for share in (0.25, 0.75):
            rounded = (lower + share * (upper - lower)).to(dtype).double()
            assert bool(((rounded == lower) | (rounded == upper)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(first=strengths, second=strengths, seed=st.integers(0, 1000), stochastic=st.booleans())
@settings(max_examples=examples(20), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_undo_file_leads_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, first: float, second: float, seed: int, stochastic: bool
) -> None:
    folder = tmp_path_factory.mktemp("undo")
    base = save(folder / "base.safetensors", base_tensors(dtype), note="kept")
    one = save(folder / "one.safetensors", kohya(STEMS, 3, 2.0, seed))
    two = save(folder / "two.safetensors", other_kinds())
    undo = folder / "undo.safetensors"

    merge(
        base,
        [WeightedAdapter(one, first), WeightedAdapter(two, second)],
        folder / "merged.safetensors",
        stochastic=stochastic,
        undo=undo,
    )
    for path in (one, two):
        path.unlink()
    report = unmerge(folder / "merged.safetensors", folder / "again.safetensors", undo=undo)

    assert report.exact
    assert (folder / "again.safetensors").read_bytes() == base.read_bytes()
    assert report.adapters == (("one.safetensors", first), ("two.safetensors", second))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}.safetensors" for name in ("base", "merged", "undo", "again")
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("stochastic", [False, True])
def test_so_it_does_for_wide_and_for_narrow_numbers(tmp_path: Path, dtype: torch.dtype, stochastic: bool) -> None:
    tensors = {name: each.to(dtype) if each.is_floating_point() else each for name, each in base_tensors().items()}
    base = save(tmp_path / "base.safetensors", tensors)
    adapter = WeightedAdapter(save(tmp_path / "a.safetensors", kohya(STEMS, 3, 2.0)), 0.5)
    options: dict[str, Any] = {"undo": tmp_path / "u", "stochastic": stochastic}
    report = merge(base, [adapter], tmp_path / "m.safetensors", **options)
    assert report.realised_strength is not None
    unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors", undo=tmp_path / "u")
    assert (tmp_path / "b.safetensors").read_bytes() == base.read_bytes()
    assert unmerge(tmp_path / "m.safetensors", tmp_path / "s.safetensors", [adapter]).numbers


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": "float32"}, {}])
def test_so_it_does_for_kinds_that_are_no_sum_and_other_dtypes(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = save(tmp_path / "base.safetensors", base_tensors(torch.float16))
    adapter = save(tmp_path / "a.safetensors", dora())
    merge(base, [adapter], tmp_path / "m.safetensors", undo=tmp_path / "u", **changes)
    assert unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors", undo=tmp_path / "u").exact
    assert (tmp_path / "b.safetensors").read_bytes() == base.read_bytes()


def test_a_sharded_folder_with_a_tied_head_is_there_again_with_its_configs(tmp_path: Path) -> None:
    model = llm("llama", tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    (tmp_path / "base" / "notes.txt").write_text("mine")
    peft_adapter(model, tmp_path / "a", r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}

    report = merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m", undo=tmp_path / "u")
    assert "lm_head.weight" in Checkpoint(tmp_path / "m")
    shutil.rmtree(tmp_path / "a")
    again = unmerge(tmp_path / "m", tmp_path / "b", undo=tmp_path / "u")

    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    assert again.changed == len(report.changed)
    assert report.undo_bytes == (tmp_path / "u").stat().st_size


def test_a_grown_vocabulary_shrinks_again(tmp_path: Path) -> None:
    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(56)
    peft_adapter(model, tmp_path / "a", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "m", undo=tmp_path / "u")
    assert Checkpoint(tmp_path / "m")["lm_head.weight"].shape[0] == 56
    unmerge(tmp_path / "m", tmp_path / "b", undo=tmp_path / "u")
    for path in (tmp_path / "base").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_equal_merges_write_equal_undo_files_whatever_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "base.safetensors", {"w.weight": torch.randn(3000, 200).bfloat16()})
    save(tmp_path / "a.safetensors", kohya({"lora_unet_w": (3000, 200)}, 4, 2.0))
    monkeypatch.setattr(streaming, "TASK_BYTES", 1 << 17)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1 << 15)
    for workers in (1, 4):
        monkeypatch.setattr("loratool.numbers.threads.usable_cores", partial(int, workers))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
        out = tmp_path / f"{workers}.safetensors"
        merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], out, undo=tmp_path / f"u{workers}")
    assert (tmp_path / "u1").read_bytes() == (tmp_path / "u4").read_bytes()
    monkeypatch.undo()
    # It is cut as it was written, whatever the pieces are now.
    unmerge(tmp_path / "1.safetensors", tmp_path / "b.safetensors", undo=tmp_path / "u1")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


def test_names_of_any_length_and_letters_have_room(tmp_path: Path) -> None:
    """In the headers of undo files and of full differences, where JSON may stand inside JSON."""
    odd = "fc" + '\x01"é\U0001f600' * 60
    save(tmp_path / "base.safetensors", {f"{odd}.weight": torch.randn(12, 8), "x" * 5000 + ".weight": torch.ones(12, 8)})
    adapter = save(
        tmp_path / "a.safetensors", kohya({f"lora_unet_{odd}": (12, 8), "lora_unet_" + "x" * 5000: (12, 8)}, 2, 1.0)
    )
    globs = tuple(f'"{number}"' for number in range(2000))
    options: dict[str, Any] = {"undo": tmp_path / "undo", "selection": Selection(exclude=globs)}
    merge(tmp_path / "base.safetensors", [adapter], tmp_path / "m.safetensors", **options)
    assert unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors", undo=tmp_path / "undo").exact
    delta(tmp_path / "base.safetensors", tmp_path / "m.safetensors", tmp_path / "d.safetensors")
    assert len(load_file(tmp_path / "d.safetensors")) == 2


def test_an_undo_file_is_small(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(1024, 1024, generator=generator)
    save(tmp_path / "base.safetensors", {"w.weight": weight.bfloat16()})
    factors = {"down": torch.randn(8, 1024, generator=generator), "up": torch.randn(1024, 8, generator=generator)}
    # A change of a hundredth of the weights' size.
    lora = {
        "lora_unet_w.lora_down.weight": factors["down"].bfloat16(),
        "lora_unet_w.lora_up.weight": (0.02 / 100 / 8**0.5 * factors["up"]).bfloat16(),
    }
    adapter = save(tmp_path / "a.safetensors", lora)
    report = merge(tmp_path / "base.safetensors", [adapter], tmp_path / "m.safetensors", undo=tmp_path / "u.safetensors")
    assert report.undo_bytes is not None
    # 0.149 bits a number were seen.
    assert report.undo_bytes - adapter.stat().st_size < 0.2 / 8 * 1024 * 1024


def undone(folder: Path) -> SimpleNamespace:
    """A base, two adapters, and two merges of it with an undo file of the first."""
    base = save(folder / "base.safetensors", base_tensors(torch.bfloat16))
    one = save(folder / "one.safetensors", kohya(STEMS, 3, 2.0, 1))
    two = save(folder / "two.safetensors", kohya(STEMS, 3, 2.0, 2))
    undo = folder / "undo.safetensors"
    merge(base, [WeightedAdapter(one, 0.8)], folder / "m1.safetensors", undo=undo)
    merge(base, [WeightedAdapter(two, 0.8)], folder / "m2.safetensors")
    merged = {name: folder / f"{name}.safetensors" for name in ("m1", "m2")}
    return SimpleNamespace(base=base, one=one, two=two, undo=undo, **merged)


def test_another_checkpoint_is_told_by_its_hash_and_nothing_is_written(tmp_path: Path) -> None:
    files = undone(tmp_path)
    for path in (files.m2, files.base):
        with pytest.raises(LoratoolError, match=r"does not lead back to the base: it gets SHA-256 \w+, the base had"):
            unmerge(path, tmp_path / "out.safetensors", undo=files.undo)
    smaller = save(tmp_path / "s.safetensors", {"fc.weight": torch.zeros(12, 8)})
    with pytest.raises(InvalidFile, match=r"s\.safetensors: \S+ is not there, the merge of .* is of another checkpoint"):
        unmerge(smaller, tmp_path / "out.safetensors", undo=files.undo)
    with pytest.raises(InvalidFile, match=r"is not an undo file; `merge\(undo=\)` writes one"):
        unmerge(files.m1, tmp_path / "out.safetensors", undo=files.m2)
    llm("llama").save_pretrained(tmp_path / "folder")
    with pytest.raises(InvalidFile, match="is of a merge into one file"):
        unmerge(tmp_path / "folder", tmp_path / "out", undo=files.undo)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name or path.name.startswith(".")]


@given(where=st.floats(0, 1), byte=st.integers(1, 255))
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_undo_file_is_an_error_or_leads_back_all_the_same(
    tmp_path_factory: pytest.TempPathFactory, where: float, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    files = undone(folder)
    raw = bytearray(files.undo.read_bytes())
    raw[int(where * (len(raw) - 1))] ^= byte
    files.undo.write_bytes(raw)
    try:
        unmerge(files.m1, folder / "out.safetensors", undo=files.undo)
    except LoratoolError:
        assert not [path for path in folder.iterdir() if "out" in path.name or path.name.startswith(".")]
    else:
        assert (folder / "out.safetensors").read_bytes() == files.base.read_bytes()


def test_an_undo_file_writes_nowhere_but_into_the_output(tmp_path: Path) -> None:
    from loratool.files.header import TensorInfo, encode_header, read_header

    files = undone(tmp_path)
    header = read_header(files.undo)
    raw = files.undo.read_bytes()
    for name in ("file/../evil", "file//etc/evil", "adapter/0/../../evil"):
        infos = {
            (name if info.name == "adapter/0/one.safetensors" else info.name): TensorInfo(
                name if info.name == "adapter/0/one.safetensors" else info.name,
                info.dtype,
                info.shape,
                info.start,
                info.stop,
            )
            for info in header.tensors.values()
        }
        (tmp_path / "evil.undo").write_bytes(encode_header(infos, header.metadata) + raw[header.data_start :])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InvalidFile):
            unmerge(files.m1, tmp_path / "out.safetensors", undo=tmp_path / "evil.undo")
        assert sorted(tmp_path.rglob("*")) == before
        assert not Path("/etc/evil").exists()


@pytest.mark.parametrize("path", ["out", "out/undo"])
def test_an_undo_file_never_lies_where_the_output_goes(tmp_path: Path, path: str) -> None:
    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    peft_adapter(model, tmp_path / "a", r=2, target_modules=["q_proj"])
    with pytest.raises(OutputError, match=r"output of this very run|exists and is not a plain file"):
        merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", undo=tmp_path / path, overwrite=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(seed=st.integers(0, 10_000), size=st.floats(-4, 1), strength=strengths, stochastic=st.booleans())
@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_number_that_subtraction_misses_is_counted(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, seed: int, size: float, strength: float, stochastic: bool
) -> None:
    folder = tmp_path_factory.mktemp("sub")
    generator = torch.Generator().manual_seed(seed)
    base = {"fc.weight": torch.randn(24, 16, generator=generator).to(dtype)}
    save(folder / "base.safetensors", base)
    lora = {
        "lora_unet_fc.lora_down.weight": torch.randn(2, 16, generator=generator),
        "lora_unet_fc.lora_up.weight": 10**size * torch.randn(24, 2, generator=generator),
    }
    adapter = WeightedAdapter(save(folder / "a.safetensors", lora), strength)
    merge(folder / "base.safetensors", [adapter], folder / "m.safetensors", stochastic=stochastic)

    report = unmerge(folder / "m.safetensors", folder / "b.safetensors", [adapter])

    missed = load_file(folder / "b.safetensors")["fc.weight"] != base["fc.weight"]
    assert not report.exact
    assert report.numbers == missed.numel()
    merged = load_file(folder / "m.safetensors")["fc.weight"]
    # Number by number: each that is not the old one is one of those that may not be.
    plan = make_plan(
        open_layout(folder / "m.safetensors"), [MergeInput(load(folder / "a.safetensors"), Strength(-strength))]
    )
    column = PlannedChange(plan.tensors["fc.weight"])
    rows = torch.tensor([column.doubtful(merged[row : row + 1], row, by_chance=stochastic) for row in range(24)])
    assert report.doubtful == int(rows.sum())
    assert bool((missed.sum(1) <= rows).all())


def test_where_nothing_is_lost_nothing_is_doubtful(tmp_path: Path) -> None:
    base = {"fc.weight": torch.randint(-8, 8, (24, 16)).to(torch.bfloat16) + 64}
    save(tmp_path / "base.safetensors", base)
    lora = {"lora_unet_fc.diff": torch.randint(-3, 3, (24, 16)).float()}
    adapter = save(tmp_path / "a.safetensors", lora)
    merge(tmp_path / "base.safetensors", [adapter], tmp_path / "m.safetensors")
    report = unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors", [adapter])
    assert torch.equal(load_file(tmp_path / "b.safetensors")["fc.weight"], base["fc.weight"])
    # Below 64 bf16 has steps of a quarter, above of a half: a merged number below 64 may have been several above it.
    merged = load_file(tmp_path / "m.safetensors")["fc.weight"]
    assert report.doubtful <= int((merged <= 64).sum())


def test_what_is_no_sum_is_not_subtracted(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", base_tensors())
    adapter = save(tmp_path / "a.safetensors", dora())
    merge(base, [adapter], tmp_path / "m.safetensors")
    with pytest.raises(Unsupported, match=r"lora_unet_fc: what a delta of kind dora changed.*only the undo file"):
        unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors", [adapter])
    assert not (tmp_path / "b.safetensors").exists()


def test_a_checkpoint_that_says_otherwise_is_a_warning(tmp_path: Path) -> None:
    files = undone(tmp_path)
    right = unmerge(files.m1, tmp_path / "b1.safetensors", [WeightedAdapter(files.one, 0.8)])
    assert not right.warnings
    wrong = unmerge(files.m1, tmp_path / "b2.safetensors", [WeightedAdapter(files.one, 0.7)])
    assert "says that one.safetensors:0.8 was merged into it, not one.safetensors:0.7" in wrong.warnings[0]


def test_the_command_line_restores_and_subtracts(tmp_path: Path, invoke) -> None:
    files = undone(tmp_path)
    done = invoke("unmerge", files.m1, "--undo", files.undo, "-o", "b.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert "restored to the bit" in done.stdout
    assert (tmp_path / "b.safetensors").read_bytes() == files.base.read_bytes()
    done = invoke("unmerge", files.m1, f"{files.one}:0.8", "-o", "s.safetensors")
    assert "can be off by a rounding" in done.stdout
    report = json.loads(invoke("unmerge", files.m1, f"{files.one}:0.8", "-o", "s2.safetensors", "--json").stdout)
    assert report["exact"] is False
    assert invoke("unmerge", files.m1, "-o", "x").returncode == 2
    assert invoke("unmerge", files.m1, files.one, "--undo", files.undo, "-o", "x").returncode == 2


def test_the_base_is_the_same_whatever_sums_in_float32_come_to(tmp_path: Path) -> None:
    """Another machine adds in another order: float64 makes no number of it."""
    files = undone(tmp_path)
    code = (
        "import torch, loratool; one = torch.addmm; mm = torch.Tensor.addmm_\n"
        "def shaken(self, a, b): return mm(self, a.flip(1), b.flip(0)).mul_(1 + 1e-15)\n"
        "torch.Tensor.addmm_ = shaken\n"
        f"assert loratool.unmerge({str(files.m1)!r}, {str(tmp_path / 'b.safetensors')!r}, undo={str(files.undo)!r}).exact"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_adapter_in_the_hubs_cache_goes_by_its_repository(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", base_tensors(torch.float16))
    folder = tmp_path / "models--me--style" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    adapter = save(folder / "adapter_model.safetensors", kohya(STEMS, 2, 1.0))
    merge(base, [folder], tmp_path / "m.safetensors")
    assert adapter.exists()
    assert not unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors", [folder]).warnings


def test_block_strengths_are_compared_with_the_history(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", base_tensors(torch.float16))
    adapter = save(tmp_path / "a.safetensors", kohya(STEMS, 2, 1.0))
    weighed = WeightedAdapter(adapter, Strength(1.0, parts={"unet": 0.5}))
    merge(base, [weighed], tmp_path / "m.safetensors")
    assert not unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors", [weighed]).warnings
    (warning,) = unmerge(tmp_path / "m.safetensors", tmp_path / "c.safetensors", [adapter]).warnings
    assert "says that a.safetensors:1:unet=0.5 was merged into it, not a.safetensors:1" in warning


def test_what_is_in_memory_and_no_longer_in_its_file_cannot_be_kept(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", base_tensors(torch.float16))
    adapter = load(save(tmp_path / "a.safetensors", kohya(STEMS, 2, 1.0)))
    merge(base, [adapter], tmp_path / "m.safetensors", undo=tmp_path / "u")
    assert unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors", undo=tmp_path / "u").exact
    half = dataclasses.replace(adapter, changes=adapter.changes[:1])
    with pytest.raises(Unsupported, match="is in memory and not what its file holds"):
        merge(base, [half], tmp_path / "n.safetensors", undo=tmp_path / "v")
    assert not (tmp_path / "n.safetensors").exists()


def test_what_was_assumed_of_an_adapter_goes_with_it(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8).half()})
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": torch.randn(2, 8), f"{name}.lora_B.weight": torch.randn(8, 2)}
    adapter = load(save(tmp_path / "a.safetensors", factors), assume=Assumptions(alpha=8.0))
    merge(base, [adapter], tmp_path / "m.safetensors", undo=tmp_path / "u")
    assert unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors", undo=tmp_path / "u").exact
