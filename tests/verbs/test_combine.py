"""Sums of adapters against float64 arithmetic on their dense differences, and merging methods against obvious references."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from loratool import (
    AdapterReport,
    Budget,
    LoratoolError,
    Rule,
    Strength,
    WeightedAdapter,
    combine,
    compare,
    convert,
    edit,
    inspect,
    merge,
)
from loratool.archs.flux import FLUX1
from loratool.deltas.lora import LoRA
from loratool.deltas.methods import core_space, elect_signs, knots_space, merge_deltas, trim_smallest
from loratool.errors import NeedsBase, ShapeMismatch
from loratool.files.adapter_files import open_adapter
from loratool.files.hashes import short_hash
from loratool.files.header import read_header
from loratool.formats.table import format_named
from loratool.verbs.compare.compare import AdapterComparison
from tests.conftest import examples
from tests.models import kohya, llm, lora, peft_adapter, save
from tests.oracles.test_lycoris import ADDITIVE, train
from tests.verbs.test_convert import made_for

pytestmark = [pytest.mark.filterwarnings("ignore")]

Dense = dict[str, torch.Tensor]
SHAPES = {"lora_unet_a": (6, 8), "lora_unet_b": (7, 3), "lora_unet_conv": (5, 4, 3, 3), "lora_te_c": (9, 2, 1, 1)}
SETTINGS = settings(deadline=None, max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])


def dense(path: Path) -> Dense:
    """ΔW of every module of a kohya file, by the definition."""
    tensors = load_file(path)
    found = {}
    for name in tensors:
        if name.endswith(".lora_up.weight"):
            stem = name.removesuffix(".lora_up.weight")
            up, down = tensors[name].double(), tensors[f"{stem}.lora_down.weight"].double()
            alpha = tensors.get(f"{stem}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / len(down)
            found[stem] = scale * torch.einsum("or,ri...->oi...", up.flatten(1), down)
        if name.endswith(".diff"):
            found[name.removesuffix(".diff")] = tensors[name].double()
    return found


def total(parts: list[tuple[Dense, float]]) -> Dense:
    names = {name for deltas, _ in parts for name in deltas}
    return {name: sum(w * deltas[name] for deltas, w in parts if name in deltas) for name in names}  # type: ignore[misc]


def assert_close(got: Dense, expected: Dense, error: float = 1e-6, scale: float = 0.0) -> None:
    assert got.keys() == {name for name, delta in expected.items() if name in got or delta.any()}
    for name, delta in got.items():
        whole = max(scale, float(expected[name].norm()))
        assert float((delta - expected[name]).norm()) <= error * whole, name


ranks = st.integers(1, 5)
adapters = st.tuples(
    st.sets(st.sampled_from(sorted(SHAPES)), min_size=1),
    ranks,
    st.one_of(st.none(), st.sampled_from([1.0, 3.0, -2.0, 0.7])),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from([1.0, 0.7, -0.4, 2.0]),
)


@SETTINGS
@given(st.lists(adapters, min_size=1, max_size=4))
def test_a_sum_is_that_of_the_dense_differences(tmp_path: Path, chosen: list[tuple[Any, ...]]) -> None:
    """Unequal ranks, alpha ≠ rank and none, negative strengths and alphas, convolutions, several dtypes."""
    parts, expected = [], []
    for number, (stems, rank, alpha, dtype, strength) in enumerate(chosen):
        tensors = kohya({stem: SHAPES[stem] for stem in stems}, rank, alpha, seed=number)
        path = save(tmp_path / f"{number}.safetensors", {name: tensor.to(dtype) for name, tensor in tensors.items()})
        parts.append(WeightedAdapter(path, Strength(strength)))
        expected.append((dense(path), strength))

    report = combine(parts, tmp_path / "sum.safetensors", overwrite=True)

    size = max(float(delta.norm()) for deltas, _ in expected for delta in deltas.values())
    assert_close(dense(tmp_path / "sum.safetensors"), total(expected), scale=size)
    assert report.error == 0
    most = {stem: sum(rank for stems, rank, *_ in chosen if stem in stems) for stem in SHAPES}
    assert set(report.ranks) == {rank for rank in most.values() if rank}


def test_equal_down_factors_are_shared(tmp_path: Path) -> None:
    one = kohya({"lora_unet_a": (6, 8)}, 3, 3.0)
    other = {name: tensor if "down" in name else 2 * tensor for name, tensor in one.items()}
    paths = [save(tmp_path / f"{i}.safetensors", tensors) for i, tensors in enumerate((one, other))]

    report = combine(
        [WeightedAdapter(path, Strength(w)) for path, w in zip(paths, (0.5, -0.3), strict=True)],
        tmp_path / "sum.safetensors",
    )

    assert dict(report.ranks) == {3: 1}
    expected = total([(dense(paths[0]), 0.5), (dense(paths[1]), -0.3)])
    assert_close(dense(tmp_path / "sum.safetensors"), expected)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_a_recompressed_sum_is_the_best_at_its_rank(tmp_path: Path, rank: int) -> None:
    shapes = {"lora_unet_a": (30, 20), "lora_unet_conv": (12, 9, 3, 3)}
    paths = [save(tmp_path / f"{i}.safetensors", kohya(shapes, 2 + i, 1.0, seed=i)) for i in range(3)]
    expected = total([(dense(path), weight) for path, weight in zip(paths, (0.7, -0.4, 1.1), strict=True)])
    parts = [WeightedAdapter(path, Strength(weight)) for path, weight in zip(paths, (0.7, -0.4, 1.1), strict=True)]

    report = combine(parts, tmp_path / "sum.safetensors", Rule("rank", rank))

    got = dense(tmp_path / "sum.safetensors")
    for module in report.lowered:
        sigma = torch.linalg.svdvals(expected[module.name].flatten(1))
        left = float((expected[module.name] - got[module.name]).norm())
        assert module.rank == min(rank, 9)
        assert left <= float(sigma[rank:].norm()) * 1.001 + 1e-6 * float(sigma.norm())
        assert module.error * module.norm == pytest.approx(left, rel=1e-2, abs=2e-6 * module.norm)


@pytest.mark.parametrize("size", [4_000, 9_000])
def test_a_budget_is_never_exceeded(tmp_path: Path, size: int) -> None:
    shapes = {f"lora_unet_{i}": (20 + i, 30) for i in range(5)}
    paths = [save(tmp_path / f"{i}.safetensors", kohya(shapes, 4, 1.0, seed=i)) for i in range(2)]

    report = combine(paths, tmp_path / "sum.safetensors", Budget(nbytes=size))

    written = (tmp_path / "sum.safetensors").stat().st_size
    assert size - 4 * (24 + 30) <= written <= size
    assert report.nbytes == written


def test_formats_may_differ(tmp_path: Path) -> None:
    """The same adapter in five formats, at strengths that come to nothing: q, k and v stacked in some of them."""
    tensors = made_for(FLUX1, format_named("kohya"), alpha=3.0)
    save(tmp_path / "kohya.safetensors", tensors)
    for name in ("diffusers", "comfyui", "onetrainer", "ai-toolkit"):
        convert(tmp_path / "kohya.safetensors", tmp_path / f"{name}.safetensors", name, arch="flux1")
    strengths = {"kohya": 1.5, "diffusers": -1.0, "comfyui": 0.75, "onetrainer": -0.25, "ai-toolkit": -1.0}
    parts = [WeightedAdapter(tmp_path / f"{name}.safetensors", Strength(weight)) for name, weight in strengths.items()]

    combine(parts, tmp_path / "sum.safetensors", arch="flux1")

    whole = dense(tmp_path / "kohya.safetensors")
    left = dense(tmp_path / "sum.safetensors")
    assert left.keys() == whole.keys()
    for name, delta in left.items():
        assert float(delta.norm()) <= 1e-6 * float(whole[name].norm())


def test_peft_adapters_with_rslora_and_unlike_ranks(tmp_path: Path) -> None:
    """PEFT's own sum takes √r times too much here."""
    import peft

    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    peft_adapter(
        copy.deepcopy(model), tmp_path / "a", 1, r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"]
    )
    peft_adapter(
        copy.deepcopy(model), tmp_path / "b", 2, r=3, lora_alpha=1, target_modules=["q_proj", "down_proj", "lm_head"]
    )

    parts = [WeightedAdapter(tmp_path / "a", Strength(0.7)), WeightedAdapter(tmp_path / "b", Strength(-0.4))]
    # PEFT stores a copy of a head beside its LoRA.
    combine(parts, tmp_path / "sum", base=tmp_path / "base")

    def weights(name: str) -> dict[str, torch.Tensor]:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / name)
        return dict(loaded.merge_and_unload().state_dict())

    base, a, b, got = model.state_dict(), weights("a"), weights("b"), weights("sum")
    for name, weight in base.items():
        expected = weight + 0.7 * (a[name] - weight) - 0.4 * (b[name] - weight)
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False if "use_rslora" in config else True
    assert (
        config["base_model_name_or_path"]
        == json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )


