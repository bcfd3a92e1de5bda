"""Merging: exactly w · ΔW in one rounding, every other byte as it was, and on any error no output at all."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import loratool
from loratool import LoratoolError, Selection, Strength, WeightedAdapter, combine, inspect, merge, unmerge
from loratool.errors import InvalidAdapter, NonFinite, OutputError, ShapeMismatch, UnmatchedModules, Unsupported
from loratool.files.adapter_files import open_adapter
from loratool.files.hashes import short_hash
from loratool.files.locks import Lock
from loratool.verbs.merge import blocks as streaming
from tests.conftest import FIXTURES, examples
from tests.models import Tensors, kohya, save

SHAPES = {"fc": (12, 8), "conv": (6, 4, 3, 3), "point": (5, 7, 1, 1), "out": (8, 12)}
STEMS = {f"lora_unet_{name}": shape for name, shape in SHAPES.items()}


def base_tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return tensors | {"fc.bias": torch.ones(12, dtype=dtype), "steps": torch.arange(3)}


def reference(weight: torch.Tensor, adapter: Tensors, stem: str, strength: float) -> torch.Tensor:
    """W + w · (alpha / rank) · up · down, in float64, written to be obviously right."""
    down, up = adapter[f"{stem}.lora_down.weight"].double(), adapter[f"{stem}.lora_up.weight"].double()
    alpha = float(adapter.get(f"{stem}.alpha", torch.tensor(float(down.shape[0]))))
    delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return weight.double() + strength * alpha / down.shape[0] * delta


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gap between neighbours of `dtype` at `values`."""
    info = torch.finfo(dtype)
    return torch.exp2(values.abs().clamp_min(info.tiny).log2().floor()) * info.eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strengths", [(1.0,), (0.7, -0.4), (0.0,), (2.5, 1.0, -1.0)])
def test_adds_the_exact_sum_and_rounds_it_once(tmp_path: Path, dtype: torch.dtype, strengths: tuple[float, ...]) -> None:
    base = base_tensors(dtype)
    save(tmp_path / "base.safetensors", base)
    adapters = [kohya(STEMS, rank=i + 2, alpha=[1.0, None, -3.0][i], seed=i) for i in range(len(strengths))]
    paths = [save(tmp_path / f"{i}.safetensors", adapter) for i, adapter in enumerate(adapters)]

    merge(
        tmp_path / "base.safetensors",
        [WeightedAdapter(p, w) for p, w in zip(paths, strengths, strict=True)],
        tmp_path / "out.safetensors",
    )

    merged = load_file(tmp_path / "out.safetensors")
    for name in SHAPES:
        weight = base[f"{name}.weight"]
        expected = weight.double()
        for adapter, strength in zip(adapters, strengths, strict=True):
            expected = expected + reference(weight, adapter, f"lora_unet_{name}", strength) - weight.double()
        got = merged[f"{name}.weight"]
        assert got.dtype == dtype
        # Half a gap for the rounding, and float32's own error of the sum, which is large only beside a small result.
        slack = ulp(expected, dtype) / 2 + 1e-6 * (1 + expected.abs())
        assert bool(((got.double() - expected).abs() <= slack).all())


def test_untouched_tensors_are_the_same_bytes_and_metadata_is_kept(tmp_path: Path) -> None:
    base = base_tensors(torch.bfloat16)
    base["fc.bias"][0] = float("nan")
    save(tmp_path / "base.safetensors", base, format="pt", author="me")
    save(tmp_path / "a.safetensors", kohya({"lora_unet_fc": (12, 8)}, 2, 1.0))

    report = merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")

    merged = load_file(tmp_path / "out.safetensors")
    for name in base.keys() - {"fc.weight"}:
        assert torch.equal(merged[name].view(torch.uint8), base[name].view(torch.uint8))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["author"]) == ("pt", "me")
    provenance = json.loads(metadata["loratool"])
    assert provenance["adapters"] == [
        {"name": "a.safetensors", "autov3": short_hash(open_adapter(tmp_path / "a.safetensors")), "strength": 1.0}
    ]
    assert (report.matched, report.changed, report.copied) == (1, ("fc.weight",), len(base) - 1)


