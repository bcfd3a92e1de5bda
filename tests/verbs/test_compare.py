"""Comparisons against float64 arithmetic on the dense differences; one changed bit is seen, another spelling is not."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratool import (
    LoratoolError,
    Rule,
    WeightedAdapter,
    combine,
    compare,
    compare_to,
    convert,
    merge,
)
from loratool.archs.flux import FLUX1
from loratool.errors import NeedsBase, ShapeMismatch
from loratool.formats.table import FORMATS, format_named
from loratool.numbers.linalg import relation
from loratool.verbs.compare.checkpoints import CheckpointComparison
from loratool.verbs.compare.compare import AdapterComparison, MatrixComparison
from tests.models import kohya, llm, peft_adapter, save
from tests.oracles.test_lycoris import ADDITIVE, OTHERS, train
from tests.verbs.test_combine import dense
from tests.verbs.test_convert import made_for

pytestmark = [pytest.mark.filterwarnings("ignore")]

SHAPES = {"lora_unet_a": (30, 20), "lora_unet_b": (12, 16), "lora_unet_conv": (10, 9, 3, 3)}


def pair(folder: Path, ranks: tuple[int, int] = (3, 5)) -> list[Path]:
    return [save(folder / f"{i}.safetensors", kohya(SHAPES, rank, 2.0 + i, seed=i)) for i, rank in enumerate(ranks)]


def angles(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Principal angles of the column spaces, by SVD of each."""
    bases = []
    for matrix in (one, other):
        left, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
        bases.append(left[:, sigma > 1e-9 * sigma[0]])
    return torch.rad2deg(torch.arccos(torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(-1, 1))).tolist()


@pytest.mark.parametrize("ranks", [(3, 5), (1, 1), (12, 2)])
def test_figures_are_those_of_the_dense_differences(tmp_path: Path, ranks: tuple[int, int]) -> None:
    paths = pair(tmp_path, ranks)
    one, other = map(dense, paths)

    report = compare(paths)

    assert isinstance(report, AdapterComparison)
    assert not report.same
    for module in report.modules:
        a, b = one[module.name].flatten(1), other[module.name].flatten(1)
        assert module.one == pytest.approx(float(a.norm()))
        assert module.other == pytest.approx(float(b.norm()))
        assert module.difference == pytest.approx(float((a - b).norm()))
        assert module.relative == pytest.approx(float((a - b).norm()) / max(float(a.norm()), float(b.norm())))
        assert module.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)
        if sum(ranks) <= min(a.shape):
            assert module.outputs == pytest.approx(angles(a, b), abs=1e-3)
            assert module.inputs == pytest.approx(angles(a.T, b.T), abs=1e-3)
    assert report.difference == pytest.approx(math.hypot(*(float((one[name] - other[name]).norm()) for name in one)))
    inner = sum(float((one[name] * other[name]).sum()) for name in one)
    norms = [math.hypot(*(float(delta.norm()) for delta in each.values())) for each in (one, other)]
    assert report.cosine == pytest.approx(inner / norms[0] / norms[1], abs=1e-6)


def test_angles_between_known_spaces() -> None:
    """At 30 degrees, in one dimension of two; with columns that depend on each other, and zeros."""
    half = math.radians(30)
    up = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]])
    turned = torch.tensor([[1.0, 0], [0, math.cos(half)], [0, math.sin(half)], [0, 0]])
    down = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    expected = pytest.approx([0, 30], abs=1e-3)
    assert relation((up, down), (turned, down)).outputs == expected
    doubled = torch.cat([turned, turned[:, :1]], dim=1), torch.cat([down, down[:1]])
    assert relation((up, down), doubled).outputs == expected
    padded = torch.cat([turned, torch.zeros(4, 3)], dim=1), torch.cat([down, torch.randn(3, 9)])
    found = relation((up, down), padded)
    assert found.outputs == expected
    assert found.inputs == pytest.approx([0, 0], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [None, 0.7])
