"""What the benchmarks share: synthetic models of real shapes, timing in turns, and the peak memory of a process."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def noise(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 0.02) -> torch.Tensor:
    """Random weights, quickly: one small random tensor repeated, which no step of a merge can tell from noise."""
    count = 1
    for dimension in shape:
        count *= dimension
    tile = (scale * torch.randn(min(count, 1 << 20))).to(dtype)
    return tile.repeat(-(-count // tile.numel()))[:count].reshape(shape)


def llama(
    folder: Path,
    layers: int,
    hidden: int = 2048,
    inner: int = 5632,
    key_value: int = 256,
    vocabulary: int = 32000,
    *,
    tied: bool = False,
    shards: int = 4,
) -> Path:
    """A Llama-shaped folder in bf16 (TinyLlama-1.1B has 22 layers), sharded, with a config that transformers loads."""
    folder.mkdir(parents=True)
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    tables = ("model.embed_tokens.weight",) if tied else ("model.embed_tokens.weight", "lm_head.weight")
    names: dict[str, tuple[int, ...]] = dict.fromkeys(tables, (vocabulary, hidden))
    names["model.norm.weight"] = (hidden,)
    for i in range(layers):
        block = f"model.layers.{i}"
        names |= {f"{block}.self_attn.{name}.weight": shape for name, shape in shapes.items()}
        names |= {f"{block}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        names |= {f"{block}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    weight_map = {}
    ordered = sorted(names)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = ordered[number * len(ordered) // shards : (number + 1) * len(ordered) // shards]
        save_file({name: noise(names[name], torch.bfloat16) for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": key_value // 64,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def finetune(folder: Path, base: Path, rank: int = 64, strength: float = 0.004) -> Path:
    """`base` after a fine-tuning that changed all its linear layers: by `rank` directions of falling strength, and then by
    rounding to bf16."""
    from safetensors.torch import load_file

    shutil.copytree(base, folder)
    falling = torch.arange(1, rank + 1) ** -0.7
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        for name, weight in tensors.items():
            if name.endswith("_proj.weight"):
                up, down = torch.randn(len(weight), rank), torch.randn(rank, weight.shape[1])
                tensors[name] = (weight.float() + strength * (up * falling) @ down).to(weight.dtype)
        save_file(tensors, shard, {"format": "pt"})
    return folder


def peft_adapter(folder: Path, base: Path, rank: int = 16) -> Path:
    """A PEFT adapter in fp32 on all linear layers of `base`."""
    from loratool.files.layout import open_layout

    folder.mkdir(parents=True)
    tensors: Tensors = {}
    for name, (_, info) in open_layout(base).tensors.items():
        if name.endswith("_proj.weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = 0.02 * torch.randn(rank, info.shape[1])
            tensors[f"{stem}.lora_B.weight"] = 0.02 * torch.randn(info.shape[0], rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def sdxl_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of SDXL's U-Net under diffusers' names, from the header among the fixtures."""
    path = Path(__file__).parent.parent / "fixtures" / "headers" / "base-sdxl-unet-diffusers.json.gz"
    return {name: tuple(shape) for name, (_, shape) in json.loads(gzip.decompress(path.read_bytes())).items()}


def sdxl(path: Path, lora: Path, rank: int) -> tuple[Path, Path]:
    """An SDXL-shaped fp16 U-Net in one file under diffusers' names, and a kohya adapter for it."""
    save_file({name: noise(shape, torch.float16) for name, shape in sdxl_shapes().items()}, path)
    return path, sdxl_lora(lora, rank)


def sdxl_lora(path: Path, rank: int) -> Path:
    """A kohya adapter in fp16 for all of SDXL's U-Net, convolutions included, whose directions are of falling strength."""
    from tests.models import linear_shapes

    on_meta = {name: torch.empty(shape, device="meta") for name, shape in sdxl_shapes().items()}
    falling = (torch.arange(1, rank + 1) ** -0.7).half()
    tensors: Tensors = {}
    for stem, shape in linear_shapes(on_meta, "lora_unet_", conv=True).items():
        ones = (1,) * len(shape[2:])
        tensors[f"{stem}.lora_down.weight"] = noise((rank, *shape[1:]), torch.float16)
        tensors[f"{stem}.lora_up.weight"] = noise((shape[0], rank, *ones), torch.float16) * falling.view(-1, *ones)
        tensors[f"{stem}.alpha"] = torch.tensor(float(rank), dtype=torch.float16)
    save_file(tensors, path)
    return path


def flux(path: Path, rank: int) -> Path:
    """A LoRA in bf16 on every linear layer of FLUX.1's blocks, under diffusers' names, with factors of its own for each."""
    from tests.archs.architectures import shapes

    tensors: Tensors = {}
    for name, shape in shapes("flux1").items():
        if name.endswith(".weight") and len(shape) == 2 and "blocks." in name:
            stem = f"transformer.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = noise((rank, shape[1]), torch.bfloat16)
            tensors[f"{stem}.lora_B.weight"] = noise((shape[0], rank), torch.bfloat16)
    save_file(tensors, path)
    return path


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


PAUSE_SECONDS = 4
"""Virtual machines with free page reporting give freed memory back to their host within about two seconds, and whoever
writes next pays for getting it again: `cp` after a pause was seen to take three times as long as `cp` at once. Our own
process starts for two seconds, so everything that is timed waits first."""


def in_turns(works: Mapping[str, Callable[[], float]], rounds: int, prepare: Callable[[], None]) -> dict[str, float]:
    """The median of what each work returns, taken in turns so that a noisy minute hits all of them, each from one state."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            prepare()
            os.sync()  # what an earlier turn left unwritten must not slow the next one down
            time.sleep(PAUSE_SECONDS)
            taken[name].append(work())
    return {name: statistics.median(figures) for name, figures in taken.items()}


def copy(source: Path, target: Path, *, sync: bool) -> float:
    """Seconds that `cp -r` takes, and with `sync` until the bytes are on the disk, as our outputs are when we return."""
    seconds = timed(lambda: subprocess.run(["cp", "-r", source, target], check=True))
    files = [path for path in (target, *target.rglob("*")) if path.is_file()]
    return seconds + (timed(lambda: subprocess.run(["sync", *files], check=True)) if sync else 0)


def loratool(*words: str | Path) -> dict[str, float]:
    """Runs a command in a process of its own and returns its JSON report, with the `whole` seconds of the process."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "loratool", *map(str, words), "--json"], capture_output=True, check=True)
    return {**json.loads(done.stdout), "whole": time.perf_counter() - started}


def peak_of(*words: str | Path) -> int:
    """Peak memory of a process of ours that runs a command."""
    process = subprocess.Popen([sys.executable, "-m", "loratool", *map(str, words), "-q"])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024


def import_bytes(module: str) -> int:
    """Peak memory of a process that imports `module` and does nothing else."""
    code = f"import {module}; print(int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) * 1024)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def clear(path: Path) -> None:
    """Removes a file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def machine() -> str:
    """What the figures were taken on."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    return f"{len(os.sched_getaffinity(0))} × {cpu}, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