@pytest.mark.parametrize("biased", [False, True])
def test_embeddings_biases_and_saved_modules(tmp_path: Path, biased: bool) -> None:
    """PEFT has no bias beside an embedding's LoRA."""
    import peft

    model = llm("qwen2")
    model.save_pretrained(tmp_path / "base")
    first = "k_proj" if biased else "embed_tokens"
    configs: dict[str, dict[str, Any]] = {
        "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", first]},
        "b": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["norm"],
            "lora_bias": biased,
        },
        "c": {"r": 2, "lora_alpha": 2, "target_modules": [first], "lora_bias": False},
    }
    for seed, (name, config) in enumerate(configs.items()):
        peft_adapter(copy.deepcopy(model), tmp_path / name, seed, **config)

    parts = [
        WeightedAdapter(tmp_path / "a", Strength(0.5)),
        WeightedAdapter(tmp_path / "b"),
        WeightedAdapter(tmp_path / "c", Strength(2.0)),
    ]
    combine(parts, tmp_path / "sum", base=tmp_path / "base")

    def weights(name: str) -> dict[str, torch.Tensor]:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / name)
        return {key: tensor.clone() for key, tensor in loaded.merge_and_unload().state_dict().items()}

    base, each, got = model.state_dict(), [weights(name) for name in "abc"], weights("sum")
    for name, weight in base.items():
        if "lm_head" not in name:
            expected = weight + sum(w * (one[name] - weight) for w, one in zip((0.5, 1.0, 2.0), each, strict=True))
            torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", ["loha", "lokr", "full", "lora, tucker" if "lora, tucker" in ADDITIVE else "loha"])
