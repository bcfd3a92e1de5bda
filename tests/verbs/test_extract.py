"""Extraction: the printed error is the true one, what was merged comes back, and nothing is left out without a word."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratool import Budget, Checkpoint, LoratoolError, Rule, Selection, WeightedAdapter, extract, inspect, load, merge
from loratool.archs import ARCHS, Arch
from loratool.errors import NonFinite, OutputError, ShapeMismatch, UnmatchedModules, Unsupported
from loratool.numbers.device_choice import open_devices
from tests.models import Tensors, clip, kohya, llm, peft_adapter, save, sdxl_checkpoint
from tests.oracles.test_peft import meta_names

SHAPES = {"fc": (24, 40), "wide": (16, 200), "conv": (12, 6, 3, 3), "point": (20, 10, 1, 1), "out": (200, 130)}
PREFIX = "model.diffusion_model."
pytestmark = [pytest.mark.filterwarnings("ignore")]
COMFY: dict[str, Any] = {"to": "comfyui"}


def base_tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{PREFIX}{name}.weight": (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in SHAPES.items()
    }
    norm = {f"{PREFIX}norm.weight": torch.ones(24), f"{PREFIX}norm.bias": torch.zeros(24)}
    bias = {f"{PREFIX}fc.bias": torch.full((24,), 0.5)}
    return tensors | {name: tensor.to(dtype) for name, tensor in (norm | bias).items()}


def tuned_tensors(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensors:
    """Every parameter changed, the matrices by more than any small rank holds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for name, tensor in base_tensors(dtype).items()
    }


def pair(folder: Path, tuned: Tensors, base: Tensors | None = None) -> tuple[Path, Path]:
    save(folder / "base.safetensors", base or base_tensors())
    save(folder / "tuned.safetensors", tuned)
    return folder / "base.safetensors", folder / "tuned.safetensors"


def left_out(out: Path, base: Path, tuned: Path, merged: Path) -> tuple[float, float]:
    """‖W' − (W₀ + ΔW)‖ and ‖W' − W₀‖ over all, in float64, of an adapter that was merged in float32."""
    merge(base, [out], merged)
    before, after, ours = (load_file(path) for path in (base, tuned, merged))
    missing = sum(float((after[name].double() - ours[name].double()).square().sum()) for name in after)
    whole = sum(float((after[name].double() - before[name].double()).square().sum()) for name in after)
    return math.sqrt(missing), math.sqrt(whole)


@pytest.mark.parametrize("rule", [Rule("rank", 4), Rule("rank", 6, conv=2), Rule("max_error", 0.3), Rule("energy", 0.9),
                                  Rule("sv_ratio", 2), Rule("sv_cumulative", 0.5), Budget(error=0.5)])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_printed_error_is_the_true_one(tmp_path: Path, rule: Rule | Budget, dtype: str) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    out = tmp_path / "out.safetensors"

    report = extract(base, tuned, out, rule, to="comfyui", dtype=dtype)

    missing, whole = left_out(out, base, tuned, tmp_path / "merged.safetensors")
    assert report.norm == pytest.approx(whole, rel=1e-5)
    assert report.error == pytest.approx(missing / whole, rel=1e-3)
    assert not report.left_out
    assert {module.held for module in report.modules} == {"lora", "w_norm", "b_norm", "diff_b"}
    if isinstance(rule, Rule) and rule.method == "max_error":
        assert all(module.error <= rule.value for module in report.modules)
    if isinstance(rule, Budget):
        assert report.error <= rule.error


def test_every_module_is_the_best_of_its_rank(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())

    report = extract(base, tuned, tmp_path / "out.safetensors", Rule("rank", 5), **COMFY)

    before, after = load_file(base), load_file(tuned)
    for module in report.modules:
        if module.held != "lora":
            continue
        change = (after[f"{module.name}.weight"] - before[f"{module.name}.weight"]).double().flatten(1)
        sigma = torch.linalg.svdvals(change)
        best = float(sigma[5:].norm() / sigma.norm())
        assert best * (1 - 1e-6) <= module.error <= best * 1.001
        assert module.least == pytest.approx(best, rel=1e-3)
        assert module.norm == pytest.approx(float(sigma.norm()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1.0, 0.2])
