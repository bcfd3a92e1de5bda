"""Devices: the code that feeds a GPU runs on the CPU too, and runs out of memory without losing anything."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
from loratool.numbers.device_choice import devices_named, open_devices
from loratool.numbers.devices import CPU, MOST_LANES, DevicePool
from loratool.numbers.settings import steady_arithmetic
from loratool.numbers.threads import read_ahead
from loratool.verbs.compare.compare import AdapterComparison
from loratool.verbs.merge import blocks as streaming
from loratool.verbs.merge.files import SentSegments
from loratool.verbs.merge.segments import Segment
from tests.laws.test_deltas import MAKERS, Make
from tests.models import kohya, save
from tests.verbs.test_merge import STEMS, base_tensors
from tests.verbs.test_unmerge import dora, other_kinds

META = torch.device("meta")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def staged(monkeypatch: pytest.MonkeyPatch, *, strict: bool = True) -> None:
    """Has all verbs treat the CPU as a device that numbers must travel to and from; without `strict`, as one that "auto"
    chose."""

    def opened(*words: Any, **options: Any) -> DevicePool:
        pool = open_devices(*words, **options, staged=True)
        pool.strict = strict
        return pool

    for name, module in list(sys.modules.items()):
        if name.startswith("loratool.") and hasattr(module, "open_devices"):
            monkeypatch.setattr(module, "open_devices", opened)


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

    found = DevicePool((CPU,), staged=True).run_batch("it", range(8), compute)
    assert found == [-item for item in range(8)]
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_what_no_device_holds_is_an_error_of_the_cpu() -> None:
    def compute(items: list[int], device: torch.device) -> list[int]:
        raise torch.OutOfMemoryError("there is no more")

    lane = DevicePool((CPU,), staged=True)
    with pytest.raises(torch.OutOfMemoryError):
        lane.run_batch("it", [1], compute)
    assert "it" in next(lane.warnings())


def test_threads_take_turns_on_the_devices() -> None:
    pool, taken = DevicePool((CPU, META), staged=True), []
    for _ in range(4):
        thread = threading.Thread(target=lambda: taken.append(pool.device))
        thread.start()
        thread.join()
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
        with steady_arithmetic():
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


def pair(folder: Path) -> list[Path]:
    """A language model's layers of two shapes, and the same after a fine-tuning that no small rank holds."""
    generator = torch.Generator().manual_seed(3)
    parts = {"self_attn.q_proj": (20, 20), "mlp.down_proj": (20, 44)}
    base = {
        f"model.layers.{layer}.{part}.weight": torch.randn(shape, generator=generator)
        for layer in range(4)
        for part, shape in parts.items()
    }
    tuned = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    return [save(folder / f"{name}.safetensors", each) for name, each in (("before", base), ("after", tuned))]


def factor_verbs(folder: Path, out: Path, device: str) -> dict[str, float]:
    """Every verb that computes on factors or differences, on a device, and the figures that they come to."""
    base, adapters = files(folder, torch.bfloat16)
    paths = [source.adapter for source in adapters[:2]]
    out.mkdir(parents=True)
    models = pair(out)
    merge(base, adapters[:1], out / "tuned.safetensors", device=device)
    resized = resize(paths[0], out / "resized.safetensors", Rule("rank", 2), device=device)
    lora = to_lora(paths[1], out / "lora.safetensors", Rule("rank", 2), device=device)
    combined = combine(paths, out / "both.safetensors", Rule("rank", 4), arch=None, device=device)
    apart = compare([paths[0], out / "resized.safetensors"], device=device)
    whole = delta(base, out / "tuned.safetensors", out / "delta.safetensors", device=device, spectrum=True)
    extracted = extract(*models, out / "x", Rule("rank", 2), to="peft", device=device)
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


def test_every_verb_comes_to_the_same_where_numbers_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of one shape together, from several threads: to rounding, what they come to one by one."""
    alone = factor_verbs(tmp_path, tmp_path / "cpu", "cpu")
    staged(monkeypatch)
    assert factor_verbs(tmp_path, tmp_path / "staged", "cpu") == pytest.approx(alone, rel=1e-6)


class Faulty:
    """A way to a device on which every third piece of work ends in an error, from whichever thread."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, count(1)

    def __enter__(self) -> None:
        if next(self.calls) % 3 == 1:
            raise self.error

    def __exit__(self, *raised: object) -> None:
        pass


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    ],
    ids=["torch", "runtime", "cublas", "cusolver"],
)
def test_memory_that_runs_out_anywhere_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    alone = factor_verbs(tmp_path, tmp_path / "cpu", "cpu")
    staged(monkeypatch)
    faulty = Faulty(error)
    monkeypatch.setattr(DevicePool, "_stream", lambda pool: faulty)
    assert factor_verbs(tmp_path, tmp_path / "faulty", "cpu") == pytest.approx(alone, rel=1e-6)


def test_a_device_that_breaks_under_auto_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = factor_verbs(tmp_path, tmp_path / "cpu", "cpu")
    staged(monkeypatch, strict=False)
    faulty = Faulty(RuntimeError("CUDA error: unspecified launch failure"))
    monkeypatch.setattr(DevicePool, "_stream", lambda pool: faulty)
    assert factor_verbs(tmp_path, tmp_path / "broken", "cpu") == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("verb", ["merge", "extract", "delta", "resize", "combine", "compare", "unmerge"])