def test_kinds_may_differ(tmp_path: Path, case: str) -> None:
    train(ADDITIVE[case], tmp_path)
    base = load_file(tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "one.safetensors")
    changed = load_file(tmp_path / "one.safetensors")
    shapes = {
        f"lora_unet_{name.removesuffix('.weight')}": tuple(tensor.shape) for name, tensor in base.items() if tensor.ndim > 1
    }
    save(tmp_path / "b.safetensors", kohya(shapes, 2, 1.0))
    merge(tmp_path / "base.safetensors", [tmp_path / "b.safetensors"], tmp_path / "two.safetensors")
    other = load_file(tmp_path / "two.safetensors")

    combine(
        [WeightedAdapter(tmp_path / "a.safetensors", Strength(0.6)), tmp_path / "b.safetensors"],
        tmp_path / "sum.safetensors",
    )

    merge(tmp_path / "base.safetensors", [tmp_path / "sum.safetensors"], tmp_path / "got.safetensors")
    got = load_file(tmp_path / "got.safetensors")
    for name, weight in base.items():
        expected = weight + 0.6 * (changed[name] - weight) + (other[name] - weight)
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5)


def test_kinds_that_depend_on_the_weight_need_the_base(tmp_path: Path) -> None:
    import peft

    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    peft_adapter(copy.deepcopy(model), tmp_path / "dora", 1, r=4, use_dora=True, target_modules=["q_proj"])
    peft_adapter(copy.deepcopy(model), tmp_path / "lora", 2, r=2, target_modules=["q_proj", "v_proj"])
    parts = [WeightedAdapter(tmp_path / "dora", Strength(0.5)), WeightedAdapter(tmp_path / "lora")]

    with pytest.raises(NeedsBase, match="`base=`"):
        combine(parts, tmp_path / "sum", Rule("rank", 16))
    assert not (tmp_path / "sum").exists()

    # PEFT has no place for a whole difference: without a rule, too, it becomes a LoRA of as much rank as there is.
    options: dict[str, Any] = {"base": tmp_path / "base"}
    assert combine(parts, tmp_path / "exact", **options).error < 1e-5
    report = combine(parts, tmp_path / "sum", Rule("rank", 32), **options)

    assert report.error < 1e-5
    assert compare([tmp_path / "exact", tmp_path / "sum"], tolerance=1e-5).same
    weights = [
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / name).merge_and_unload().state_dict()
        for name in ("dora", "lora", "sum")
    ]
    for name, weight in model.state_dict().items():
        dora, plain, got = (one[name] for one in weights)
        torch.testing.assert_close(got, weight + 0.5 * (dora - weight) + plain - weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_stacked_experts_are_summed_compared_and_edited(tmp_path: Path, parameters: list[str]) -> None:
    import peft

    model = llm("qwen3_moe")
    both = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    named = [f"mlp.experts.{name}" for name in parameters]
    peft_adapter(
        copy.deepcopy(model), tmp_path / "a", 1, r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=both
    )
    peft_adapter(
        copy.deepcopy(model), tmp_path / "b", 2, r=3, lora_alpha=2, target_modules=["q_proj"], target_parameters=named
    )

    combine(
        [WeightedAdapter(tmp_path / "a", Strength(0.7)), WeightedAdapter(tmp_path / "b", Strength(-0.5))], tmp_path / "sum"
    )
    edit(tmp_path / "sum", tmp_path / "half", scale=(("*", 0.5),), drop=("*layers.1.*",))

    def weights(name: str) -> dict[str, torch.Tensor]:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / name)
        return dict(loaded.merge_and_unload().state_dict())

    base, a, b, got, half = model.state_dict(), *map(weights, ("a", "b", "sum", "half"))
    for key, weight in base.items():
        change = 0.7 * (a[key] - weight) - 0.5 * (b[key] - weight)
        torch.testing.assert_close(got[key], weight + change, rtol=1e-5, atol=2e-6)
        factor = 0.0 if "layers.1." in key else 0.5
        torch.testing.assert_close(half[key], weight + factor * change, rtol=1e-5, atol=2e-6)
    report = compare([tmp_path / "a", tmp_path / "sum"])
    assert isinstance(report, AdapterComparison)
    assert report.relative > 0
    assert compare([tmp_path / "sum", tmp_path / "sum"]).same