def test_one_changed_ulp_is_seen(tmp_path: Path, dtype: torch.dtype, alpha: float | None) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in kohya(SHAPES, 4, alpha).items()}
    one = save(tmp_path / "a.safetensors", tensors)
    changed = tensors["lora_unet_a.lora_up.weight"].clone()
    bits = changed.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[7, 2] += 1
    other = save(tmp_path / "b.safetensors", tensors | {"lora_unet_a.lora_up.weight": changed})

    report = compare([one, other], tolerance=0.0)

    assert isinstance(report, AdapterComparison)
    assert not report.same
    assert [module.name for module in report.modules if not module.identical] == ["lora_unet_a"]
    expected = float((dense(one)["lora_unet_a"] - dense(other)["lora_unet_a"]).norm())
    assert report.difference == pytest.approx(expected, rel=1e-3)
    assert report.difference > 0
    assert compare([one, one], tolerance=0.0).same


@pytest.mark.parametrize("name", [row.name for row in FORMATS if row.holds("flux1") and not row.folder])
def test_what_convert_wrote_is_the_same(tmp_path: Path, name: str) -> None:
    tensors = made_for(FLUX1, format_named(name), alpha=3.0)
    source = save(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "b.safetensors"
    convert(source, out, "diffusers", arch="flux1")

    report = compare([source, out], arch="flux1")

    assert report.same
    assert isinstance(report, AdapterComparison)
    assert report.relative < 1e-6
    assert report.norms[0] == pytest.approx(report.norms[1])


@pytest.mark.parametrize("case", [*ADDITIVE, *OTHERS])
def test_kinds_of_all_sorts(tmp_path: Path, case: str) -> None:
    """Against itself, and against its change as a whole difference."""
    train((ADDITIVE | OTHERS)[case], tmp_path)
    assert compare([tmp_path / "a.safetensors"] * 2).same
    merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "merged.safetensors")
    base, merged = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "merged.safetensors")
    leaves = {"weight": {2: "diff", 4: "diff", 3: "diff", 5: "diff", 1: "diff"}, "bias": {1: "diff_b"}}
    whole = {}
    for name, weight in merged.items():
        path, _, parameter = name.rpartition(".")
        if not torch.equal(weight, base[name]):
            whole[f"lora_unet_{path.replace('.', '_')}.{leaves[parameter][weight.ndim]}"] = weight - base[name]
    save(tmp_path / "whole.safetensors", whole)

    options: dict[str, Any] = {"tolerance": 1e-4, "base": tmp_path / "base.safetensors"}
    report = compare([tmp_path / "a.safetensors", tmp_path / "whole.safetensors"], **options)

    assert isinstance(report, AdapterComparison)
    assert report.relative < 1e-4


def test_kinds_that_depend_on_the_weight_need_the_base(tmp_path: Path) -> None:
    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        peft_adapter(copy.deepcopy(model), tmp_path / name, seed, r=4, use_dora=True, target_modules=["q_proj"])

    with pytest.raises(NeedsBase, match="`base=`"):
        compare([tmp_path / "a", tmp_path / "b"])
    same = compare([tmp_path / "a", tmp_path / "a"])
    assert isinstance(same, AdapterComparison)
    assert same.same
    assert same.norms == (None, None)
    report = compare([tmp_path / "a", tmp_path / "b"], base=tmp_path / "base")
    assert isinstance(report, AdapterComparison)
    assert not report.same


def test_modules_that_only_one_has_count(tmp_path: Path) -> None:
    tensors = kohya(SHAPES, 3, 1.0)
    one = save(tmp_path / "a.safetensors", tensors)
    less = {name: tensor for name, tensor in tensors.items() if "_conv" not in name}
    other = save(tmp_path / "b.safetensors", less)

    report = compare([one, other])

    assert isinstance(report, AdapterComparison)
    assert not report.same
    assert report.worst
    assert (report.worst.name, report.worst.other, report.worst.relative) == ("lora_unet_conv", 0.0, 1.0)
    assert report.difference == pytest.approx(float(dense(one)["lora_unet_conv"].norm()))


