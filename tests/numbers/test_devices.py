"""Devices: the code that feeds a GPU runs on the CPU too, and runs out of memory without losing anything."""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool import (
    Budget,
    LoratoolError,
    Rule,
    WeightedAdapter,
    combine,
    compare,
    delta,
    extract,
    merge,
    resize,
    to_lora,
    unmerge,
)
from loratool.deltas.base import Delta, to_device
from loratool.numbers.devices import CPU, DevicePool, devices_named, exact_products, open_devices
from loratool.verbs.compare.compare import AdapterComparison
from loratool.verbs.merge import blocks as streaming
from tests.laws.test_deltas import MAKERS, Make
from tests.models import kohya, save
from tests.verbs.test_extract import pair, tuned_tensors
from tests.verbs.test_merge import STEMS, base_tensors
from tests.verbs.test_unmerge import dora, other_kinds

META = torch.device("meta")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has merges treat the CPU as a device that numbers must travel to and from."""
    monkeypatch.setattr("loratool.verbs.merge.merge.open_devices", partial(open_devices, staged=True))


def files(folder: Path, dtype: torch.dtype) -> tuple[Path, list[WeightedAdapter]]:
    generator = torch.Generator().manual_seed(1)
    base = base_tensors(dtype) | {"big.weight": torch.randn(700, 300, generator=generator).to(dtype)}
    stems = STEMS | {"lora_unet_big": (700, 300)}
    adapters = [kohya(stems, 3, 2.0), other_kinds(), dora()]
    paths = [save(folder / f"{number}.safetensors", adapter) for number, adapter in enumerate(adapters)]
    return save(folder / "base.safetensors", base), [WeightedAdapter(path, 0.7) for path in paths]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("changes", [{}, {"stochastic": True}, {"dtype": "float16"}])
def test_staging_changes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, changes: dict[str, object]
) -> None:
    base, adapters = files(tmp_path, dtype)
    monkeypatch.setattr(streaming, "TASK_BYTES", 1 << 16)
    # Rows of a product may be summed in another order with the rows around them, by a last bit that few of them show.
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1 << 16)
    options: dict[str, Any] = {"device": "cpu", **changes}  # type: ignore[arg-type]
    plain = merge(base, adapters, tmp_path / "plain.safetensors", **options)
    staged(monkeypatch)
    sent = merge(base, adapters, tmp_path / "sent.safetensors", **options)
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "sent.safetensors").read_bytes()
    assert plain.warnings == sent.warnings


def test_memory_that_runs_out_moves_work_to_the_cpu_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapters = files(tmp_path, torch.bfloat16)
    merge(base, adapters, tmp_path / "plain.safetensors", device="cpu")
    staged(monkeypatch)
    tries = count()
    run_job = streaming.run_job

    def out_of_memory(*words: object) -> streaming.RoundingStats:
        if next(tries) == 0:
            raise torch.OutOfMemoryError
        return run_job(*words)  # type: ignore[arg-type]

    monkeypatch.setattr("loratool.verbs.merge.files.run_job", out_of_memory)
    report = merge(base, adapters, tmp_path / "moved.safetensors", device="cpu")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "moved.safetensors").read_bytes()
    assert [note for note in report.warnings if "ran out of memory: 1 pieces of work were done on the CPU" in note]


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    sizes = []

    def compute(items: list[int], device: torch.device) -> list[int]:
        sizes.append(len(items))
        if len(items) > 2 or (items == [7] and len(sizes) < 20):
            raise torch.OutOfMemoryError
        return [-item for item in items]

    found = DevicePool([CPU], count(), [], staged=True).run_batch("it", range(8), compute)
    assert found == [-item for item in range(8)]
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_what_no_device_holds_is_an_error_of_the_cpu() -> None:
    def compute(items: list[int], device: torch.device) -> list[int]:
        raise torch.OutOfMemoryError("there is no more")

    lane = DevicePool([CPU], count(), [], staged=True)
    with pytest.raises(torch.OutOfMemoryError):
        lane.run_batch("it", [1], compute)
    assert "it" in next(lane.warnings())


def test_threads_take_turns_on_the_devices() -> None:
    turns = count()
    taken = [DevicePool([CPU, META], turns, [], staged=True).device for _ in range(4)]
    assert taken == [CPU, META, CPU, META]


@pytest.mark.parametrize("name", ["tpu", "cpu:1", "cuda:x", "mps:0", "", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(LoratoolError, match=f"`device='{name}'`: "):
        devices_named(name)


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices_named("auto") == (CPU,)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_named("auto") == devices_named("cuda") == (torch.device("cuda", 0), torch.device("cuda", 1))
    assert devices_named("cuda:1") == (torch.device("cuda", 1),)


def test_products_are_exact_whatever_the_caller_allows() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_every_kind_moves_to_a_device_with_all_that_it_computes(make: Make) -> None:
    """On the meta device nothing is computed, but an operation with a tensor of another device is an error."""
    delta, shape = make(torch.Generator().manual_seed(0), 2)
    there = to_device(delta, META)
    assert isinstance(there, Delta)
    if any(name in str(type(there)) for name in ("OFT", "BOFT")) and "InputBOFT" not in str(type(there)):
        pytest.skip("bounds itself by a number that the meta device does not have")
    assert there.apply(torch.empty(shape, device=META), 0.5).device == META
    assert to_device(delta, CPU).apply(torch.ones(shape), 0.5).equal(delta.apply(torch.ones(shape), 0.5))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_agrees_to_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    from loratool.numbers.rounding import ulp

    base, adapters = files(tmp_path, dtype)
    for device in ("cpu", "cuda"):
        merge(base, adapters, tmp_path / f"{device}.safetensors", device=device)
    one, other = (load_file(tmp_path / f"{device}.safetensors") for device in ("cpu", "cuda"))
    for name, tensor in one.items():
        if tensor.is_floating_point():
            slack = ulp(tensor).double() + 2.0**-20 * tensor.double().abs()
            assert bool(((tensor.double() - other[name].double()).abs() <= slack).all())


def factor_verbs(folder: Path, out: Path, device: str) -> dict[str, float]:
    """Every verb that computes on factors or differences, on a device, and the figures that they come to."""
    base, adapters = files(folder, torch.bfloat16)
    paths = [source.adapter for source in adapters[:2]]
    (out / "pair").mkdir(parents=True)
    models = pair(out / "pair", tuned_tensors())
    merge(base, adapters[:1], out / "tuned.safetensors", device=device)
    resized = resize(paths[0], out / "resized.safetensors", Rule("rank", 2), device=device)
    lora = to_lora(paths[1], out / "lora.safetensors", Rule("rank", 2), device=device)
    combined = combine(paths, out / "both.safetensors", Rule("rank", 4), arch=None, device=device)
    apart = compare([paths[0], out / "resized.safetensors"], device=device)
    whole = delta(base, out / "tuned.safetensors", out / "delta.safetensors", device=device, spectrum=True)
    extracted = extract(*models, out / "x.safetensors", Rule("rank", 2), to="comfyui", device=device)
    taken = unmerge(out / "tuned.safetensors", out / "back.safetensors", adapters[:1], device=device)
    assert isinstance(apart, AdapterComparison)
    return {
        "resize": resized.error,
        "to_lora": lora.error,
        "combine": combined.error,
        "compare": apart.difference,
        "delta": whole.norm,
        "delta, effective": sum(module.effective_rank or 0.0 for module in whole.modules),
        "extract": extracted.error,
        "unmerge": float(taken.numbers),
        "budget": resize(paths[0], out / "budget.safetensors", Budget(error=0.4), device=device).error,
    }


def test_every_verb_takes_a_device(tmp_path: Path) -> None:
    assert factor_verbs(tmp_path, tmp_path / "cpu", "cpu") == factor_verbs(tmp_path, tmp_path / "auto", "cpu")


@needs_cuda
def test_every_verb_comes_to_the_same_on_a_gpu(tmp_path: Path) -> None:
    assert factor_verbs(tmp_path, tmp_path / "gpu", "cuda") == pytest.approx(
        factor_verbs(tmp_path, tmp_path / "cpu", "cpu"), rel=1e-4
    )
