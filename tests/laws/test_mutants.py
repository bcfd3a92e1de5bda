"""Files of every kind, as they are and mutated, through every verb: an output or an error in words, and a way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.mutants import FLAT, SORTS, STEM, VERBS, Sort, run_verb, write_mutant
from loratool import delta, edit, resize
from loratool.deltas.forms import FORMS, require_form
from loratool.errors import InvalidAdapter, NonFinite
from loratool.numbers.factor import Storage, StoredFactors, recompress
from loratool.numbers.ranks import Rule
from tests.conftest import examples

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", SORTS)
def test_the_files_themselves_can_be_merged_and_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (undo,) = (verb for verb in VERBS if "--undo" in verb)
    assert run_verb(tmp_path, name, 0, undo)[0] == 0


def test_a_difference_of_a_single_number_goes_through_every_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sort = Sort((12, 8), {f"{FLAT}.diff": (12, 8), f"{FLAT}.diff_b": ()})
    monkeypatch.setitem(SORTS, "number", sort)  # type: ignore[arg-type]
    asked = ("delta {0} -o out", "compare {0} {0} --base base.safetensors", "combine {0} {0} -o out")
    for verb in VERBS:
        code, said = run_verb(tmp_path, "number", 0, verb)
        assert code == 0 or verb not in asked, said


@pytest.mark.parametrize(
    ("leaves", "config"),
    [
        ({"lora_A.weight": (2, 8), "lora_B.weight": (12, 2), "bias": ()}, {"bias": "all"}),
        ({"modules_to_save.weight": (12, 8), "modules_to_save.bias": ()}, {"modules_to_save": ["q_proj"]}),
    ],
)
def test_a_single_number_takes_the_place_of_no_bias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    sort = Sort((12, 8), {f"{STEM}.{leaf}": shape for leaf, shape in leaves.items()}, said)
    monkeypatch.setitem(SORTS, "number", sort)  # type: ignore[arg-type]
    merges = [run_verb(tmp_path, "number", 0, verb) for verb in VERBS if verb.startswith("merge")]
    assert all(code == 1 and "is a change of []" in " ".join(words.split()) for code, words in merges), merges


@pytest.mark.parametrize("kind", ["peft ia3", "peft oft", "lora"])
def test_numbers_whose_products_overflow_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_mutant(tmp_path, kind, 0)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    save_file({name: torch.full_like(tensor, 3e38) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(NonFinite, match="q_proj"):
        delta(path, base=tmp_path / "base.safetensors")
    if kind == "lora":
        with pytest.raises(NonFinite, match="q_proj"):
            resize(path, tmp_path / "out", Rule("rank", 1))


def test_a_change_whose_square_overflows_is_refused(tmp_path: Path) -> None:
    path = write_mutant(tmp_path, "peft, saved", 0)
    file = path / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, 1e200, dtype=torch.float64) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(NonFinite, match="q_proj"):
        delta(path, base=tmp_path / "base.safetensors")


def test_of_products_found_together_only_those_that_overflow_are_refused() -> None:
    ordinary, large = torch.ones(8, 2), torch.full((8, 2), 1e300, dtype=torch.float64)
    rule, storage = Rule(method="rank", value=1), Storage(torch.float32)
    one, other = recompress([(ordinary, ordinary.T), (large, large.T)], [rule, rule], [storage, storage])
    assert isinstance(one, StoredFactors)
    assert isinstance(other, NonFinite)


def test_numbers_that_overflow_float64_are_refused_by_name_where_an_adapter_is_edited(tmp_path: Path) -> None:
    path = write_mutant(tmp_path, "lora", 0)
    wide = {name: torch.full_like(tensor, 1e300, dtype=torch.float64) for name, tensor in load_file(path).items()}
    save_file(wide | {f"{FLAT}.alpha": torch.tensor(2.0)}, path)
    with pytest.raises(NonFinite, match="q_proj"):
        edit(path, tmp_path / "out", scale={"*": 2.0})


@given(name=st.sampled_from(sorted(SORTS)), seed=st.integers(1, 2**32), verb=st.sampled_from(VERBS))
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutants_end_in_an_output_or_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run_verb(tmp_path, name, seed, verb)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("loha", {"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 1)}),
        ("loha", {"hada_w1_a": (2, 12), "hada_w1_b": (2, 8), "hada_t1": (1, 2, 3, 3), "hada_w2_a": (2, 12),
                  "hada_w2_b": (2, 8), "hada_t2": (2, 2, 3, 3)}),
        ("lokr", {"lokr_w1": (4, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (1, 4)}),
        ("lokr", {"lokr_w1": (4,), "lokr_w2": (3, 4)}),
        ("glora", {"a1": (8, 2), "a2": (2, 1), "b1": (12, 2), "b2": (2, 8)}),
        ("oft", {"oft_blocks": (6, 2, 3)}),
        ("oft", {"oft_blocks": (6, 2, 2), "rescale": (12, 8)}),
        ("input boft", {"boft_r": (2, 4, 4, 4), "boft_s": (12, 2)}),
        ("adalora", {"loralib_a": (2, 8), "loralib_b": (12, 2), "lora_e": (1, 1)}),
        ("ia3", {"ia3_l": (12, 2)}),
        ("vera", {"vera_lambda_b": (12,), "vera_lambda_d": (1,), "vera_a": (2, 8), "vera_b": (12, 2)}),
    ],
)  # fmt: skip
def test_what_torch_would_broadcast_is_named(kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InvalidAdapter, match="shapes do not fit each other: ") as error:
        require_form(kind, shapes)
    assert all(f"{leaf} {list(shape)}" in str(error.value) for leaf, shape in shapes.items())


def test_a_form_has_each_of_its_kinds_leaves() -> None:
    for kind, forms in FORMS.items():
        for form in forms:
            sizes = {leaf.rstrip("?"): tuple(1 for word in words.split() if word[0] != "*") for leaf, words in form.items()}
            require_form(kind, sizes)