def test_equal_runs_write_equal_bytes_whatever_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = {"w.weight": torch.randn(3000, 200).bfloat16()}
    save(tmp_path / "base.safetensors", big)
    save(tmp_path / "a.safetensors", kohya({"lora_unet_w": (3000, 200)}, 4, 2.0))
    written = []
    for workers in (1, 4):
        monkeypatch.setattr("loratool.numbers.threads.usable_cores", partial(int, workers))
        monkeypatch.setattr(streaming, "TASK_BYTES", 1 << 18)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
        merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / f"{workers}.safetensors")
        written.append((tmp_path / f"{workers}.safetensors").read_bytes())

    assert written[0] == written[1]


def test_blocks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = base_tensors(), kohya(STEMS, 3, 2.0)
    save(tmp_path / "base.safetensors", base)
    save(tmp_path / "a.safetensors", adapter)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 64)
    monkeypatch.setattr(streaming, "TASK_BYTES", 128)

    merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")

    merged = load_file(tmp_path / "out.safetensors")
    for name in SHAPES:
        expected = reference(base[f"{name}.weight"], adapter, f"lora_unet_{name}", 1.0)
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)


@given(scale=st.sampled_from([1e-5, 1e-4, 1e-3, 1e-1]), seed=st.integers(0, 5))
@settings(max_examples=examples(12), deadline=None)
def test_the_report_measures_what_rounding_left(tmp_path_factory: pytest.TempPathFactory, scale: float, seed: int) -> None:
    folder = tmp_path_factory.mktemp("report")
    generator = torch.Generator().manual_seed(seed)
    weight = (0.02 * torch.randn(64, 64, generator=generator)).bfloat16()
    adapter = {name: scale**0.5 * tensor for name, tensor in kohya({"lora_unet_w": (64, 64)}, 4, None, seed).items()}
    save(folder / "base.safetensors", {"w.weight": weight})
    save(folder / "a.safetensors", adapter)

    report = merge(folder / "base.safetensors", [folder / "a.safetensors"], folder / "out.safetensors")

    stored = load_file(folder / "out.safetensors")["w.weight"].double() - weight.double()
    wanted = reference(weight, adapter, "lora_unet_w", 1.0) - weight.double()
    assert report.realised_strength == pytest.approx(float((stored * wanted).sum() / (wanted * wanted).sum()), rel=1e-4)
    assert report.unchanged == pytest.approx(float((stored == 0).double().mean()))
    assert report.sampled == 1.0
    assert (report.realised_strength < 0.9) == any("rounding left" in warning for warning in report.warnings)


