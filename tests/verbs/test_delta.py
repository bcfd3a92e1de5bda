"""ΔW itself: its figures against dense algebra, the file of it against merges, and names that other tools read."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from loratool import Checkpoint, LoratoolError, Selection, delta, iter_deltas, load, merge
from loratool.archs.flux import FLUX1
from loratool.errors import NeedsBase, NonFinite, OutputError, Unsupported
from loratool.files.header import read_header
from loratool.formats.table import format_named
from loratool.numbers.linalg import effective_rank
from tests.conftest import examples
from tests.models import Tensors, kohya, llm, peft_adapter, save, sdxl_checkpoint
from tests.oracles.test_lycoris import ADDITIVE, OTHERS, train
from tests.verbs.test_convert import made_for

pytestmark = [pytest.mark.filterwarnings("ignore")]

SHAPES = {"lora_unet_a": (24, 16), "lora_unet_b": (12, 8, 3, 3), "lora_unet_c": (40, 6)}
CPU: dict[str, Any] = {"device": "cpu"}


def dense(path: Path) -> Tensors:
    return {str(change): change.delta.dense() for change in load(path).changes}


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 10), alpha=st.floats(0.1, 20), size=st.floats(-12, 12))
@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_figures_are_those_of_the_dense_matrix(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rank: int, alpha: float, size: float
) -> None:
    folder = tmp_path_factory.mktemp("delta")
    tensors = kohya(SHAPES, rank, alpha, seed)
    tensors |= {name: 10**size * tensor for name, tensor in tensors.items() if "lora_up" in name}
    tensors["lora_unet_d.diff"] = 10**size * torch.randn(30, 20, generator=torch.Generator().manual_seed(seed))
    tensors["lora_unet_d.diff_b"] = torch.ones(30)
    path = save(folder / "a.safetensors", tensors)

    report = delta(path, device="cpu", spectrum=True)

    wanted = dense(path)
    assert {module.name for module in report.modules} == wanted.keys()
    total = math.hypot(*(float(each.double().norm()) for each in wanted.values()))
    assert report.norm == pytest.approx(total, rel=1e-5)
    for module in report.modules:
        matrix = wanted[module.name].double()
        sigma = torch.linalg.svdvals(matrix.flatten(1) if matrix.ndim > 1 else matrix.reshape(1, -1))
        norm = float(matrix.norm())
        assert module.shape == tuple(matrix.shape)
        assert module.norm == pytest.approx(norm, rel=1e-5)
        assert module.sigma == pytest.approx(float(sigma[0]), rel=1e-5)
        assert module.stable_rank == pytest.approx((norm / float(sigma[0])) ** 2, rel=1e-4)
        assert module.effective_rank == pytest.approx(effective_rank(sigma), rel=1e-3)
        assert module.share == pytest.approx((norm / total) ** 2, rel=1e-4)
        count = min(len(module.spectrum), len(sigma))
        assert module.spectrum[:count] == pytest.approx(sigma[:count].tolist(), abs=1e-5 * float(sigma[0]))
    assert math.fsum(module.share for module in report.modules) == pytest.approx(1)


def test_the_largest_singular_value_of_a_large_matrix_is_found_without_the_others(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1400, 1300, generator=generator)
    save(tmp_path / "base.safetensors", {"w.weight": torch.zeros(1400, 1300)})
    save(tmp_path / "tuned.safetensors", {"w.weight": noise})
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    sigma = torch.linalg.svdvals(noise.double())

    (quick,) = delta(*paths, **CPU).modules
    assert quick.sigma == pytest.approx(float(sigma[0]), rel=2e-3)
    assert quick.effective_rank is None
    assert not quick.spectrum
    (whole,) = delta(*paths, device="cpu", spectrum=True).modules
    assert whole.spectrum == pytest.approx(sigma.tolist(), rel=1e-6)
    assert whole.effective_rank == pytest.approx(effective_rank(sigma))


@pytest.mark.parametrize("case", [*ADDITIVE, *OTHERS])
def test_the_file_merges_to_what_the_adapter_merges_to(tmp_path: Path, case: str) -> None:
    train((ADDITIVE | OTHERS)[case], tmp_path)
    base, adapter = tmp_path / "base.safetensors", tmp_path / "a.safetensors"
    if case in OTHERS:
        with pytest.raises(NeedsBase, match="depends on its weight; pass `base=`"):
            delta(adapter, None, tmp_path / "d.safetensors", **CPU)

    report = delta(adapter, None, tmp_path / "d.safetensors", base=base, device="cpu")

    merge(base, [adapter], tmp_path / "one.safetensors")
    merge(base, [tmp_path / "d.safetensors"], tmp_path / "other.safetensors")
    one, other = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "other.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)
    before = load_file(base)
    changed = math.hypot(*(float((one[name].double() - before[name].double()).norm()) for name in one))
    assert report.norm == pytest.approx(changed, rel=1e-4)
    assert report.relative is not None


def test_the_difference_of_two_checkpoints_leads_from_one_to_the_other(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = llm("llama").to(dtype)
        model.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "q_proj" in name or "norm" in name or "embed" in name:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
        out = tmp_path / f"{dtype}.safetensors"
        report = delta(tmp_path / "base", tmp_path / "tuned", out, **CPU)
        assert report.error == 0
        assert report.format == "the model's own names"
        base, tuned = Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "tuned")
        changed = {name for name in base if not torch.equal(base[name], tuned[name])}
        assert {module.name + ".weight" for module in report.modules} == changed
        assert report.unchanged == len(base) - len(changed)
        for module in report.modules:
            before, after = (each[f"{module.name}.weight"].double() for each in (base, tuned))
            assert module.relative == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
        merge(tmp_path / "base", [out], tmp_path / f"again-{dtype}")
        again = Checkpoint(tmp_path / f"again-{dtype}")
        assert all(torch.equal(again[name], tuned[name]) for name in base)


def test_differences_of_an_image_model_have_kohyas_names_and_whatever_is_asked_for(tmp_path: Path) -> None:
    tensors, _ = sdxl_checkpoint()
    save(tmp_path / "base.safetensors", tensors)
    tuned = {
        name: tensor + 0.01 * torch.randn_like(tensor) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()
    }
    save(tmp_path / "tuned.safetensors", tuned)
    for to, prefix in ((None, "lora_"), ("comfyui", "diffusion_model.")):
        out = tmp_path / f"{to}.safetensors"
        report = delta(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out, to=to, device="cpu")
        names = set(load_file(out))
        assert any(name.startswith(prefix) for name in names)
        assert all(name.endswith(".diff") for name in names)
        left = set(report.left_out)
        merged = merge(tmp_path / "base.safetensors", [out], tmp_path / f"again-{to}.safetensors")
        again = load_file(merged.out)
        for name, tensor in tuned.items():
            if tensor.ndim > 1 and name.removesuffix(".weight") not in left and name not in left:
                torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-6)


def test_parts_that_are_one_tensor_there_are_stacked(tmp_path: Path) -> None:
    tensors = made_for(FLUX1, format_named("diffusers"), alpha=3.0)
    source = save(tmp_path / "a.safetensors", tensors)
    report = delta(source, None, tmp_path / "d.safetensors", to="comfyui", arch="flux1", device="cpu")
    written = load_file(tmp_path / "d.safetensors")
    assert math.hypot(*(float(each.double().norm()) for each in written.values())) == pytest.approx(report.norm, rel=1e-5)
    assert len(written) < len(report.modules)
    assert any(name.endswith("qkv.diff") for name in written)
    back = delta(tmp_path / "d.safetensors", None, tmp_path / "b.safetensors", arch="flux1", device="cpu")
    assert back.norm == pytest.approx(report.norm, rel=1e-6)
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == written.keys()
    assert all(torch.equal(again[name], written[name]) for name in written)


def test_rounding_to_the_files_dtype_is_the_error_that_is_printed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", kohya(SHAPES, 4, 2.0))
    report = delta(path, None, tmp_path / "d.safetensors", dtype="bfloat16", device="cpu")
    stored, wanted = load_file(tmp_path / "d.safetensors"), dense(path)
    lost = math.hypot(*(float((stored[f"{name}.diff"].double() - each.double()).norm()) for name, each in wanted.items()))
    assert report.error == pytest.approx(lost / report.norm, rel=1e-4)
    assert 0 < report.error < 2**-8
    assert read_header(tmp_path / "d.safetensors").tensors["lora_unet_a.diff"].dtype == "BF16"


def test_deltas_come_one_by_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", kohya(SHAPES, 4, 2.0))
    found = dict(iter_deltas(path, **CPU))
    for name, each in dense(path).items():
        torch.testing.assert_close(found[name], each)
    llm("llama").save_pretrained(tmp_path / "base")
    peft_adapter(llm("llama"), tmp_path / "p", r=2, target_modules=["q_proj"])
    merge(tmp_path / "base", [tmp_path / "p"], tmp_path / "tuned")
    wanted = {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert {name for name, _ in iter_deltas(tmp_path / "base", tmp_path / "tuned", **CPU)} == wanted


def test_equal_runs_write_equal_bytes_whatever_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.safetensors", kohya({f"lora_unet_{i}": (60 + i, 50) for i in range(20)}, 4, 2.0))
    for workers in (1, 4):
        monkeypatch.setattr("loratool.numbers.threads.usable_cores", partial(int, workers))
        delta(path, None, tmp_path / f"{workers}.safetensors", **CPU)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "4.safetensors").read_bytes()


def test_errors_say_what_to_do_and_leave_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", kohya(SHAPES, 4, 2.0))
    base = save(tmp_path / "base.safetensors", {"a.weight": torch.ones(24, 16)})
    out = tmp_path / "out.safetensors"
    cases = (
        (LoratoolError, "is an adapter; its ΔW", lambda: delta(path, base, out, **CPU)),
        (LoratoolError, "is no adapter; name the tuned checkpoint too", lambda: delta(base, None, out, **CPU)),
        (
            Unsupported,
            "no place for full differences; `to='kohya'`",
            lambda: delta(path, None, out, to="diffusers"),
        ),
        (OutputError, "is an input of this very run", lambda: delta(path, None, path, overwrite=True)),
        (LoratoolError, "leave no module", lambda: delta(path, None, out, selection=Selection(include=("nothing",)))),
    )
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    large = save(tmp_path / "large.safetensors", {"lora_unet_a.diff": torch.full((24, 16), 1e6)})
    with pytest.raises(NonFinite, match=r"lora_unet_a\.diff: overflows float16; choose `dtype='float32'`"):
        delta(large, None, out, dtype="float16", device="cpu")
    assert not [each for each in tmp_path.iterdir() if each.name == out.name or each.name.startswith(".")]


def test_the_command_line_ranks_by_size_and_by_share(tmp_path: Path, invoke) -> None:
    base = {"big.weight": 100 * torch.ones(8, 8), "small.weight": torch.ones(8, 8), "same.weight": torch.ones(4, 4)}
    save(tmp_path / "base.safetensors", base)
    tuned = base | {"big.weight": base["big.weight"] + 2, "small.weight": base["small.weight"] + 1}
    save(tmp_path / "tuned.safetensors", tuned)
    done = invoke("delta", "base.safetensors", "tuned.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.index("big") < done.stdout.index("small")
    assert "2 changed, 1 unchanged" in done.stdout
    lines = invoke("delta", "base.safetensors", "tuned.safetensors", "--by", "relative", "--top", "1").stdout
    assert "small" in lines
    assert "big" not in lines
    assert "1 more; --top 0 shows all" in lines
    report = json.loads(invoke("delta", "base.safetensors", "tuned.safetensors", "--json", "--spectrum").stdout)
    assert report["modules"][0]["spectrum"][0] == pytest.approx(16.0)