def test_adapters_for_other_models_are_no_difference_but_an_error(tmp_path: Path) -> None:
    one = save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (30, 20)}, 3, 1.0))
    other = save(tmp_path / "b.safetensors", kohya({"lora_unet_a": (30, 24)}, 3, 1.0))
    with pytest.raises(ShapeMismatch, match="lora_unet_a: changes weights of"):
        compare([one, other])


def test_several_are_compared_each_with_each(tmp_path: Path) -> None:
    paths = [*pair(tmp_path), save(tmp_path / "2.safetensors", kohya(SHAPES, 3, 2.0, seed=0))]
    deltas = [dense(path) for path in paths]

    report = compare(paths)

    assert isinstance(report, MatrixComparison)
    for i, one in enumerate(deltas):
        for j, other in enumerate(deltas):
            gap = math.hypot(*(float((one[name] - other[name]).norm()) for name in one))
            assert report.differences[i][j] == pytest.approx(gap, abs=1e-9)
    assert report.differences[0][2] == 0
    assert report.cosines[0][2] == pytest.approx(1)
    assert not report.same
    assert compare([paths[0], paths[2], paths[0]]).same


def test_checkpoints_tensor_by_tensor(tmp_path: Path) -> None:
    model = llm("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.view(torch.int16)[3, 4] += 2
        model.model.norm.weight *= 2
    model.save_pretrained(tmp_path / "b")

    report = compare([tmp_path / "a", tmp_path / "b"])

    assert isinstance(report, CheckpointComparison)
    assert not report.same
    found = {tensor.name: tensor for tensor in report.different}
    assert found.keys() == {"model.layers.0.mlp.up_proj.weight", "model.norm.weight"}
    assert (found["model.layers.0.mlp.up_proj.weight"].changed, found["model.layers.0.mlp.up_proj.weight"].ulps) == (1, 2)
    assert found["model.norm.weight"].relative == pytest.approx(1.0)
    assert found["model.norm.weight"].cosine == pytest.approx(1.0)
    assert compare([tmp_path / "a", tmp_path / "a"], tolerance=0.0).same


def test_checkpoints_of_two_namings_and_other_shapes(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    save(tmp_path / "a.safetensors", {"model.diffusion_model.x.weight": weight, "y": torch.ones(3), "only": torch.ones(1)})
    save(tmp_path / "b.safetensors", {"model.diffusion_model.x.weight": weight, "y": torch.ones(4), "other": torch.ones(1)})
    report = compare([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert isinstance(report, CheckpointComparison)
    assert [tensor.name for tensor in report.different] == ["y"]
    assert (report.only_one, report.only_other) == (("only",), ("other",))
    assert not report.same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_is_what_it_is_made_of_to_half_a_step(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llm("llama")
    model.to(dtype).save_pretrained(tmp_path / "base")
    peft_adapter(copy.deepcopy(model).float(), tmp_path / "a", r=4, target_modules=["q_proj", "down_proj", "embed_tokens"])
    peft_adapter(copy.deepcopy(model).float(), tmp_path / "b", 5, r=2, use_dora=True, target_modules=["v_proj", "q_proj"])
    sources = [WeightedAdapter(tmp_path / "a", 0.7), WeightedAdapter(tmp_path / "b", -0.4)]
    merge(tmp_path / "base", sources, tmp_path / "merged")

    report = compare_to(tmp_path / "merged", tmp_path / "base", sources)

    assert report.same
    assert report.worst <= 0.5
    assert not compare_to(tmp_path / "merged", tmp_path / "base", [WeightedAdapter(tmp_path / "a", 0.71), sources[1]]).same
    (shard,) = (tmp_path / "merged").glob("*.safetensors")
    tensors = load_file(shard)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    for name, steps in (("model.layers.1.self_attn.q_proj.weight", 40), ("model.norm.weight", 1)):
        spoilt = {key: tensor.clone() for key, tensor in tensors.items()}
        spoilt[name].view(integers).flatten()[-3] += steps
        save_file(spoilt, shard, {"format": "pt"})
        report = compare_to(tmp_path / "merged", tmp_path / "base", sources)
        assert [off.name for off in report.off] == [name]
        assert report.off[0].count == 1
        assert not report.same


def test_a_merge_that_rounded_by_chance_may_be_a_step_off(tmp_path: Path) -> None:
    model = llm("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    peft_adapter(copy.deepcopy(model).float(), tmp_path / "a", r=4, target_modules=["q_proj", "down_proj"])
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged", stochastic=True)

    report = compare_to(tmp_path / "merged", tmp_path / "base", [tmp_path / "a"])

    assert report.same
    assert 0.5 < report.worst <= report.allowed == 1.0


def test_sorts_are_not_mixed(tmp_path: Path) -> None:
    one = save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (30, 20)}, 3, 1.0))
    base = save(tmp_path / "base.safetensors", {"a.weight": torch.randn(30, 20)})
    with pytest.raises(LoratoolError, match="some are adapters"):
        compare([one, base])
    with pytest.raises(LoratoolError, match="two at a time"):
        compare([base, base, base])
    with pytest.raises(LoratoolError, match="two or more"):
        compare([one])


def test_exit_codes_and_sums_on_the_command_line(tmp_path: Path, invoke) -> None:
    paths = pair(tmp_path)
    base = {name.removeprefix("lora_unet_"): shape for name, shape in SHAPES.items()}
    save(tmp_path / "x+y.safetensors", {f"{name}.weight": torch.randn(shape) for name, shape in base.items()})
    invoke("merge", "x+y.safetensors", "0.safetensors:0.5", "1.safetensors", "-o", "m.safetensors")

    same = invoke("compare", paths[0], paths[0])
    assert same.returncode == 0
    assert "every number is the same" in same.stdout
    assert invoke("compare", *paths).returncode == 1
    assert invoke("compare", *paths, "--tol", "2").returncode == 0
    assert invoke("compare", *paths, paths[0], "-q").stdout == ""
    report = json.loads(invoke("compare", *paths, "--json").stdout)
    assert report["same"] is False
    assert len(report["modules"]) == 3
    good = invoke("compare", "m.safetensors", "--to", "x+y.safetensors+0.safetensors:0.5+1.safetensors")
    assert good.returncode == 0
    assert "within half a step" in good.stdout
    assert invoke("compare", "m.safetensors", "--to", "x+y.safetensors+0.safetensors:0.5").returncode == 1
    failed = invoke("compare", "m.safetensors", "--to", "x+y.safetensors")
    assert failed.returncode == 1
    assert "expected BASE+ADAPTER" in failed.stderr
    assert invoke("compare", "m.safetensors", "x+y.safetensors").returncode == 1


def test_another_models_base_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    llm("llama").save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        peft_adapter(llm("llama", hidden_size=64), tmp_path / name, seed, r=4, use_dora=True, target_modules=["q_proj"])
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ShapeMismatch, match="is the base another model"):
        compare(paths, base=tmp_path / "base")
    with pytest.raises(ShapeMismatch, match="is the base another model"):
        combine(paths, tmp_path / "sum", Rule("rank", 4), base=tmp_path / "base")


def test_rows_that_only_one_checkpoint_has_are_missed(tmp_path: Path) -> None:
    """Diffusers' q, k and v are rows of the original's qkv: a checkpoint with q alone lacks the other two."""
    qkv = torch.randn(36, 8, generator=torch.Generator().manual_seed(3))
    stem = "transformer_blocks.0.attn.to_"
    parts = {f"{stem}{name}.weight": rows for name, rows in zip("qkv", qkv.split(12), strict=True)}
    one, whole = tmp_path / "one.safetensors", tmp_path / "whole.safetensors"
    save(whole, {"double_blocks.0.img_attn.qkv.weight": qkv})
    save(one, {name: rows.contiguous() for name, rows in parts.items()})
    assert compare([one, whole]).same
    save(one, {name: rows.contiguous() for name, rows in parts.items() if name.endswith("to_q.weight")})
    report = compare([one, whole])
    assert not report.same
    assert report.only_other == ("double_blocks.0.img_attn.qkv.weight",)