def ties_of(deltas: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    """TIES, number by number."""
    kept = []
    for delta in deltas:
        flat = delta.flatten()
        order = sorted(range(len(flat)), key=lambda i: -abs(float(flat[i])))[: int(density * len(flat))]
        kept.append([float(flat[i]) if i in set(order) else 0.0 for i in range(len(flat))])
    result = []
    for numbers in zip(*kept, strict=True):
        weighted = [w * number for w, number in zip(weights, numbers, strict=True)]
        sign = 1 if sum(weighted) >= 0 else -1
        agreeing = [number for number in weighted if number * sign > 0]
        result.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(result, dtype=torch.float64).reshape(deltas[0].shape)


def some_loras(count: int = 3) -> list[LoRA]:
    generator = torch.Generator().manual_seed(5)
    made = [lora((9, 7), 2 + i, generator) for i in range(count)]
    return [LoRA(leaves["lora_down.weight"], leaves["lora_up.weight"], None, 0.5 + i) for i, leaves in enumerate(made)]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_equals_a_dense_reference(density: float) -> None:
    terms, weights = some_loras(), [0.7, 0.4, -1.2]
    found = merge_deltas(terms, weights, method="ties", density=density, seeds=["", "", ""]).dense()
    torch.testing.assert_close(
        found.double(), ties_of([term.dense() for term in terms], weights, density), rtol=1e-5, atol=1e-7
    )


def test_ties_equals_pefts_where_weights_are_equal() -> None:
    from peft.utils.merge_utils import ties

    terms = some_loras()
    found = merge_deltas(terms, [0.6] * 3, method="ties", density=0.4, seeds=["", "", ""]).dense()
    theirs = ties([term.dense() for term in terms], torch.tensor([0.6] * 3), 0.4)
    torch.testing.assert_close(found, theirs)


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_dare_equals_a_dense_reference_and_its_seed(method: str) -> None:
    from hashlib import sha256

    terms, weights, density = some_loras(), [0.7, 0.4, -1.2], 0.5
    found = merge_deltas(terms, weights, method=method, density=density, seeds=["1", "2", "3"]).dense()

    weighted = []
    for term, weight, seed in zip(terms, weights, "123", strict=True):
        chance = torch.Generator().manual_seed(int.from_bytes(sha256(seed.encode()).digest()[:8], "little") >> 1)
        mask = torch.rand(9, 7, generator=chance) < density
        weighted.append(weight * mask * term.dense() / density)
    expected = sum(weighted) if method == "dare" else ties_of(weighted, [1.0] * 3, 1.0).float()
    torch.testing.assert_close(found, expected)
    assert not torch.equal(
        found, merge_deltas(terms, weights, method=method, density=density, seeds=["1", "2", "4"]).dense()
    )


def test_dare_keeps_the_sum_on_average() -> None:
    terms = some_loras(2)
    mean = (
        sum(
            merge_deltas(terms, [1.0, 1.0], method="dare", density=0.3, seeds=[f"a{i}", f"b{i}"]).dense()
            for i in range(4000)
        )
        / 4000
    )
    whole = terms[0].dense() + terms[1].dense()
    assert float((mean - whole).norm() / whole.norm()) < 0.1  # type: ignore[union-attr]


@pytest.mark.parametrize("space", [knots_space, core_space])
def test_sums_in_small_coordinates_are_the_sum(space: Any) -> None:
    terms = some_loras()
    coordinates, back = space(terms)
    found = back(sum(coordinates))
    torch.testing.assert_close(found.dense(), sum(term.dense() for term in terms), rtol=1e-4, atol=1e-6)
    assert all(matrix.shape[0] <= 9 for matrix in coordinates)


def test_knots_equals_its_definition() -> None:
    """On the SVD of all differences side by side."""
    terms, weights = some_loras(), [0.7, 0.4, -1.2]
    whole = torch.cat([term.dense().double() for term in terms], dim=1)
    left, sigma, right = torch.linalg.svd(whole, full_matrices=False)
    kept = sigma > 1e-6 * sigma[0]
    parts = torch.split((sigma[kept, None] * right[kept]).float(), 7, dim=1)
    sparse = torch.stack([w * trim_smallest(part, 0.5, torch.Generator()) for w, part in zip(weights, parts, strict=True)])
    expected = left[:, kept].float() @ elect_signs(sparse)

    found = merge_deltas(terms, weights, method="knots", density=0.5, seeds=["", "", ""])

    torch.testing.assert_close(found.dense(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "knots", "core"])
def test_one_adapter_alone_keeps_its_strength(method: str) -> None:
    term = some_loras(1)[0]
    found = merge_deltas([term], [-0.6], method=method, density=1.0, seeds=[""])
    torch.testing.assert_close(found.dense(), -0.6 * term.dense(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties", "knots", "core"])
def test_methods_write_adapters_that_are_the_same_each_time(tmp_path: Path, method: str) -> None:
    shapes = {"lora_unet_a": (30, 20), "lora_unet_conv": (12, 9, 3, 3)}
    paths = [save(tmp_path / f"{i}.safetensors", kohya(shapes, 3, 1.0, seed=i)) for i in range(2)]
    options: dict[str, Any] = {"method": method, "density": 0.4, "seed": 7}
    for name in ("x", "y"):
        combine(paths, tmp_path / f"{name}.safetensors", Rule("rank", 20), **options)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    assert {tuple(delta.shape) for delta in dense(tmp_path / "x.safetensors").values()} == set(shapes.values())


def test_dense_methods_ask_for_a_rank(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (30, 20)}, 3, 1.0))
    with pytest.raises(LoratoolError, match="full rank"):
        combine([path, path], tmp_path / "b.safetensors", method="ties")


def test_parts_have_strengths_of_their_own(tmp_path: Path) -> None:
    stems = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (8, 2048),
        "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_k": (8, 2048),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 6),
    }
    path = save(tmp_path / "a.safetensors", kohya(stems, 2, 1.0))
    before = dense(path)
    vector = (0.5, 2.0, *[1.0] * 4, -1.0, *[1.0] * 5)

    for strength, factors in (
        (Strength(3.0, vector), (6.0, -3.0, 1.5)),
        (Strength(1.0, (), {"te1": 0.0, "IN*": 2.0}), (2.0, 1.0, 0.0)),
        (Strength(1.0, (), {"unet": 0.5, "OUT00": 4.0}), (0.5, 2.0, 1.0)),
    ):
        combine([WeightedAdapter(path, strength)], tmp_path / "b.safetensors", arch="sdxl", overwrite=True)
        after = dense(tmp_path / "b.safetensors")
        for stem, factor in zip(stems, factors, strict=True):
            torch.testing.assert_close(after.get(stem, 0 * before[stem]), factor * before[stem])
    with pytest.raises(LoratoolError, match="12 or 20"):
        combine([WeightedAdapter(path, Strength(1.0, (1.0,) * 17))], tmp_path / "c.safetensors", arch="sdxl")
    with pytest.raises(LoratoolError, match="MID: no module"):
        combine([WeightedAdapter(path, Strength(1.0, (), {"MID": 2.0}))], tmp_path / "c.safetensors", arch="sdxl")