def test_what_was_merged_comes_back_with_its_rank(tmp_path: Path, dtype: torch.dtype, strength: float) -> None:
    """ΔW of the LoRA to the rounding of the stored dtype, and `auto` finds the rank."""
    stems = {f"diffusion_model.{name}": shape for name, shape in (SHAPES | {"big": (300, 260)}).items()}
    adapter = {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor
               for key, tensor in kohya(stems, 3, 3.0).items()}  # fmt: skip
    save(tmp_path / "lora.safetensors", adapter)
    generator = torch.Generator().manual_seed(9)
    base = {
        f"model.{stem}.weight": (0.3 * torch.randn(shape, generator=generator)).to(dtype) for stem, shape in stems.items()
    }
    save(tmp_path / "base.safetensors", base)
    merge(
        tmp_path / "base.safetensors",
        [WeightedAdapter(tmp_path / "lora.safetensors", strength)],
        tmp_path / "tuned.safetensors",
    )
    out = tmp_path / "out.safetensors"

    options: dict[str, Any] = {"to": "comfyui", "dtype": "float32"}
    report = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out, Rule("auto"), **options)

    assert {module.rank for module in report.modules} == {3}
    given = {change.module.path: change.delta.dense() for change in load(tmp_path / "lora.safetensors").changes}
    for change in load(out).changes:
        weight = base[f"{PREFIX}{change.module.path}.weight"].float()
        # Rounding is off by at most half a step, of which three ranks hold but a part.
        step = torch.finfo(dtype).eps * (weight.abs().max() + strength * given[change.module.path].abs().max())
        wrong = (change.delta.dense() - strength * given[change.module.path]).abs().max()
        assert wrong <= step + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(512, 512), (128, 512), (1024, 256)])
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 4e-5])
def test_auto_finds_the_rank_of_changes_smaller_than_a_step(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, int], size: float
) -> None:
    """In bf16 weights around 0.02 are steps of 10⁻⁴ apart: most of a smaller change is rounded away, its rank is not."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    change = torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1], generator=generator)
    change *= size / change.square().mean().sqrt()
    name = "model.layers.0.mlp.up_proj.weight"
    base, tuned = pair(tmp_path, {name: (weight.float() + change).to(dtype)}, {name: weight})

    report = extract(base, tuned, tmp_path / "adapter", Rule("auto"))

    assert [module.rank for module in report.modules] == [4]


def test_auto_ends_where_rounding_reaches(tmp_path: Path) -> None:
    """Changes that are nothing but rounding are left out, and said to be."""
    base = base_tensors()
    base, tuned = pair(tmp_path, {name: tensor.bfloat16() for name, tensor in base.items()}, base)

    with pytest.raises(LoratoolError, match=r"nothing of it can be written as ComfyUI: .+: the rule kept no rank"):
        extract(base, tuned, tmp_path / "out.safetensors", Rule("auto"), **COMFY)


def test_the_snr_is_that_of_the_rounding_that_was_done(tmp_path: Path) -> None:
    base, exact = base_tensors(torch.bfloat16), tuned_tensors()
    save(tmp_path / "base.safetensors", base)
    save(tmp_path / "tuned.safetensors", {name: tensor.bfloat16() for name, tensor in exact.items()})

    report = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "o", Rule("rank", 2), **COMFY)

    for module in report.modules:
        if module.held == "lora":
            after = exact[f"{module.name}.weight"]
            done = float((after - after.bfloat16().float()).norm())
            assert module.snr == pytest.approx(20 * math.log10(module.norm / done), abs=0.5)


def test_what_did_not_change_is_not_in_the_output(tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors[f"{PREFIX}fc.weight"] = tensors[f"{PREFIX}fc.weight"] + 0.1
    base, tuned = pair(tmp_path, tensors)

    report = extract(base, tuned, tmp_path / "out.safetensors", Rule("rank", 1), **COMFY)

    assert report.unchanged == len(tensors) - 1
    assert {name.rpartition(".lora")[0] for name in load_file(tmp_path / "out.safetensors") if "lora" in name} == {
        "diffusion_model.fc"
    }
    assert report.error < 1e-3  # a constant is of rank 1


def test_nothing_changed_is_an_error(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, base_tensors())
    with pytest.raises(LoratoolError, match=r"nothing differs from .* in the 8 parameters"):
        extract(base, tuned, tmp_path / "out.safetensors", Rule("rank", 1), **COMFY)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_a_format_has_no_place_for_is_reported_with_its_share(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    out = tmp_path / "out.safetensors"

    report = extract(base, tuned, out, Rule("rank", 1000), to="diffusers", dtype="float32")

    assert [(left.name, left.why) for left in report.left_out] == [
        (f"{PREFIX}norm", "diffusers has no place for a norm's weight"),
        (f"{PREFIX}norm.bias", "diffusers has no place for a norm's bias"),
    ] or len(report.left_out) == 2
    missing, whole = left_out(out, base, tuned, tmp_path / "merged.safetensors")
    assert sum(left.share for left in report.left_out) == pytest.approx((missing / whole) ** 2, rel=1e-3)
    assert report.error == pytest.approx(missing / whole, rel=1e-3)


@pytest.mark.parametrize("size", [9_000, 20_000, 50_000, 1_000_000])
@pytest.mark.parametrize("to", ["comfyui", "peft"])
def test_a_size_is_never_exceeded_and_nearly_used_up(tmp_path: Path, size: int, to: str) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    out = tmp_path / "out"

    report = extract(base, tuned, out, Budget(nbytes=size), to=to, selection=Selection(include=("*.weight",)))

    files = [path for path in (out, *out.glob("*")) if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= size
    full = all(module.rank == min(shape[0], math.prod(shape[1:])) for module in report.modules if module.held == "lora"
               for shape in [SHAPES[module.name.rpartition(".")[2]]])  # fmt: skip
    # One more rank of the widest, and its names, where it had none.
    assert full or sum(path.stat().st_size for path in files) > size - 4 * (200 + 130) - 600


def test_the_sides_of_the_singular_values(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    products, norms = [], {}
    for split in ("even", "up", "down"):
        options: dict[str, Any] = {"to": "comfyui", "split": split, "selection": Selection(include=("*out.weight",))}  # type: ignore[arg-type]
        extract(base, tuned, tmp_path / f"{split}.safetensors", Rule("rank", 3), **options)
        tensors = load_file(tmp_path / f"{split}.safetensors")
        up, down = tensors["diffusion_model.out.lora_B.weight"], tensors["diffusion_model.out.lora_A.weight"]
        products.append(up @ down)
        norms[split] = up.norm(dim=0), down.norm(dim=1)
    assert all(torch.allclose(product, products[0], atol=1e-5) for product in products)
    torch.testing.assert_close(norms["even"][0], norms["even"][1])
    torch.testing.assert_close(norms["up"][1], torch.ones(3))
    torch.testing.assert_close(norms["down"][0], torch.ones(3))


def test_the_clamp_of_other_tools_costs_what_the_report_says(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    clamped: dict[str, Any] = {"to": "comfyui", "clamp": 0.99}

    free = extract(base, tuned, tmp_path / "free.safetensors", Rule("rank", 8), **COMFY)
    worse = extract(base, tuned, tmp_path / "clamped.safetensors", Rule("rank", 8), **clamped)

    missing, whole = left_out(tmp_path / "clamped.safetensors", base, tuned, tmp_path / "merged.safetensors")
    assert worse.error == pytest.approx(missing / whole, rel=1e-3)
    assert worse.error > free.error


def test_equal_runs_write_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    written = []
    for workers in (1, 4):
        monkeypatch.setattr("loratool.numbers.threads.usable_cores", partial(int, workers))
        out = tmp_path / f"{workers}.safetensors"
        extract(base, tuned, out, Rule("rank", 4), to="comfyui", dtype="float16")
        written.append(out.read_bytes())
    assert written[0] == written[1]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratool.verbs.extract.outcomes import Extraction, Task

    base, tuned = pair(tmp_path, tuned_tensors())
    out, partial, options = tmp_path / "out.safetensors", tmp_path / "out.safetensors.partial", {"resume": True, **COMFY}
    whole, calls = Extraction.outcomes, list[str]()

    def called(work: Extraction, tasks: list[Task], device: torch.device) -> object:
        calls.extend(str(task.pair) for task in tasks)
        return whole(work, tasks, device)

    def interrupted(work: Extraction, tasks: list[Task], device: torch.device) -> object:
        if len(calls) == 4:
            raise KeyboardInterrupt
        return called(work, tasks, device)

    monkeypatch.setattr("loratool.numbers.threads.usable_cores", lambda: 1)
    monkeypatch.setattr(Extraction, "outcomes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(base, tuned, out, Rule("rank", 3), **options)
    assert partial.is_dir()
    assert not out.exists()

    first = set(calls)
    calls.clear()
    monkeypatch.setattr(Extraction, "outcomes", called)
    report = extract(base, tuned, out, Rule("rank", 3), **options)

    assert len(first) == 4
    assert set(calls) == {str(module.name) for module in report.modules} - first
    assert not partial.exists()
    extract(base, tuned, tmp_path / "again.safetensors", Rule("rank", 3), **COMFY)
    assert out.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("rule", [Rule("rank", 3), Budget(error=0.3)])
def test_outcomes_are_kept_exactly(tmp_path: Path, kind: str, rule: Rule | Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of outcome survives the journal: the output is written from what was kept alone."""
    from loratool.verbs.extract.journal import Journal

    base, tuned = model_pair(tmp_path, kind)
    extract(base, tuned, tmp_path / "plain", rule)
    monkeypatch.setattr(Journal, "discard", lambda journal: None)
    extract(base, tuned, tmp_path / "out", rule, resume=True)
    (tmp_path / "out").rename(tmp_path / "first")
    monkeypatch.setattr(
        "loratool.verbs.extract.outcomes.Extraction.outcomes", lambda work, tasks, device: [None] * len(tasks)
    )
    extract(base, tuned, tmp_path / "out", rule, resume=True)

    for folder in ("first", "out"):
        written, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in (folder, "plain"))
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_what_was_kept_of_another_input_is_thrown_away(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    partial = tmp_path / "out.safetensors.partial"
    partial.mkdir()
    (partial / "job.json").write_text('{"made_by": "loratool extract, to resume", "job": "another"}')
    (partial / f"0-rank-3.{'0' * 32}.safetensors").write_text("no longer true")

    extract(base, tuned, tmp_path / "out.safetensors", Rule("rank", 3), resume=True, **COMFY)

    assert not partial.exists()


@pytest.mark.parametrize("job", ['{"my": "job"}', "\\xff", None])
def test_somebody_elses_folder_stays(tmp_path: Path, job: str | None) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    partial = tmp_path / "out.safetensors.partial"
    partial.mkdir()
    if job:
        (partial / "job.json").write_text(job)
    (partial / "thesis.txt").write_text("three years of work")
    with pytest.raises(OutputError, match="is not what an extraction left behind"):
        extract(base, tuned, tmp_path / "out.safetensors", Rule("rank", 3), resume=True, **COMFY)
    assert (partial / "thesis.txt").exists()


def test_an_outcome_that_a_power_cut_damaged_is_computed_again(tmp_path: Path) -> None:
    from loratool.verbs.extract.journal import Journal
    from loratool.verbs.extract.outcomes import ExtractedModule, Outcome

    journal = Journal(tmp_path / "out", "job")
    journal.put("0-rank-3", Outcome(None, ExtractedModule("x", "", 0, 1.0, 1.0, 1.0, 1.0, None)))
    (piece,) = journal.folder.glob("0-rank-3.*")
    raw = piece.read_bytes()
    assert Journal(tmp_path / "out", "job").get("0-rank-3") is not None
    for damaged in (b"", raw[: len(raw) // 2], bytes(len(raw)), raw[:-1] + b"\0"):
        piece.write_bytes(damaged)
        assert journal.get("0-rank-3") is None


def test_a_prefix_makes_no_difference(tmp_path: Path) -> None:
    """A U-Net by itself against the same inside a checkpoint, with a VAE that changed and that no adapter can hold."""
    base, tuned = base_tensors(), tuned_tensors()
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in tuned.items()}
    vae = {"first_stage_model.decoder.conv_in.weight": torch.ones(4, 4)}

    one = extract(*pair(tmp_path, bare, base), tmp_path / "one.safetensors", Rule("rank", 3), **COMFY)
    assert len(one.modules) == len(base)

    changed = {name: 1.5 * tensor for name, tensor in vae.items()}
    two = extract(*pair(tmp_path, tuned | changed, base | vae), tmp_path / "two.safetensors", Rule("rank", 3), **COMFY)
    (left,) = two.left_out
    assert (left.name, left.why) == ("first_stage_model.decoder.conv_in", "no format of adapters has a place for a VAE")
    assert left.norm == pytest.approx(2.0)
    assert left.share == pytest.approx(4 / two.norm**2)
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bad_input_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    good, out = tuned_tensors(), tmp_path / "out.safetensors"
    fc = f"{PREFIX}fc.weight"
    less = {name: tensor for name, tensor in good.items() if name != fc}
    nan, inf = torch.full((24, 40), math.nan), torch.full((24,), math.inf)
    broken = {
        "missing": (less, UnmatchedModules, r"lacks model\.diffusion_model\.fc\.weight"),
        "more": (good | {f"{PREFIX}fd.weight": torch.ones(2, 2)}, UnmatchedModules, r"lacks model\.diffusion_model\.fd"),
        "shape": (good | {fc: torch.ones(24, 41)}, ShapeMismatch, r"fc is \[24, 40\] in .*base.* and \[24, 41\] in .*tuned"),
        "rows": (good | {fc: torch.ones(25, 40)}, ShapeMismatch, r"fc is \[24, 40\]"),
        "nan": (good | {fc: nan}, NonFinite, r"tuned\.safetensors: model\.diffusion_model\.fc\.weight holds NaN"),
        "inf": (good | {f"{PREFIX}norm.bias": inf}, NonFinite, r"norm\.bias holds NaN or Inf"),
        "other": ({"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}, UnmatchedModules, "lacks model.diffusion_"),
        "quantised": (good | {f"{PREFIX}fc.weight_scale": torch.ones(1)}, Unsupported, "is quantised"),
    }
    for tensors, error, message in broken.values():
        base, tuned = pair(tmp_path, tensors)
        with pytest.raises(error, match=message):
            extract(base, tuned, out, Rule("rank", 2), **COMFY)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]


def test_8_bit_weights_are_extracted_into_wider_factors(tmp_path: Path) -> None:
    base, tuned = (
        {name: tensor.to(torch.float8_e4m3fn) for name, tensor in make().items()} for make in (base_tensors, tuned_tensors)
    )
    pair(tmp_path, tuned, base)

    report = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "o", Rule("rank", 2), **COMFY)

    assert {tensor.dtype for tensor in load_file(tmp_path / "o").values()} == {torch.bfloat16}
    whole = math.sqrt(sum(float((tuned[name].float() - base[name].float()).square().sum()) for name in base))
    assert report.norm == pytest.approx(whole, rel=1e-5)


def test_single_numbers_and_integers_are_not_overlooked(tmp_path: Path) -> None:
    base = base_tensors() | {f"{PREFIX}gate": torch.tensor(1.0), "steps": torch.arange(3), "same": torch.arange(3)}
    tuned = tuned_tensors() | {f"{PREFIX}gate": torch.tensor(1.5), "steps": torch.arange(3) + 1, "same": torch.arange(3)}

    report = extract(*pair(tmp_path, tuned, base), tmp_path / "o", Rule("rank", 2), **COMFY)

    (gate,) = [module for module in report.modules if module.name == f"{PREFIX}gate"]
    assert (gate.held, gate.norm, gate.error) == ("diff", 0.5, 0.0)
    assert "steps hold no floating-point numbers and differ; no adapter holds that" in report.warnings


def test_a_text_encoder_of_transformers_becomes_a_peft_folder(tmp_path: Path) -> None:
    for name, seed in (("base", 1), ("tuned", 2)):
        clip(seed=seed).save_pretrained(tmp_path / name)

    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "o", Rule("rank", 99), dtype="float32")

    assert report.format == "PEFT"
    assert not report.left_out
    merge(tmp_path / "base", [tmp_path / "o"], tmp_path / "merged")
    for name, tensor in load_file(tmp_path / "tuned" / "model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "merged" / "model.safetensors")[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_bias_that_changed_alone_is_carried_by_a_lora_of_nothing(tmp_path: Path) -> None:
    tensors = base_tensors() | {f"{PREFIX}fc.bias": torch.full((24,), 0.75)}
    base, tuned = pair(tmp_path, tensors)

    report = extract(base, tuned, tmp_path / "o", Rule("rank", 2), to="diffusers")
    merge(base, [tmp_path / "o"], tmp_path / "merged")

    assert [module.held for module in report.modules] == ["bias_up"]
    merged = load_file(tmp_path / "merged")
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("block", [1, 10, 100])
def test_blocks_make_no_difference(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors too are read a part at a time, and their last part is a shorter one."""
    base, tuned = pair(tmp_path, tuned_tensors(torch.bfloat16), base_tensors(torch.bfloat16))
    whole = extract(base, tuned, tmp_path / "whole", Rule("rank", 2), **COMFY)
    monkeypatch.setattr("loratool.base.difference._BLOCK", block)

    parts = extract(base, tuned, tmp_path / "parts", Rule("rank", 2), **COMFY)

    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    for one, other in zip(whole.modules, parts.modules, strict=True):
        assert one.snr == pytest.approx(other.snr)


def test_a_choice_of_nothing_is_an_error(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    with pytest.raises(LoratoolError, match=r"Selection\(include=\)` and `exclude=` leave no parameter"):
        extract(base, tuned, tmp_path / "o", Rule("rank", 2), selection=Selection(("nothing",)), **COMFY)


@pytest.mark.parametrize("rule", [Rule("rank", 4), Rule("max_error", 0.4), Rule("energy", 0.9), Budget(error=0.4)])
def test_batches_make_no_difference(tmp_path: Path, rule: Rule | Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one shape are computed together where numbers travel to a device; and one by one again, or on the CPU, where
    its memory does not hold them."""
    from loratool.verbs.extract.outcomes import Extraction, Task

    base, tuned = model_pair(tmp_path, "llama", hidden_size=128, intermediate_size=256)
    alone = extract(base, tuned, tmp_path / "alone", rule, device="cpu")
    monkeypatch.setattr("loratool.verbs.extract.extract.open_devices", partial(open_devices, staged=True))
    together = extract(base, tuned, tmp_path / "together", rule, device="cpu")
    whole, sizes = Extraction.outcomes, list[int]()

    def short_of_memory(work: Extraction, tasks: list[Task], device: torch.device) -> object:
        sizes.append(len(tasks))
        if len(tasks) > 1:
            raise torch.OutOfMemoryError
        return whole(work, tasks, device)

    monkeypatch.setattr(Extraction, "outcomes", short_of_memory)
    halved = extract(base, tuned, tmp_path / "halved", rule, device="cpu")
    assert max(sizes) > 1
    for report in (together, halved):
        for one, other in zip(alone.modules, report.modules, strict=True):
            assert (one.name, one.rank) == (other.name, other.rank)
            assert one.error == pytest.approx(other.error, rel=1e-4, abs=1e-7)
        assert alone.error == pytest.approx(report.error, rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_device_makes_no_difference(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    reports = [
        extract(base, tuned, tmp_path / device, Rule("max_error", 0.3), device=device, **COMFY) for device in ("cpu", "cuda")
    ]
    assert [module.rank for module in reports[0].modules] == [module.rank for module in reports[1].modules]
    assert reports[0].error == pytest.approx(reports[1].error, rel=1e-4)


def test_exclude_is_the_way_out(tmp_path: Path) -> None:
    tensors = tuned_tensors()
    tensors[f"{PREFIX}fc.weight"] = torch.full((24, 41), math.nan)
    base, tuned = pair(tmp_path, tensors)
    options: dict[str, Any] = {"to": "comfyui", "selection": Selection(exclude=("*.fc", "*.bias"))}

    report = extract(base, tuned, tmp_path / "out.safetensors", Rule("rank", 2), **options)

    assert report.excluded == 3
    assert {module.name.rpartition("diffusion_model.")[2] for module in report.modules} == {*SHAPES, "norm"} - {"fc"}


def test_outputs_are_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    monkeypatch.setattr("loratool.verbs.extract.job.ExtractRun.run", lambda job: pytest.fail("worked for nothing"))
    wrong = [
        (tuned, COMFY),
        (tmp_path / "none" / "out.safetensors", COMFY),
        (tmp_path / "out.safetensors", {"to": "peft"}),
        (tmp_path / "a", {"device": "cuda:77"}),
        (tmp_path / "a", {"device": "cpu:1"}),
        (tmp_path / "a", {"device": "tpu"}),
    ]
    for out, options in wrong:
        with pytest.raises((OutputError, LoratoolError)):
            extract(base, tuned, out, Rule("rank", 2), **options)


# Language models


def model_pair(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: int) -> tuple[Path, Path]:
    """A tiny model and itself after everything in it changed a little, in shards that are cut differently."""
    model = llm(kind, **changes).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(dtype))
    model.save_pretrained(folder / "tuned", max_shard_size="30KB")
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "qwen3_moe"])
def test_all_of_a_language_model_comes_back_at_full_rank(tmp_path: Path, kind: str) -> None:
    base, tuned = model_pair(tmp_path, kind)

    report = extract(base, tuned, tmp_path / "adapter", Rule("rank", 1000), dtype="float32")

    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    ours, theirs = Checkpoint(tmp_path / "merged"), Checkpoint(tuned)
    lost = {left.name for left in report.left_out}
    assert all("lora_bias" in left.why for left in report.left_out)
    for name in theirs:
        if name not in lost:
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_metas_names_and_hugging_faces_are_one_model(tmp_path: Path) -> None:
    """Tuned under Meta's names, with its rotary rows interleaved: the adapter is the one of the same under the base's."""
    base, tuned = model_pair(tmp_path)
    meta = meta_names(dict(Checkpoint(tuned)), heads=4, groups=2) | {"rope.freqs": torch.ones(4)}
    save(tmp_path / "meta.safetensors", meta)

    expected = extract(base, tuned, tmp_path / "a", Rule("rank", 4))
    report = extract(base, tmp_path / "meta.safetensors", tmp_path / "b", Rule("rank", 4))

    assert [(module.name, module.held, module.rank) for module in report.modules] == [
        (module.name, module.held, module.rank) for module in expected.modules
    ]
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ba")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_tied_heads_follow_their_embedding(tmp_path: Path) -> None:
    base, tuned = model_pair(tmp_path, "llama", tie_word_embeddings=True)

    report = extract(base, tuned, tmp_path / "adapter", Rule("rank", 1000), dtype="float32")

    assert {"lm_head", "model.embed_tokens"} <= {module.name for module in report.modules}
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged, expected = Checkpoint(tmp_path / "merged"), Checkpoint(tuned)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(merged[name], expected["model.embed_tokens.weight"], rtol=1e-4, atol=1e-5)


def test_a_vocabulary_that_grew_is_saved_whole(tmp_path: Path) -> None:
    base, _ = model_pair(tmp_path)
    model = llm("llama")
    model.resize_token_embeddings(53)
    model.save_pretrained(tmp_path / "grown")

    report = extract(base, tmp_path / "grown", tmp_path / "adapter", Rule("rank", 2))

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    assert {module.held for module in report.modules} == {"weight"}
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert torch.equal(Checkpoint(tmp_path / "merged")["lm_head.weight"], Checkpoint(tmp_path / "grown")["lm_head.weight"])


def test_stacked_experts_are_extracted_one_by_one(tmp_path: Path) -> None:
    model = llm("qwen3_moe")
    save(tmp_path / "base.safetensors", model.state_dict())
    named = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peft_adapter(llm("qwen3_moe"), tmp_path / "lora", r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=named)
    merge(tmp_path / "base.safetensors", [tmp_path / "lora"], tmp_path / "tuned.safetensors")

    report = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "again", Rule("auto"))

    assert {module.rank for module in report.modules} == {2}
    merge(tmp_path / "base.safetensors", [tmp_path / "again"], tmp_path / "merged.safetensors")
    ours, theirs = load_file(tmp_path / "merged.safetensors"), load_file(tmp_path / "tuned.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_plan_is_made_from_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = model_pair(tmp_path)
    options: dict[str, Any] = {"dry_run": True}
    planned = extract(base, tuned, tmp_path / "adapter", Rule("rank", 4), **options)
    assert not (tmp_path / "adapter").exists()

    done = extract(base, tuned, tmp_path / "adapter", Rule("rank", 4))

    assert {(module.name, module.held, module.rank) for module in planned.modules} == {
        (module.name, module.held, module.rank) for module in done.modules
    }
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert planned.nbytes == pytest.approx(size, rel=0.02)


# Image models


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_both_namings_of_one_model_are_paired(tmp_path: Path, to: str) -> None:
    """SDXL in one file and as a folder of diffusers: whichever is the base, the same ΔW comes out."""
    single, components = sdxl_checkpoint()
    tuned, _ = sdxl_checkpoint()
    generator = torch.Generator().manual_seed(3)
    changed = [name for name in tuned if ".attn2.to_k." in name or ".self_attn.q_proj." in name or "in_proj_weight" in name]
    for name in changed:
        tuned[name] = tuned[name] + 0.1 * torch.randn(tuned[name].shape, generator=generator)
    save(tmp_path / "base.safetensors", single)
    save(tmp_path / "tuned.safetensors", tuned)
    folder = tmp_path / "folder"
    for component, name in {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}.items():
        (folder / name).mkdir(parents=True)
        save(folder / name / "model.safetensors", components[component])
    (folder / "model_index.json").write_text("{}")
    options: dict[str, Any] = {"to": to, "dtype": "float32"}

    one = extract(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "a.safetensors", Rule("all"), **options
    )
    two = extract(folder, tmp_path / "tuned.safetensors", tmp_path / "b.safetensors", Rule("all"), **options)

    assert len(one.modules) == len(changed)
    assert one.norm == pytest.approx(two.norm, rel=1e-6)
    ours, theirs = (
        {change.module: change.delta.dense() for change in load(tmp_path / f"{name}.safetensors").changes} for name in "ab"
    )
    assert ours.keys() == theirs.keys()
    for module, delta in ours.items():
        torch.testing.assert_close(theirs[module], delta, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui", "peft-file"])
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_every_architecture_is_extracted_into_every_naming_and_merges_back(tmp_path: Path, arch: Arch, to: str) -> None:
    """A part of its original modules, stacked ones too, at tiny shapes: what comes out makes the tuned one of the base."""
    component = arch.components[0]
    links = [link for link in component.links[component.stored_naming] if not link.transposed]
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for link in links[:: max(1, len(links) // 90)]:
        name = f"model.diffusion_model.{link.whole}.weight"
        base[name] = torch.randn(4 * sum(link.sizes), 6, generator=generator)
        tuned[name] = base[name] + 0.1 * torch.randn(base[name].shape, generator=generator)
    paths = pair(tmp_path, tuned, base)

    report = extract(*paths, tmp_path / "o", Rule("rank", 6), to=to, arch=arch.name, dtype="float32")
    merge(paths[0], [tmp_path / "o"], tmp_path / "merged")

    assert not report.left_out
    merged = load_file(tmp_path / "merged")
    for name, tensor in tuned.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-4)


def test_the_command_prints_what_it_did(tmp_path: Path, invoke) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())

    done = invoke("extract", base, tuned, "-o", "out.safetensors", "--rank", 3, "--to", "comfyui", "-v")
    assert done.returncode == 0, done.stderr
    assert "8 held" in done.stdout

    done = invoke("extract", base, tuned, "-o", "out.safetensors", "--rank", 3, "--to", "comfyui", "--overwrite", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {"name", "rank", "norm", "error", "least", "effective_rank", "snr", "seconds"} <= document["modules"][0].keys()
    stored = json.loads(load(tmp_path / "out.safetensors").metadata["loratool"])
    assert stored["command"] == "extract"
    assert inspect(tmp_path / "out.safetensors").trainer == "nobody: extracted by loratool"
    assert len(stored["modules"]) == 8


@pytest.mark.parametrize(
    "words", ["--rank 3 --auto", "", "--keep sv_ratio", "--keep size=3", "--size five", "--size 5MB --conv-rank 2",
              "--max-error 120%"],
)  # fmt: skip
def test_wrong_usage_exits_with_2(tmp_path: Path, invoke, words: str) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    done = invoke("extract", base, tuned, "-o", "out.safetensors", *words.split())
    assert done.returncode == 2, done.stdout + done.stderr


def test_a_folder_that_a_killed_run_left_empty_is_taken_over(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tuned_tensors())
    (tmp_path / "out.safetensors.partial").mkdir()
    extract(base, tuned, tmp_path / "out.safetensors", Rule("rank", 3), resume=True, **COMFY)
    assert not (tmp_path / "out.safetensors.partial").exists()
