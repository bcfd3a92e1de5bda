"""Any kind as LoRA: equal to the original at full rank, off by exactly the error that is stated below it."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratool import Budget, Checkpoint, LoratoolError, Rule, frontier, load, merge, resize, to_lora
from loratool.cli.options import STEPS
from loratool.errors import NeedsBase, Unsupported
from tests.models import kohya, llm, peft_adapter, save
from tests.oracles.test_lycoris import ADDITIVE, OTHERS, train

pytestmark = [pytest.mark.filterwarnings("ignore")]

LYCORIS = {name: config for name, config in (ADDITIVE | OTHERS).items() if name != "scalar"}


def merged(folder: Path, adapter: str) -> dict[str, torch.Tensor]:
    merge(folder / "base.safetensors", [folder / adapter], folder / f"merged-{adapter}")
    return load_file(folder / f"merged-{adapter}")


@pytest.mark.parametrize("case", LYCORIS)
def test_nothing_is_lost_where_no_rank_is_asked_for(tmp_path: Path, case: str) -> None:
    train(LYCORIS[case], tmp_path)

    report = to_lora(tmp_path / "a.safetensors", tmp_path / "lora.safetensors", base=tmp_path / "base.safetensors")

    expected, got = merged(tmp_path, "a.safetensors"), merged(tmp_path, "lora.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert report.error < 1e-3


@pytest.mark.parametrize("case", ["loha", "lokr", "full", "lora, dora on input", "boft", "glora"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_stated_error_is_the_true_one_and_the_least(tmp_path: Path, case: str, rank: int) -> None:
    train(LYCORIS[case], tmp_path)
    base = load_file(tmp_path / "base.safetensors")

    report = to_lora(
        tmp_path / "a.safetensors", tmp_path / "lora.safetensors", Rule("rank", rank), base=tmp_path / "base.safetensors"
    )

    whole, low = merged(tmp_path, "a.safetensors"), merged(tmp_path, "lora.safetensors")
    assert report.modules
    for module in report.modules:
        name = f"{module.name.removeprefix('lora_unet_')}.weight"
        wanted = (whole[name] - base[name]).double().flatten(1)
        left = float((wanted - (low[name] - base[name]).double().flatten(1)).norm())
        best = float(torch.linalg.svdvals(wanted)[rank:].norm())
        assert module.rank == min(rank, *wanted.shape)
        assert module.norm == pytest.approx(float(wanted.norm()), rel=1e-3)
        assert module.error * module.norm == pytest.approx(left, rel=1e-2, abs=2e-4)
        assert left <= best * 1.001 + 2e-4


def test_a_largest_error_is_kept_by_every_module_with_the_least_rank(tmp_path: Path) -> None:
    train(LYCORIS["full"], tmp_path)

    report = to_lora(tmp_path / "a.safetensors", tmp_path / "lora.safetensors", Rule("max_error", 0.3))

    diffs = {name: tensor for name, tensor in load_file(tmp_path / "a.safetensors").items() if name.endswith(".diff")}
    for module in report.modules:
        sigma = torch.linalg.svdvals(diffs[f"{module.name}.diff"].double().flatten(1))
        shares = [float(sigma[rank:].norm() / sigma.norm()) for rank in range(len(sigma) + 1)]
        assert module.error <= 0.3
        assert module.rank == next(rank for rank, share in enumerate(shares) if share <= 0.3)


def test_kinds_that_need_the_base_ask_for_it(tmp_path: Path) -> None:
    train(LYCORIS["diag-oft"], tmp_path)

    with pytest.raises(NeedsBase, match="`base=`"):
        to_lora(tmp_path / "a.safetensors", tmp_path / "lora.safetensors", Rule("rank", 2))

    assert not (tmp_path / "lora.safetensors").exists()


def test_what_is_lora_already_keeps_its_bytes_and_metadata_stays_true(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in kohya({"lora_unet_a": (8, 6), "lora_unet_b": (4, 4)}, 2, 1.5).items()}
    tensors |= {"lora_unet_c.diff": torch.randn(5, 7), "bundle_emb.x.string_to_param.*": torch.ones(2, 3)}
    save(
        tmp_path / "a.safetensors",
        tensors,
        ss_network_module="lycoris.kohya",
        ss_network_dim="2",
        sshs_model_hash="0",
        note="mine",
    )

    report = to_lora(tmp_path / "a.safetensors", tmp_path / "lora.safetensors", Rule("rank", 3))

    written = load_file(tmp_path / "lora.safetensors")
    assert report.kept == 2
    for name in tensors:
        if not name.startswith("lora_unet_c"):
            assert torch.equal(written[name], tensors[name])
    from loratool.files.header import read_header

    metadata = read_header(tmp_path / "lora.safetensors").metadata
    assert metadata["note"] == "mine"
    assert metadata["ss_network_module"] == "networks.lora"
    raw = (tmp_path / "lora.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(raw[8 + header :]).hexdigest()


TUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 6, "target_modules": ["q_proj", "down_proj"]}),
    "LoKr": ("LoKrConfig", {"r": 4, "alpha": 2, "target_modules": ["q_proj", "v_proj"]}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "DoRA, embedding": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["embed_tokens"]}),
    "VeRA": ("VeraConfig", {"r": 8, "target_modules": ["q_proj"]}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "target_modules": ["q_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("tuner", TUNERS)
def test_peft_loads_what_was_written_and_merges_the_same(tmp_path: Path, tuner: str) -> None:
    import peft

    name, config = TUNERS[tuner]
    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    peft_adapter(copy.deepcopy(model), tmp_path / "adapter", kind=getattr(peft, name), **config)

    to_lora(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "base")

    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "expected")
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    loaded.merge_and_unload().save_pretrained(tmp_path / "oracle")
    merge(tmp_path / "base", [tmp_path / "lora"], tmp_path / "ours")
    expected, theirs, ours = (Checkpoint(tmp_path / folder) for folder in ("expected", "oracle", "ours"))
    for key, tensor in expected.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)


def test_a_bias_that_ia3_multiplies_is_not_dropped_silently(tmp_path: Path) -> None:
    import peft

    model = llm("qwen2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    config = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    peft_adapter(model, tmp_path / "adapter", kind=peft.IA3Config, **config)

    with pytest.raises(Unsupported, match="bias"):
        to_lora(tmp_path / "adapter", tmp_path / "lora", Rule("rank", 2), base=tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 6])
def test_resizing_is_the_best_approximation_in_the_dtype_it_had(tmp_path: Path, dtype: torch.dtype, rank: int) -> None:
    shapes = {"lora_unet_fc": (20, 12), "lora_unet_conv": (8, 6, 3, 3)}
    tensors = {name: tensor.to(dtype) for name, tensor in kohya(shapes, 6, 4.0).items()}
    save(tmp_path / "a.safetensors", tensors)

    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Rule("rank", rank))

    written = load_file(tmp_path / "b.safetensors")
    for module in report.modules:
        down, up = (tensors[f"{module.name}.lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
        delta = 4.0 / 6 * up @ down
        low = written[f"{module.name}.lora_up.weight"].double().flatten(1) @ written[
            f"{module.name}.lora_down.weight"
        ].double().flatten(1)
        best = float(torch.linalg.svdvals(delta)[rank:].norm())
        assert written[f"{module.name}.lora_up.weight"].dtype == dtype
        assert float(written[f"{module.name}.alpha"]) == rank == module.rank
        assert module.error * module.norm == pytest.approx(float((delta - low).norm()), rel=1e-3, abs=1e-5)
        assert float((delta - low).norm()) <= best + 10 * torch.finfo(dtype).eps * float(delta.norm())


def test_resizing_a_peft_folder_rewrites_its_config(tmp_path: Path) -> None:
    from peft import PeftModel

    model = llm("llama")
    model.save_pretrained(tmp_path / "base")
    config = {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "embed_tokens"]}
    peft_adapter(copy.deepcopy(model), tmp_path / "adapter", **config)

    resize(tmp_path / "adapter", tmp_path / "small", Rule("rank", 2))

    PeftModel.from_pretrained(model, tmp_path / "small").merge_and_unload().save_pretrained(tmp_path / "oracle")
    merge(tmp_path / "base", [tmp_path / "small"], tmp_path / "ours")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "whole")
    theirs, ours, whole = (Checkpoint(tmp_path / folder) for folder in ("oracle", "ours", "whole"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
    # The embedding's LoRA is kept, at the scale that rsLoRA gave it.
    torch.testing.assert_close(ours["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])


def test_a_bias_of_a_rewritten_module_keeps_its_strength(tmp_path: Path) -> None:
    model = llm("qwen2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", r=4, lora_alpha=12, lora_bias=True, target_modules=["q_proj", "v_proj"])

    resize(tmp_path / "adapter", tmp_path / "same", Rule("rank", 4))

    for adapter, out in (("adapter", "expected"), ("same", "ours")):
        merge(tmp_path / "base", [tmp_path / adapter], tmp_path / out)
    expected, ours = Checkpoint(tmp_path / "expected"), Checkpoint(tmp_path / "ours")
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [Rule("energy", 0.9), Rule("sv_ratio", 2), Rule("sv_fro", 0.9), Rule("sv_cumulative", 0.7), Rule("max_error", 0.2)],
)
def test_every_rule_of_resize_keeps_the_least_rank(tmp_path: Path, rule: Rule) -> None:
    """By the singular values of the products, multiplied out."""
    save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (60, 50), "lora_unet_conv": (20, 8, 3, 3)}, 12, 6.0))

    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rule)

    before = {
        str(change.module): change.delta.dense().double().flatten(1) for change in load(tmp_path / "a.safetensors").changes
    }
    for module in report.modules:
        sigma = torch.linalg.svdvals(before[module.name])
        squares, sums = sigma.square().cumsum(0) / sigma.square().sum(), sigma.cumsum(0) / sigma.sum()
        expected = {
            "energy": int((squares < 0.9).sum()) + 1,
            "sv_ratio": int((sigma > sigma[0] / 2).sum()),
            "sv_fro": int((squares < 0.81).sum()) + 1,
            "sv_cumulative": int((sums < 0.7).sum()) + 1,
            "max_error": int((squares < 0.96).sum()) + 1,
        }
        assert module.rank == expected[rule.method]


@pytest.mark.parametrize("size", [8_000, 20_000, 60_000, 10**6])
@pytest.mark.parametrize("dtype", ["float16", None])
def test_a_resized_file_is_never_larger_than_asked(tmp_path: Path, size: int, dtype: str | None) -> None:
    shapes = {f"lora_unet_{i}": (60 + 20 * i, 50) for i in range(8)} | {"lora_unet_conv": (20, 8, 3, 3)}
    save(tmp_path / "a.safetensors", kohya(shapes, 12, 6.0), ss_network_module="networks.lora", ss_network_dim="12")
    if size == 8_000:
        rule = Budget(nbytes=size, least=1)
        resize(tmp_path / "a.safetensors", tmp_path / "least.safetensors", replace(rule, nbytes=size * 10), dtype=dtype)

    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Budget(nbytes=size), dtype=dtype)

    written = (tmp_path / "b.safetensors").stat().st_size
    assert report.nbytes == written <= size
    one_step = (60 + 20 * 7 + 50) * (2 if dtype else 4) + 500  # and the names of a module that had nothing yet
    assert written > size - one_step or all(module.rank == 12 for module in report.modules)


def test_a_budget_is_better_spent_than_one_rank_for_all(tmp_path: Path) -> None:
    shapes = {f"lora_unet_{i}": (60 + 40 * i, 50) for i in range(8)}
    tensors = kohya(shapes, 12, 6.0)
    for name, tensor in tensors.items():  # modules of unlike weight
        tensors[name] = tensor * (1 + int(name[10])) if "up" in name else tensor
    save(tmp_path / "a.safetensors", tensors)

    uniform = resize(tmp_path / "a.safetensors", tmp_path / "u.safetensors", Rule("rank", 4))
    shared = resize(tmp_path / "a.safetensors", tmp_path / "s.safetensors", Budget(nbytes=uniform.nbytes))

    assert shared.error < 0.95 * uniform.error


@pytest.mark.parametrize("error", [0.1, 0.5])
@pytest.mark.parametrize("case", ["loha", "lora, dora on input"])
def test_a_total_error_is_met_by_what_is_stored(tmp_path: Path, case: str, error: float) -> None:
    train(LYCORIS[case], tmp_path)
    base = load_file(tmp_path / "base.safetensors")

    report = resize(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        Budget(error=error),
        base=tmp_path / "base.safetensors",
        dtype="bfloat16",
    )

    whole, low = merged(tmp_path, "a.safetensors"), merged(tmp_path, "b.safetensors")
    wrong = sum(float((whole[name].double() - low[name].double()).square().sum()) for name in base)
    norm = sum(float((whole[name].double() - base[name].double()).square().sum()) for name in base)
    assert report.error == pytest.approx((wrong / norm) ** 0.5, rel=1e-2)
    assert report.error <= error


def test_kohyas_names_for_the_rules(tmp_path: Path, invoke) -> None:
    save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (60, 50)}, 12, 6.0))
    ours = invoke("resize", "a.safetensors", "-o", "b.safetensors", "--keep", "sv_fro=0.8", "--max-rank", 5, "--json")
    theirs = invoke(
        "resize",
        "a.safetensors",
        "-o",
        "c.safetensors",
        "--dynamic-method",
        "sv_fro",
        "--dynamic-param",
        "0.8",
        "--rank",
        5,
        "--json",
    )
    assert json.loads(ours.stdout)["modules"] == json.loads(theirs.stdout)["modules"]
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    for words in (["--dynamic-method", "sv_fro"], ["--auto"], [], ["--rank", "3", "--energy", "90%"]):
        assert invoke("resize", "a.safetensors", "-o", "d.safetensors", *words).returncode == 2


@pytest.mark.parametrize(
    ("rule", "ranks"),
    [
        (Rule("rank", 3, steps=STEPS["vllm"]), {8}),
        (Rule("rank", 3, steps=STEPS["pow2"]), {4}),
        (Rule("rank", 5, steps=(6, 9), pad=True), {6}),
        (Rule("rank", 9, pad=True), {9}),
        (Rule("rank", 9), {8}),
        (Rule("max_error", 0.999, steps=(4, 8), pad=True), {4}),
    ],
)
def test_ranks_are_raised_to_what_a_server_allows(tmp_path: Path, rule: Rule, ranks: set[int]) -> None:
    """More of the spectrum is kept where there is more, zeros are added where there is not and they are asked for."""
    tensors = kohya({"lora_unet_a": (30, 20), "lora_unet_b": (12, 16)}, 8, 2.0)
    save(tmp_path / "a.safetensors", tensors)

    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rule)

    written = load_file(tmp_path / "b.safetensors")
    assert {len(written[f"lora_unet_{name}.lora_down.weight"]) for name in "ab"} == ranks
    assert {float(written[f"lora_unet_{name}.alpha"]) for name in "ab"} == ranks
    for module in report.modules:
        up, down = (written[f"{module.name}.lora_{side}.weight"].double() for side in ("up", "down"))
        whole = tensors[f"{module.name}.lora_up.weight"].double() @ tensors[f"{module.name}.lora_down.weight"].double() / 4
        kept = min(module.rank, 8)
        assert float((whole - up @ down).norm()) <= float(torch.linalg.svdvals(whole)[kept:].norm()) * 1.001 + 1e-5


def test_a_rank_above_all_that_is_allowed_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (30, 20)}, 8, 2.0))
    with pytest.raises(LoratoolError, match=r"needs rank 6.*Rule\(most=\)"):
        resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Rule("rank", 6, steps=(2, 4)))


def test_peft_loads_a_padded_adapter(tmp_path: Path) -> None:
    import peft

    model = llm("llama")
    peft_adapter(copy.deepcopy(model), tmp_path / "a", r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])

    resize(tmp_path / "a", tmp_path / "b", Rule("rank", 8, steps=STEPS["vllm"], pad=True))

    one, other = (peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / name) for name in "ab")
    assert one.peft_config["default"].r == 3
    assert other.peft_config["default"].r == 8
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(other(tokens).logits, one(tokens).logits, rtol=1e-4, atol=1e-5)


def test_errors_that_weigh_like_their_weights(tmp_path: Path) -> None:
    """Where the weight is a hundred times as large, the same change gets less rank."""
    same = kohya({"lora_unet_a": (30, 20)}, 8, 8.0)
    save(tmp_path / "a.safetensors", same | {name.replace("_a", "_b"): tensor for name, tensor in same.items()})
    base = torch.randn(30, 20)
    save(tmp_path / "base.safetensors", {"a.weight": base, "b.weight": 100 * base})

    report = resize(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        Budget(error=0.2),
        base=tmp_path / "base.safetensors",
        weigh=True,
    )

    large, small = report.modules
    assert large.rank > small.rank
    assert report.weighed is not None
    assert report.weighed <= 0.2 < report.error
    norm = float(base.norm())
    weighed = [
        (module.error * module.norm / size, module.norm / size) for module, size in ((large, norm), (small, 100 * norm))
    ]
    expected = sum(left**2 for left, _ in weighed) ** 0.5 / sum(whole**2 for _, whole in weighed) ** 0.5
    assert report.weighed == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["a difference of rank 3", "factors of more ranks than sides"])
def test_the_frontier_of_what_has_fewer_ranks_than_sides_ends(tmp_path: Path, kind: str) -> None:
    """All that a module has may be fewer directions than its matrix could hold."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(60, 3, generator=generator), torch.randn(3, 40, generator=generator)
    wide = {"lora_unet_q.lora_up.weight": up.repeat(1, 30), "lora_unet_q.lora_down.weight": down.repeat(30, 1)}
    save(tmp_path / "a.safetensors", {"lora_unet_q.diff": up @ down} if kind.startswith("a diff") else wide)
    found = frontier(tmp_path / "a.safetensors")
    assert [choice.rank for choice in found.choices] == [1, 2, 3]
    assert found.choices[-1].error < 1e-6