def test_adapters_for_other_models_are_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (30, 20)}, 3, 1.0))
    other = save(tmp_path / "b.safetensors", kohya({"lora_unet_a": (30, 24)}, 3, 1.0))
    with pytest.raises(ShapeMismatch, match=r"lora_unet_a: is changed as \(30, 20\) and as \(30, 24\)"):
        combine([one, other], tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_adapters_for_two_architectures_are_refused(tmp_path: Path) -> None:
    one = {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (8, 768)}
    other = {"lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (8, 2048)}
    paths = [save(tmp_path / f"{i}.safetensors", kohya(stems, 2, 1.0)) for i, stems in enumerate((one, other))]
    mixed = save(tmp_path / "x.safetensors", kohya({"lora_unet_double_blocks_0_img_attn_qkv": (8, 6)}, 2, 1.0))
    for pair in ([paths[0], mixed], [paths[1], mixed]):
        with pytest.raises(LoratoolError, match="no one model has the modules of all"):
            combine(pair, tmp_path / "sum.safetensors")
        with pytest.raises(LoratoolError, match="no one model has the modules of all"):
            compare(pair)
    assert not (tmp_path / "sum.safetensors").exists()


def test_metadata_is_what_all_say_and_where_it_comes_from(tmp_path: Path) -> None:
    common = {"ss_base_model_version": "sdxl_base", "ss_network_module": "networks.lora", "ss_network_dim": "3"}
    one = save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (30, 20)}, 3, 1.0), **common, ss_tag="x")
    other = save(tmp_path / "b.safetensors", kohya({"lora_unet_a": (30, 20)}, 2, 1.0), **common, ss_tag="y")

    combine([WeightedAdapter(one, Strength(0.5)), other], tmp_path / "c.safetensors")

    metadata = read_header(tmp_path / "c.safetensors").metadata
    assert metadata["ss_base_model_version"] == "sdxl_base"
    assert metadata["ss_network_dim"] == "5"
    assert "ss_tag" not in metadata
    history = json.loads(metadata["loratool"])
    assert history["command"] == "combine"
    assert history["adapters"] == [
        {
            "name": f"{name}.safetensors",
            "autov3": short_hash(open_adapter(tmp_path / f"{name}.safetensors")),
            "strength": strength,
        }
        for name, strength in (("a", 0.5), ("b", 1.0))
    ]