def test_stochastic_rounding_keeps_the_strength_that_nearest_loses(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    save(tmp_path / "base.safetensors", {"w.weight": (0.02 * torch.randn(512, 512, generator=generator)).bfloat16()})
    adapter = {name: 0.01 * tensor for name, tensor in kohya({"lora_unet_w": (512, 512)}, 4, None).items()}
    save(tmp_path / "a.safetensors", adapter)
    base, path = tmp_path / "base.safetensors", tmp_path / "a.safetensors"

    nearest = merge(base, [path], tmp_path / "nearest.safetensors")
    chance = merge(base, [path], tmp_path / "chance.safetensors", stochastic=True, seed=1)
    merge(base, [path], tmp_path / "again.safetensors", stochastic=True, seed=1)

    assert nearest.realised_strength is not None
    assert chance.realised_strength is not None
    assert nearest.realised_strength < 0.5
    assert abs(chance.realised_strength - 1) < 0.1
    assert (tmp_path / "chance.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_include_exclude_and_components_choose_and_weigh_modules(tmp_path: Path) -> None:
    base = base_tensors()
    save(tmp_path / "base.safetensors", base)
    adapter = kohya(STEMS, 2, 1.0)
    save(tmp_path / "a.safetensors", adapter)

    selection = Selection(include=("*fc", "*out", "conv"), exclude=("*out",))
    weighted = WeightedAdapter(tmp_path / "a.safetensors", Strength(1.0, parts={"unet": 0.5}))
    report = merge(tmp_path / "base.safetensors", [weighted], tmp_path / "out.safetensors", selection=selection)

    assert set(report.changed) == {"fc.weight", "conv.weight"}
    merged = load_file(tmp_path / "out.safetensors")
    expected = reference(base["fc.weight"], adapter, "lora_unet_fc", 0.5)
    torch.testing.assert_close(merged["fc.weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_another_dtype_is_one_rounding_of_everything_floating(tmp_path: Path) -> None:
    base, adapter = base_tensors(), kohya({"lora_unet_fc": (12, 8)}, 2, 1.0)
    save(tmp_path / "base.safetensors", base)
    save(tmp_path / "a.safetensors", adapter)

    merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors", dtype="bfloat16")

    merged = load_file(tmp_path / "out.safetensors")
    assert torch.equal(merged["conv.weight"], base["conv.weight"].bfloat16())
    assert torch.equal(merged["steps"], base["steps"])
    expected = reference(base["fc.weight"], adapter, "lora_unet_fc", 1.0)
    assert bool(((merged["fc.weight"].double() - expected).abs() <= ulp(expected, torch.bfloat16) * 0.5001 + 1e-6).all())


def test_differences_biases_and_tucker_factors(tmp_path: Path) -> None:
    base = base_tensors()
    save(tmp_path / "base.safetensors", base)
    generator = torch.Generator().manual_seed(1)
    down, mid, up = (torch.randn(s, generator=generator) for s in ((2, 4, 1, 1), (2, 2, 3, 3), (6, 2, 1, 1)))
    adapter = {
        "lora_unet_fc.diff": torch.full((12, 8), 0.5),
        "lora_unet_fc.diff_b": torch.full((12,), 0.25),
        "lora_unet_conv.lora_down.weight": down,
        "lora_unet_conv.lora_mid.weight": mid,
        "lora_unet_conv.lora_up.weight": up,
        "lora_unet_conv.alpha": torch.tensor(1.0),
    }
    save(tmp_path / "a.safetensors", adapter)

    merge(tmp_path / "base.safetensors", [WeightedAdapter(tmp_path / "a.safetensors", 2.0)], tmp_path / "out.safetensors")

    merged = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(merged["fc.weight"], base["fc.weight"] + 1.0)
    torch.testing.assert_close(merged["fc.bias"], base["fc.bias"] + 0.5)
    tucker = torch.einsum("mnij,om,nc->ocij", mid, up.flatten(1), down.flatten(1))
    torch.testing.assert_close(merged["conv.weight"], base["conv.weight"] + 2.0 * 0.5 * tucker)


def test_a_weight_is_enlarged_with_zeros_where_the_adapter_says_so(tmp_path: Path) -> None:
    base = base_tensors()
    save(tmp_path / "base.safetensors", base)
    adapter = kohya({"lora_unet_fc": (14, 10)}, 2, None) | {"lora_unet_fc.reshape_weight": torch.tensor([14, 10])}
    save(tmp_path / "a.safetensors", adapter | {"lora_unet_out.set_weight": torch.ones(8, 12)})

    merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")

    merged = load_file(tmp_path / "out.safetensors")
    padded = torch.zeros(14, 10)
    padded[:12, :8] = base["fc.weight"]
    expected = reference(padded, adapter, "lora_unet_fc", 1.0)
    torch.testing.assert_close(merged["fc.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged["out.weight"], torch.ones(8, 12))
    assert torch.equal(merged["conv.weight"], base["conv.weight"])


def test_kohya_names_flattened_and_dotted_are_one(tmp_path: Path) -> None:
    save(tmp_path / "base.safetensors", {"model.diffusion_model.a_b.c.weight": torch.zeros(4, 4)})
    save(tmp_path / "a.safetensors", kohya({"lora_unet_a_b.c": (4, 4)}, 1, 1.0))

    report = merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")

    assert report.changed == ("model.diffusion_model.a_b.c.weight",)


BAD_ADAPTERS: dict[str, tuple[Tensors, type[LoratoolError], str]] = {
    "no target": (kohya(STEMS | {"lora_unet_fcc": (12, 8)}, 2, 1.0), UnmatchedModules, "lora_unet_fcc.*nearest: fc"),
    "shape": (kohya({"lora_unet_fc": (12, 9)}, 2, 1.0), ShapeMismatch, "lora_unet_fc.*another model"),
    "broadcast": (kohya({"lora_unet_fc": (1, 8)}, 1, 1.0), ShapeMismatch, "lora_unet_fc"),
    "half": ({"lora_unet_fc.lora_down.weight": torch.ones(2, 8)}, InvalidAdapter, "lora_unet_fc.*half"),
    "ranks": (
        {"lora_unet_fc.lora_down.weight": torch.ones(2, 8), "lora_unet_fc.lora_up.weight": torch.ones(12, 3)},
        InvalidAdapter,
        "lora_unet_fc.*unlike",
    ),
    "swapped": (
        {"lora_unet_fc.lora_down.weight": torch.ones(12, 2), "lora_unet_fc.lora_up.weight": torch.ones(2, 8)},
        InvalidAdapter,
        "lora_unet_fc",
    ),
    "rank 0": (
        {"lora_unet_fc.lora_down.weight": torch.ones(0, 8), "lora_unet_fc.lora_up.weight": torch.ones(12, 0)},
        InvalidAdapter,
        "leaves without elements: down",
    ),
    "one dimension": (
        {"lora_unet_fc.lora_down.weight": torch.ones(8), "lora_unet_fc.lora_up.weight": torch.ones(12)},
        InvalidAdapter,
        "lora_unet_fc",
    ),
    "kernel of four": (
        {"lora_unet_fc.lora_down.weight": torch.ones(2, 8, 1, 1, 1, 1), "lora_unet_fc.lora_up.weight": torch.ones(12, 2)},
        InvalidAdapter,
        "lora_unet_fc.*dimensions",
    ),
    "kernel on the wrong side": (
        {"lora_unet_fc.lora_down.weight": torch.ones(2, 8), "lora_unet_fc.lora_up.weight": torch.ones(12, 2, 3, 3)},
        InvalidAdapter,
        "lora_unet_fc.*kernel",
    ),
    "half a LoHa": (
        {f"lora_unet_fc.hada_{leaf}": torch.ones(2, 2) for leaf in ("w1_a", "w1_b", "w2_a")},
        InvalidAdapter,
        "lora_unet_fc.*hada_w2_a but no hada_w2_b",
    ),
    "LoKr without a side": ({"lora_unet_fc.lokr_w1": torch.ones(2, 2)}, InvalidAdapter, "lora_unet_fc.*lokr_w2"),
    "NaN": (
        kohya(STEMS, 2, 1.0) | {"lora_unet_fc.lora_up.weight": torch.full((12, 2), float("nan"))},
        NonFinite,
        "lora_unet_fc.lora_up.weight",
    ),
    "NaN alpha": (kohya({"lora_unet_fc": (12, 8)}, 2, float("nan")), InvalidAdapter, "lora_unet_fc.alpha"),
    "two alphas": (
        kohya({"lora_unet_fc": (12, 8)}, 2, None) | {"lora_unet_fc.alpha": torch.ones(2)},
        InvalidAdapter,
        "lora_unet_fc.alpha",
    ),
    "twice": (
        kohya({"lora_unet_fc": (12, 8)}, 2, None)
        | {"unet.fc.lora_A.weight": torch.ones(2, 8), "unet.fc.lora_B.weight": torch.ones(12, 2)},
        LoratoolError,
        "both go to fc.weight",
    ),
    "junk": (kohya(STEMS, 2, 1.0) | {"lora_unet_fc.junk": torch.ones(1)}, InvalidAdapter, "lora_unet_fc.junk"),
    "empty": ({}, InvalidAdapter, "not an adapter"),
    "checkpoint": (base_tensors(), InvalidAdapter, "checkpoint"),
    "overflow": (
        {"lora_unet_fc.diff": torch.full((12, 8), 1e38), "lora_unet_conv.diff": torch.zeros(6, 4, 3, 3)},
        NonFinite,
        "fc.weight: 96 values .*overflow F16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_is_an_error_that_names_it_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    tensors, kind, said = BAD_ADAPTERS[case]
    save(tmp_path / "base.safetensors", base_tensors(torch.float16))
    save(tmp_path / "a.safetensors", tensors)

    with pytest.raises(kind, match=said):
        merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]


def test_modules_that_change_nothing_are_named_in_a_warning(tmp_path: Path) -> None:
    adapter = kohya(STEMS, 2, 1.0)
    adapter["lora_unet_fc.lora_up.weight"].zero_()
    adapter["lora_unet_out.alpha"].zero_()
    save(tmp_path / "base.safetensors", base_tensors())
    save(tmp_path / "a.safetensors", adapter)

    report = merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")

    (said,) = report.warnings
    assert "2 of 4 modules change nothing" in said
    assert "lora_unet_fc" in said
    assert "lora_unet_out" in said


def test_unmatched_modules_are_left_out_only_when_asked(tmp_path: Path) -> None:
    save(tmp_path / "base.safetensors", base_tensors())
    save(tmp_path / "a.safetensors", kohya(STEMS | {"lora_unet_elsewhere": (3, 3)}, 2, 1.0))
    base, adapter, out = (tmp_path / name for name in ("base.safetensors", "a.safetensors", "out.safetensors"))

    report = merge(base, [adapter], out, allow_unmatched=True)

    assert report.unmatched == ("lora_unet_elsewhere",)
    assert any("elsewhere" in warning for warning in report.warnings)


@pytest.mark.parametrize("options", [{"allow_unmatched": True}, {"selection": Selection(include=("nothing",))}])
def test_merging_nothing_is_an_error(tmp_path: Path, options: dict[str, Any]) -> None:
    save(tmp_path / "base.safetensors", base_tensors())
    save(tmp_path / "a.safetensors", kohya({"lora_unet_elsewhere": (3, 3)}, 2, 1.0))

    with pytest.raises(LoratoolError):
        merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors", **options)

    assert not (tmp_path / "out.safetensors").exists()


def test_a_quantised_base_is_refused_with_the_way_to_take(tmp_path: Path) -> None:
    save(tmp_path / "base.safetensors", {"fc.qweight": torch.ones(4, 4, dtype=torch.int32), "fc.scales": torch.ones(4)})
    save(tmp_path / "a.safetensors", kohya({"lora_unet_fc": (4, 4)}, 1, 1.0))

    with pytest.raises(Unsupported, match="16-bit original"):
        merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")


def test_two_base_tensors_of_one_flattened_name_are_an_error_naming_both(tmp_path: Path) -> None:
    save(tmp_path / "base.safetensors", {"a.b.weight": torch.zeros(4, 4), "a_b.weight": torch.zeros(4, 4)})
    save(tmp_path / "a.safetensors", kohya({"lora_unet_a_b": (4, 4)}, 1, 1.0))

    with pytest.raises(LoratoolError, match="both go by the name"):
        merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")


def test_an_existing_output_survives_unless_told_otherwise(tmp_path: Path) -> None:
    save(tmp_path / "base.safetensors", base_tensors())
    save(tmp_path / "a.safetensors", kohya(STEMS, 2, 1.0))
    base, adapter, out = (tmp_path / name for name in ("base.safetensors", "a.safetensors", "out.safetensors"))
    out.write_text("mine")

    with pytest.raises(OutputError, match="`overwrite=True`"):
        merge(base, [adapter], out)
    assert out.read_text() == "mine"

    merge(base, [adapter], out, overwrite=True)
    assert load_file(out).keys() == base_tensors().keys()


@pytest.mark.parametrize("link", ["same", "symlink", "hard link"])
def test_the_output_is_never_an_input(tmp_path: Path, link: str) -> None:
    base = save(tmp_path / "base.safetensors", base_tensors())
    adapter = save(tmp_path / "a.safetensors", kohya(STEMS, 2, 1.0))
    out = base if link == "same" else tmp_path / "out.safetensors"
    if link == "symlink":
        out.symlink_to(base)
    if link == "hard link":
        os.link(base, out)
    before = base.read_bytes()

    with pytest.raises(OutputError, match="input"):
        merge(base, [adapter], out, overwrite=True)

    assert base.read_bytes() == before


def test_a_full_disk_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "base.safetensors", base_tensors())
    save(tmp_path / "a.safetensors", kohya(STEMS, 2, 1.0))
    (tmp_path / "out.safetensors").write_text("mine")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left"):
        merge(
            tmp_path / "base.safetensors",
            [tmp_path / "a.safetensors"],
            tmp_path / "out.safetensors",
            overwrite=True,
        )

    assert (tmp_path / "out.safetensors").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    save(tmp_path / "base.safetensors", base_tensors())
    save(tmp_path / "a.safetensors", kohya(STEMS, 2, 1.0))
    dead, living = (Lock(tmp_path, name, tmp_path / name) for name in ("dead", "living"))
    left = dead.temporary()
    left.write_text("left behind")
    living.take()
    written = living.temporary()
    written.write_text("a run that lives, wherever")

    merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")

    assert not left.exists()
    assert written.exists()
    living.release()


def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path) -> None:
    report = merge(FIXTURES / "llama", [FIXTURES / "llama-lora"], tmp_path / "out", dry_run=True)

    assert report.matched == 14
    assert report.realised_strength is None
    assert not list(tmp_path.iterdir())


def test_a_sharded_folder_keeps_its_shards_index_and_other_files(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in (FIXTURES / "llama").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_text("a stale copy")
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("kept")

    report = merge(base, [FIXTURES / "llama-lora"], tmp_path / "out")

    names = {str(path.relative_to(base)) for path in base.rglob("*")} - {"pytorch_model.bin"}
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")} == names
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (base / index).read_bytes()
    assert any("pytorch_model.bin" in warning for warning in report.warnings)


def test_progress_counts_up_to_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    merge(
        FIXTURES / "llama",
        [FIXTURES / "llama-lora"],
        tmp_path / "out",
        progress=lambda done, total: seen.append((done, total)),
    )

    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_library_offers_what_it_documents() -> None:
    for name in loratool.__all__:
        assert getattr(loratool, name).__doc__
    with pytest.raises(AttributeError):
        loratool.nothing  # noqa: B018


SDXL, STYLE = FIXTURES / "sdxl.safetensors", FIXTURES / "style.safetensors"
VECTOR = (0.5, 0.0, *[1.0] * 9, -2.0)
"""Block weights of SDXL: the text encoders, and eleven blocks of the U-Net."""


@pytest.mark.parametrize(
    "strength",
    [
        Strength(0.7, parts={"IN*": 0.0, "OUT*": 0.25}),
        Strength(-1.0, VECTOR, {"unet": 0.5}),
    ],
)
def test_blocks_are_weighed_as_combine_weighs_them(tmp_path: Path, strength: Strength) -> None:
    weighted = WeightedAdapter(STYLE, strength)
    combine([weighted], tmp_path / "weighed.safetensors", dtype="float32")
    merge(SDXL, [tmp_path / "weighed.safetensors"], tmp_path / "expected.safetensors")

    merge(SDXL, [weighted], tmp_path / "out.safetensors", undo=tmp_path / "undo")

    expected, got = load_file(tmp_path / "expected.safetensors"), load_file(tmp_path / "out.safetensors")
    plain = load_file(SDXL)
    for name, tensor in got.items():
        # One rounding of the dtype may fall to the other side, where a product of factors was rounded before.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-6)
    assert any(not torch.equal(got[name], plain[name]) for name in got)
    assert unmerge(tmp_path / "out.safetensors", tmp_path / "back.safetensors", undo=tmp_path / "undo").exact
    (step,) = inspect(tmp_path / "out.safetensors").history
    (told,) = step["adapters"]
    assert (told["strength"], told.get("blocks", ()), told.get("parts", {})) == (
        strength.value, list(strength.vector) or (), dict(strength.parts),
    )  # fmt: skip


def test_a_part_that_no_adapter_has_is_an_error(tmp_path: Path) -> None:
    wrong = WeightedAdapter(STYLE, Strength(1.0, parts={"te3": 0.5}))
    with pytest.raises(LoratoolError, match="te3: no module is of such a component or block"):
        merge(SDXL, [wrong], tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_command_line_takes_parts(tmp_path: Path, invoke) -> None:
    assert invoke("merge", SDXL, f"{STYLE}:0.7:IN*=0,OUT*=0.25", "-o", "a.safetensors").returncode == 0
    strength = Strength(0.7, parts={"IN*": 0.0, "OUT*": 0.25})
    merge(SDXL, [WeightedAdapter(STYLE, strength)], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_tensor_that_float16_cannot_hold_is_an_error_though_no_adapter_changes_it(tmp_path: Path) -> None:
    """bfloat16 has as many bytes as float16, and a wider range."""
    base = base_tensors(torch.bfloat16)
    base["big.weight"] = torch.full((2, 3), 1e5, dtype=torch.bfloat16)
    save(tmp_path / "base.safetensors", base)
    save(tmp_path / "a.safetensors", kohya(STEMS, 2, 1.0))
    with pytest.raises(NonFinite, match=r"big\.weight: 6 values of the result overflow F16"):
        merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "o.safetensors", dtype="float16")


def test_a_history_of_many_strengths_has_room(tmp_path: Path) -> None:
    save(tmp_path / "base.safetensors", base_tensors())
    path = save(tmp_path / "a.safetensors", kohya(STEMS, 2, 1.0))
    parts = {"*" * (number + 1): 1 + number / 7e9 for number in range(200)}
    weighted = WeightedAdapter(path, Strength(0.1, parts=parts))
    merge(tmp_path / "base.safetensors", [weighted], tmp_path / "o.safetensors")
    (step,) = inspect(tmp_path / "o.safetensors").history
    assert step["adapters"][0]["parts"].keys() == parts.keys()


@pytest.mark.parametrize("rows", [5, 13])
def test_a_bias_of_other_rows_than_its_weight_is_another_model(tmp_path: Path, rows: int) -> None:
    base = save(tmp_path / "base.safetensors", {"model.fc.weight": torch.ones(12, 8), "model.fc.bias": torch.ones(12)})
    prefix, folder = "base_model.model.model.fc", tmp_path / "adapter"
    folder.mkdir()
    tensors = {f"{prefix}.bias": torch.ones(rows)}
    tensors |= {f"{prefix}.lora_A.weight": torch.ones(2, 8), f"{prefix}.lora_B.weight": torch.ones(12, 2)}
    save(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "all"}))
    with pytest.raises(ShapeMismatch, match=r"model\.fc\.bias gets the shape .*model\.fc\.weight of the same layer has"):
        merge(base, [folder], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