def test_the_frontier_says_what_resizing_does(tmp_path: Path) -> None:
    tensors = kohya({f"lora_unet_{i}": (20 + i, 30 - i) for i in range(9)}, 8, 2.0)
    for i in range(9):
        tensors[f"lora_unet_{i}.lora_up.weight"] *= 1.7**i
    save(tmp_path / "a.safetensors", tensors)

    found = frontier(tmp_path / "a.safetensors")

    assert [choice.rank for choice in found.choices] == [1, 2, 3, 4, 6, 8]
    for choice in found.choices:
        report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Rule("rank", choice.rank), overwrite=True)
        assert report.nbytes == choice.nbytes
        assert report.error == pytest.approx(choice.error, rel=1e-3, abs=1e-6)
        assert report.worst
        assert report.worst.error == pytest.approx(choice.worst, rel=1e-3, abs=1e-6)
        budget = Budget(nbytes=choice.nbytes)
        spent = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", budget, overwrite=True)
        assert spent.error == pytest.approx(choice.shared, rel=1e-3, abs=1e-6)
    assert found.choices[0].shared < found.choices[0].error
    assert found.choices[-1].error < 1e-6


def test_resize_on_the_command_line(tmp_path: Path, invoke) -> None:
    save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (30, 20)}, 8, 2.0))
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"

    shown = invoke("resize", path, "--frontier")
    assert shown.returncode == 0
    assert "worst module" in shown.stdout
    for words, message in (
        (["--rank", "2"], "give -o OUT"),
        (["--frontier", "--rank", "2"], "rank does not go with it"),
        (["-o", out, "--size", "1MB", "--pad"], "--pad does not go with --size"),
        (["-o", out, "--rank", "2", "--weigh", "base"], "--weigh base goes with"),
        (["-o", out, "--rank", "2", "--round-ranks", "8,x"], "list of ranks"),
    ):
        failed = invoke("resize", path, *words)
        assert failed.returncode == 2
        assert message in failed.stderr
    assert not out.exists()
    invoke("resize", path, "-o", out, "--rank", "3", "--round-ranks", "16,4")
    assert len(load_file(out)["lora_unet_a.lora_down.weight"]) == 4