def test_a_dtype_costs_what_is_printed(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.safetensors", kohya({"lora_unet_a": (30, 20)}, 3, 1.0, seed=i)) for i in range(2)]

    report = combine([WeightedAdapter(paths[0], Strength(0.7)), paths[1]], tmp_path / "c.safetensors", dtype="float16")

    expected = total([(dense(paths[0]), 0.7), (dense(paths[1]), 1.0)])["lora_unet_a"]
    left = float((dense(tmp_path / "c.safetensors")["lora_unet_a"] - expected).norm() / expected.norm())
    assert 1e-5 < report.error == pytest.approx(left, rel=1e-2)
    assert set(report.dtypes) == {"float16"}


def test_combine_on_the_command_line(tmp_path: Path, invoke) -> None:
    save(tmp_path / "a:b.safetensors", kohya({"lora_unet_a": (30, 20)}, 3, 1.0))
    save(tmp_path / "b.safetensors", kohya({"lora_unet_a": (30, 20)}, 2, 1.0))

    done = invoke("combine", "a:b.safetensors", "b.safetensors:-0.5:unet=2", "-o", "c.safetensors", "--json")

    report = json.loads(done.stdout)
    assert report["adapters"] == [["a:b.safetensors", 1.0], ["b.safetensors", -0.5]]
    expected = total([(dense(tmp_path / "a:b.safetensors"), 1.0), (dense(tmp_path / "b.safetensors"), -1.0)])
    assert_close(dense(tmp_path / "c.safetensors"), expected)
    for words, message in (
        (["b.safetensors:1:x,y"], "behind the last colon"),
        (["b.safetensors:1:te1=2"], "te1: no module"),
        (["b.safetensors:nan"], "not a finite number"),
    ):
        failed = invoke("combine", *words, "-o", "d.safetensors")
        assert failed.returncode == 1
        assert message in failed.stderr
    assert not (tmp_path / "d.safetensors").exists()


def test_inspect_says_that_it_was_combined(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.safetensors", kohya({"lora_unet_a": (30, 20)}, 3, 1.0, seed=i)) for i in range(2)]
    combine(paths, tmp_path / "c.safetensors")
    report = inspect(tmp_path / "c.safetensors")
    assert isinstance(report, AdapterReport)
    assert report.trainer == "several: combined by loratool"
