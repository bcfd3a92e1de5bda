"""What people are told: each error names the file and what is wrong with it, and says what was expected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loratool import WeightedAdapter
from loratool.cli import short_of_memory
from loratool.cli.options import parse_weighted_adapter
from loratool.cli.render import progress_bar
from loratool.files.strict_json import strict_json
from loratool.text import LONGEST, count, safe
from tests.conftest import FIXTURES, Run, examples
from tests.models import save

LLAMA, LORA, STYLE = FIXTURES / "llama", FIXTURES / "llama-lora", FIXTURES / "style.safetensors"
STEM = "lora_unet_q"


MALFORMED = {
    "up with a kernel": ({"lora_down.weight": (2, 8), "lora_up.weight": (8, 2, 3, 3)}, "only down or mid may have one"),
    "a mid that does not fit": (
        {"lora_down.weight": (2, 8, 1, 1), "lora_up.weight": (8, 2, 1, 1), "lora_mid.weight": (3, 3, 3, 3)},
        "does not fit between",
    ),
    "a LoKr of half a side": ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2)}, "needs lokr_w2, or lokr_w2_a and lokr_w2_b"),
    "a LoHa with one core": (
        {"hada_w1_a": (2, 4), "hada_w1_b": (2, 4), "hada_w2_a": (2, 4), "hada_w2_b": (2, 4), "hada_t1": (2, 2, 3, 3)},
        "one of hada_t1 and hada_t2 without the other",
    ),
    "a LoHa of unlike ranks": (
        {"hada_w1_a": (4, 2), "hada_w1_b": (3, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)},
        "shapes do not fit each other: hada_w1_a [4, 2]",
    ),
    "a LoHa of unlike products": (
        {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)},
        "shapes do not fit each other: hada_w1_a [4, 2]",
    ),
    "a GLoRA that does not fit": (
        {"a1.weight": (4, 3), "a2.weight": (2, 4), "b1.weight": (4, 2), "b2.weight": (2, 4)},
        "shapes do not fit each other: a1 [4, 3]",
    ),
    "OFT blocks that are not square": ({"oft_blocks": (2, 4, 3)}, "shapes do not fit each other: oft_blocks [2, 4, 3]"),
    "an embedding's ranks": ({"lora_embedding_A": (2, 8), "lora_embedding_B": (8, 3)}, "embedding A is [2, 8], B [8, 3]"),
    "loralib's ranks": ({"lora_A": (3, 8), "lora_B": (8, 2)}, "ranks are unlike or zero: A [3, 8], B [8, 2]"),
}


@pytest.mark.parametrize("verb", ["merge", "inspect"])
@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_module_is_named_with_its_shapes(tmp_path: Path, invoke: Run, case: str, verb: str) -> None:
    shapes, said = MALFORMED[case]
    stem = "q" if case.startswith("loralib") else STEM
    save(tmp_path / "a.safetensors", {f"{stem}.{leaf}": torch.ones(shape) for leaf, shape in shapes.items()})
    save(tmp_path / "base.safetensors", {"q.weight": torch.ones(8, 8)})
    if verb == "inspect":
        done = invoke("inspect", "a.safetensors")
        assert done.returncode == 0
        assert said in " ".join(done.stdout.split())
        return
    done = invoke("merge", "base.safetensors", "a.safetensors", "-o", "out.safetensors", "--alpha", "1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: a.safetensors: ")
    assert said in done.stderr
    assert "q" in done.stderr


WRONG_USAGE = {
    "extract a b -o out --max-error 120%": "'120%' is not a share of a whole, such as 5% or 0.05",
    "extract a b -o out --max-error x": "'x' is not a share",
    "extract a b -o out --size 5parsecs": "'5parsecs' is not a size, such as 50MB",
    "extract a b -o out --keep sv_fro": "is not one of sv_ratio, sv_fro, sv_cumulative, threshold with =NUMBER",
    "merge a b -o out --slots 1,2": "'1,2' is not a list of 0 and 1",
    "resize a -o out --rank 4 --round-ranks 0,x": "'0,x' is not vllm, pow2, or a list of ranks",
    "edit a -o out --blocks 1,x": "'1,x' is not a list of numbers",
    "compare a": "name two or more adapters",
    "compare a b --to base+a": "--to",
    "resize a": "-o",
    "swap merged": "--out",
    "combine a": "-o",
}
EXPLAINED = {
    f"merge {LLAMA} {LORA} -o out --component te9=1": "no component 'te9'; there are ",
    f"merge {LLAMA} {LORA} -o out --component te1=x": "expected te1=NUMBER",
    f"edit {STYLE} -o out --scale x": "expected GLOB=NUMBER",
    f"edit {STYLE} -o out --scale *=nan": "expected a finite number",
    f"edit {STYLE} -o out --drop nothing-like-it": "matches no module",
    f"edit {STYLE} -o out --drop *": "nothing is left",
    f"combine {STYLE}:1:te1=x -o out": "NAME=NUMBER, behind the last colon",
    f"compare {LLAMA} --to {LLAMA}": "expected BASE+ADAPTER:STRENGTH",
    f"merge {LLAMA} {LORA} -o out --device gpu": "expected auto, cpu, cuda, cuda:N or mps",
    f"merge {LLAMA} {LORA} -o out --device cpu:1": "expected auto, cpu, cuda, cuda:N or mps",
}


@pytest.mark.parametrize("line", WRONG_USAGE)
def test_wrong_usage_says_what_was_expected(invoke: Run, line: str) -> None:
    done = invoke(*line.split())
    assert done.returncode == 2
    assert WRONG_USAGE[line] in " ".join(done.stderr.split())


@pytest.mark.parametrize("line", EXPLAINED)
def test_words_that_make_no_sense_for_these_files_are_explained(tmp_path: Path, invoke: Run, line: str) -> None:
    done = invoke(*line.split())
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert EXPLAINED[line] in done.stderr
    assert not list(tmp_path.iterdir())


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "holds no safetensors file"),
        (["pytorch_model.bin"], "holds no safetensors file, only pytorch_model.bin; save the model as safetensors first"),
        (["a.safetensors", "b.safetensors"], "holds several safetensors files and no index (a.safetensors, b.safetensors)"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "holds several shard indexes"),
        (["model_index.json"], "a diffusers folder without any safetensors file"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_holds(tmp_path: Path, invoke: Run, names: list[str], said: str) -> None:
    folder(tmp_path / "base", *names)
    done = invoke("merge", "base", LORA, "-o", "out")
    assert done.returncode == 1
    assert f"error: base: {said}" in done.stderr


def test_a_shard_index_may_be_named_and_must_be_complete(tmp_path: Path, invoke: Run) -> None:
    shutil.copytree(LLAMA, tmp_path / "base")
    index = "base/model.safetensors.index.json"
    assert invoke("inspect", index).returncode == 0
    document = json.loads((tmp_path / index).read_text())
    document["weight_map"]["ghost.weight"] = next(iter(document["weight_map"].values()))
    (tmp_path / index).write_text(json.dumps(document))
    done = invoke("inspect", index)
    assert done.returncode == 1
    assert f"error: {index}: lists ghost.weight, which no shard holds" in done.stderr


def test_formats_lists_what_is_known(invoke: Run) -> None:
    assert "kohya" in invoke("formats").stdout
    assert {"formats", "refused", "architectures"} == json.loads(invoke("formats", "--json").stdout).keys()


def test_progress_is_drawn_for_those_who_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_bar("merging", quiet=False) as silent:
        assert silent is None
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar("merging", quiet=False) as drawn:
        assert drawn is not None
        drawn(1, 2)
    with progress_bar("merging", quiet=True) as silent:
        assert silent is None


def test_counts_are_short() -> None:
    assert [count(n) for n in (5, 42_600_000, 8_030_000_000)] == ["5", "42.6 M", "8.03 B"]


@given(st.text())
@settings(max_examples=examples(100))
def test_nothing_from_outside_controls_a_terminal(text: str) -> None:
    shown = safe(text)
    assert shown.isprintable()
    assert len(shown) <= 10 * (LONGEST + 1)
    assert shown == text or not text.isprintable() or len(text) > LONGEST


@given(
    st.text(st.characters(exclude_characters=":/~\x00", exclude_categories=["Cs"]), min_size=1), st.floats(allow_nan=False)
)
@settings(max_examples=examples(100))
def test_a_strength_is_what_follows_the_last_colon(name: str, strength: float) -> None:
    assume(name != "-")
    assert parse_weighted_adapter(f"{name}:{strength!r}") == WeightedAdapter(Path(name), strength)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)


@given(JSON)
@settings(max_examples=examples(100))
def test_sound_json_is_read_as_json_is(document: object) -> None:
    for ascii_only in (True, False):
        assert strict_json(json.dumps(document, ensure_ascii=ascii_only).encode()) == document


def test_a_disk_that_is_too_small_is_said_before_any_work(
    tmp_path: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    done = invoke("merge", LLAMA, LORA, "-o", "out")
    assert done.returncode == 1
    assert "error: out: needs " in done.stderr
    assert "the disk has 10 free" in done.stderr
    shutil.copytree(LLAMA, tmp_path / "llama")
    done = invoke("merge", "llama", LORA, "--in-place")
    assert done.returncode == 1
    assert "bytes for a copy, the disk has 10 free" in done.stderr


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path: Path, invoke: Run) -> None:
    (folder(tmp_path / "photos", "holiday.jpg")).resolve()
    done = invoke("merge", LLAMA, LORA, "-o", "photos", "--overwrite")
    assert "error: photos: --overwrite would delete holiday.jpg, which belongs to no model" in done.stderr
    shutil.copytree(LLAMA, tmp_path / "models" / "llama")
    (tmp_path / "models" / "config.json").write_text("{}")
    done = invoke("merge", "models/llama", LORA, "-o", "models", "--overwrite")
    assert "error: models: holds the input models/llama" in done.stderr


def test_a_link_is_not_changed_in_place(tmp_path: Path, invoke: Run) -> None:
    shutil.copy(FIXTURES / "sdxl.safetensors", tmp_path / "blob")
    (tmp_path / "base.safetensors").symlink_to("blob")
    done = invoke("merge", "base.safetensors", STYLE, "--in-place")
    assert done.returncode == 1
    assert "is a symbolic link" in done.stderr


def test_memory_that_ran_out_is_told_with_the_number() -> None:
    torchs = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000 bytes.")
    assert str(short_of_memory(torchs)).startswith("out of memory: 4 GB were needed at once; give the process more")
    assert str(short_of_memory(MemoryError())).startswith("out of memory; ")
    assert short_of_memory(RuntimeError("a bug")) is None


def test_ranks_may_be_a_servers(invoke: Run) -> None:
    done = invoke("resize", LORA, "-o", "small", "--rank", "3", "--round-ranks", "vllm", "--pad", "--json")
    assert {module["rank"] for module in json.loads(done.stdout)["modules"]} == {8}