def test_a_device_that_breaks_by_name_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    base, adapters = files(tmp_path, torch.bfloat16)
    merge(base, adapters[:1], tmp_path / "tuned.safetensors", device="cpu")
    one, other = (source.adapter for source in adapters[:2])
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    staged(monkeypatch)
    faulty = Faulty(RuntimeError("CUDA error: unspecified launch failure"))
    monkeypatch.setattr(DevicePool, "_stream", lambda pool: faulty)
    before = sorted(path.name for path in tmp_path.iterdir())
    calls: dict[str, Callable[[], object]] = {
        "merge": lambda: merge(base, adapters[:1], out),
        "extract": lambda: extract(base, tuned, out, Rule("rank", 2), to="comfyui"),
        "delta": lambda: delta(base, tuned, out),
        "resize": lambda: resize(one, out, Rule("rank", 2)),
        "combine": lambda: combine([one, other], out, Rule("rank", 4), arch=None),
        "compare": lambda: compare([one, one]),
        "unmerge": lambda: unmerge(tuned, out, adapters[:1]),
    }
    with pytest.raises(LoratoolError, match=r"cpu broke in the middle of .*unspecified launch failure.*does without"):
        calls[verb]()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_few_threads_drive_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cores: each thread that drives a GPU has CUDA's handles and workspaces for itself."""
    using: dict[int, set[int]] = {}
    pools: list[DevicePool] = []
    real = DevicePool.run_batch

    def run_batch(pool: DevicePool, what: str, items: Any, compute: Any) -> Any:
        # Kept, so that no other pool gets the place of one that is gone.
        pools.append(pool)
        using.setdefault(id(pool), set()).add(threading.get_ident())
        time.sleep(0.002)
        return real(pool, what, items, compute)

    monkeypatch.setattr("loratool.numbers.threads.usable_cores", lambda: 16)
    staged(monkeypatch)
    monkeypatch.setattr(DevicePool, "run_batch", run_batch)
    base = save(tmp_path / "base.safetensors", {f"{i}.weight": torch.randn(20, 20).bfloat16() for i in range(60)})
    adapter = save(tmp_path / "a.safetensors", kohya({f"lora_unet_{i}": (20, 20) for i in range(60)}, 3, 2.0))
    merge(base, [adapter], tmp_path / "tuned.safetensors", device="cpu")
    delta(base, tmp_path / "tuned.safetensors", device="cpu")
    unmerge(tmp_path / "tuned.safetensors", tmp_path / "back.safetensors", [adapter], device="cpu")
    assert 1 < max(map(len, using.values())) <= MOST_LANES


def test_factors_travel_once_and_not_with_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.device] = []
    real = Segment.on

    def on(segment: Segment, device: torch.device) -> Segment:
        sent.append(device)
        return real(segment, CPU)

    monkeypatch.setattr(Segment, "on", on)
    held, segments = SentSegments(), (Segment(0, 4, torch.ones(4, 1), torch.ones(1, 4), ()),)
    assert held.on(META, segments) is held.on(META, segments)
    assert held.on(CPU, segments) is segments
    assert sent == [META]
    # Of other tensors, only the last few are kept.
    for _ in range(20):
        held.on(META, (Segment(0, 4, torch.ones(4, 1), torch.ones(1, 4), ()),))
    held.on(META, segments)
    assert len(sent) == 22


def test_reading_goes_on_while_the_last_read_is_used() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    ahead = read_ahead(items())
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while made != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [0, 1]
    assert list(ahead) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(1 // number for number in (1, 0)))


@needs_cuda
@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("verb", ["extract", "delta", "merge", "resize", "compare"])
def test_every_verb_ends_well_on_a_gpu_in_a_process_of_its_own(tmp_path: Path, verb: str, turn: int) -> None:
    """On enough modules that all threads start together: what is loaded when it is first used is loaded there anew."""
    count, one, other = 60, tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    base = save(tmp_path / "base.safetensors", {f"{i}.weight": torch.randn(700, 600).bfloat16() for i in range(count)})
    tuned = save(tmp_path / "tuned.safetensors", {f"{i}.weight": torch.randn(700, 600).bfloat16() for i in range(count)})
    for seed, path in enumerate((one, other)):
        save(path, kohya({f"lora_unet_{i}": (700, 600) for i in range(count)}, 16, 2.0, seed=seed))
    out = str(tmp_path / "out.safetensors")
    words = {
        "extract": ["extract", str(base), str(tuned), "--rank", "8", "--to", "comfyui", "-o", out],
        "delta": ["delta", str(base), str(tuned)],
        "merge": ["merge", str(base), str(one), "-o", out],
        "resize": ["resize", str(one), "--rank", "4", "-o", out],
        "compare": ["compare", str(one), str(other)],
    }[verb]
    done = subprocess.run(
        [sys.executable, "-m", "loratool", *words, "--device", "cuda"], capture_output=True, text=True, check=False
    )
    # Adapters that differ are exit 1 of `compare`.
    assert done.returncode in ((0, 1) if verb == "compare" else (0,)), done.stderr
    assert "Traceback" not in done.stderr


@needs_cuda
def test_every_verb_comes_to_the_same_on_a_gpu(tmp_path: Path) -> None:
    assert factor_verbs(tmp_path, tmp_path / "gpu", "cuda") == pytest.approx(
        factor_verbs(tmp_path, tmp_path / "cpu", "cpu"), rel=1e-4
    )
