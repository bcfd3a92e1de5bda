"""Mutants of real files of every kind, for every verb: an output, or an error in words, and nothing else.

A file is one module of one kind, as its trainer writes it, with the config that it needs; its base has that module's weight.
Mutants have other shapes, dtypes and numbers, leaves that are missing, doubled or empty, and other values in the config.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratool.cli import cli

Shape = tuple[int, ...]
STEM: Final = "base_model.model.layers.0.q_proj"
FLAT: Final = "lora_unet_layers_0_q_proj"


@dataclass(frozen=True)
class Sort:
    """A file of one kind: the shape of its weight, its tensors by key, and PEFT's config, None for a file without one."""

    weight: Shape
    tensors: Mapping[str, Shape]
    config: Mapping[str, Any] | None = field(default=None)


def _flat(weight: Shape, /, **leaves: Shape) -> Sort:
    return Sort(weight, {f"{FLAT}.{leaf.replace('__', '.')}": shape for leaf, shape in leaves.items()})


def _peft(kind: str, weight: Shape, leaves: Mapping[str, Shape], **config: Any) -> Sort:
    said = {"peft_type": kind, "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    return Sort(weight, {f"{STEM}.{leaf}": shape for leaf, shape in leaves.items()}, said)


_LORA: Final = {"lora_A.weight": (2, 8), "lora_B.weight": (12, 2)}
SORTS: Final[Mapping[str, Sort]] = {
    "lora": _flat((12, 8), lora_down__weight=(2, 8), lora_up__weight=(12, 2), alpha=()),
    "locon": _flat((12, 8, 3, 3), lora_down__weight=(2, 8, 3, 3), lora_up__weight=(12, 2, 1, 1), alpha=()),
    "tucker": _flat((12, 8, 3, 3), lora_down__weight=(2, 8, 1, 1), lora_mid__weight=(2, 2, 3, 3),
                    lora_up__weight=(12, 2, 1, 1), alpha=()),
    "dora": _flat((12, 8), lora_down__weight=(2, 8), lora_up__weight=(12, 2), dora_scale=(12, 1), alpha=()),
    "enlarge": _flat((12, 8), lora_down__weight=(2, 10), lora_up__weight=(12, 2), reshape_weight=(2,), alpha=()),
    "loha": _flat((12, 8), hada_w1_a=(12, 2), hada_w1_b=(2, 8), hada_w2_a=(12, 2), hada_w2_b=(2, 8), alpha=()),
    "loha, tucker": _flat((12, 8, 3, 3), hada_w1_a=(2, 12), hada_w1_b=(2, 8), hada_t1=(2, 2, 3, 3), hada_w2_a=(2, 12),
                          hada_w2_b=(2, 8), hada_t2=(2, 2, 3, 3), alpha=()),
    "lokr": _flat((12, 8), lokr_w1=(4, 2), lokr_w2=(3, 4), alpha=()),
    "lokr, factored": _flat((12, 8), lokr_w1_a=(4, 2), lokr_w1_b=(2, 2), lokr_w2_a=(3, 2), lokr_w2_b=(2, 4), alpha=()),
    "lokr, tucker": _flat((12, 8, 3, 3), lokr_w1=(4, 2), lokr_w2_a=(2, 3), lokr_w2_b=(2, 4), lokr_t2=(2, 2, 3, 3),
                          alpha=()),
    "glora": _flat((12, 8), a1__weight=(8, 2), a2__weight=(2, 8), b1__weight=(12, 2), b2__weight=(2, 8), alpha=()),
    "(ia)3": _flat((12, 8), weight=(12, 1), on_input=()),
    "diag oft": _flat((12, 8), oft_blocks=(6, 2, 2), rescale=(12, 1), alpha=()),
    "boft": _flat((16, 8), oft_blocks=(3, 4, 4, 4), alpha=()),
    "full": _flat((12, 8), diff=(12, 8), diff_b=(12,)),
    "norm": _flat((12,), w_norm=(12,), b_norm=(12,)),
    "peft": _peft("LORA", (12, 8), _LORA),
    "peft, dora": _peft("LORA", (12, 8), {**_LORA, "lora_magnitude_vector": (12,)}, use_dora=True),
    "peft, bias": _peft("LORA", (12, 8), {**_LORA, "lora_B.bias": (12,)}, lora_bias=True),
    "peft, embedding": _peft("LORA", (12, 8), {"lora_embedding_A": (2, 12), "lora_embedding_B": (8, 2)}),
    "peft, tokens": _peft("LORA", (12, 8), {**_LORA, "token_adapter.trainable_tokens_delta": (2, 8)},
                          trainable_token_indices=[1, 3]),
    "peft, saved": _peft("LORA", (12, 8), {"modules_to_save.weight": (12, 8)}, modules_to_save=["q_proj"]),
    "adalora": _peft("ADALORA", (12, 8), {"lora_A": (2, 8), "lora_B": (12, 2), "lora_E": (2, 1)}, init_r=2),
    "peft ia3": _peft("IA3", (12, 8), {"ia3_l": (12, 1)}, feedforward_modules=[]),
    "peft oft": _peft("OFT", (12, 8), {"oft_R.weight": (2, 6)}, use_cayley_neumann=True, num_cayley_neumann_terms=5),
    "peft boft": _peft("BOFT", (12, 16), {"boft_R": (2, 4, 4, 4), "boft_s": (12, 1)}),
    "vera": Sort((12, 8), {f"{STEM}.vera_lambda_b": (12,), f"{STEM}.vera_lambda_d": (2,),
                           "base_model.vera_A": (2, 8), "base_model.vera_B": (12, 2)}, {"peft_type": "VERA", "r": 2}),
    "loralib": Sort((12, 8), {"layers.0.q_proj.lora_A": (2, 8), "layers.0.q_proj.lora_B": (12, 2)}),
}  # fmt: skip
DTYPES: Final = (
    torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64,
    torch.uint8, torch.bool,
)  # fmt: skip
VALUES: Final = (0.0, 1.0, -0.0, float("nan"), float("inf"), 1e-45, 3e38, -1.0)
VERBS: Final = (
    "inspect {0}", "inspect --values {0}", "hash {0}", "merge base.safetensors {0}{alpha} -o out.safetensors",
    "merge base.safetensors {0}{alpha} -o out.safetensors --undo undo.st", "convert {0}{alpha} --to diffusers -o out",
    "convert {0}{alpha} --to kohya --to-lora --rank 1 --base base.safetensors -o out", "convert {0}{alpha} --to peft -o out",
    "resize {0}{alpha} --rank 1 -o out", "combine {0} {0} -o out", "compare {0} {0} --base base.safetensors",
    "edit {0} --scale *=2 -o out", "delta {0} --base base.safetensors", "delta {0} -o out",
    "check {0} --for vllm", "check {0} --for comfyui --base base.safetensors", "meta show {0}",
    "swap base.safetensors --out {0} --in {0}:0.5 -o out.safetensors", "unmerge base.safetensors {0} -o out.safetensors",
)  # fmt: skip
"""Every verb that reads an adapter; `report`, which draws what these compute, takes a second, and is tried by itself."""


def _reshape(shape: Shape, chance: random.Random) -> Shape:
    """A shape with one dimension more, less, or of another size."""
    sizes = list(shape)
    if not sizes:
        return (chance.randrange(3),)
    place = chance.randrange(len(sizes))
    change: Callable[[int], int] = chance.choice(
        (lambda _: 0, lambda _: 1, lambda size: size + 1, lambda size: max(size - 1, 0), lambda size: 2 * size)
    )
    how = chance.randrange(8)
    if how == 0:
        del sizes[place]
    elif how == 1:
        sizes.insert(place, chance.randrange(3))
    elif how == 2:
        chance.shuffle(sizes)
    else:
        sizes[place] = change(sizes[place])
    return tuple(sizes)


def _tensor(key: str, shape: Shape, chance: random.Random) -> Tensor:
    if key.endswith(".alpha"):
        return torch.full(shape, 2.0)
    if key.endswith("reshape_weight"):
        return torch.tensor([12, 10][: shape[0] if shape else 0])
    if key.endswith("on_input"):
        return torch.zeros(shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    return 0.2 * torch.randn(shape, generator=generator) + (1.0 if "magnitude" in key or "dora_scale" in key else 0.0)


def _change_dtype(tensors: dict[str, Tensor], key: str, chance: random.Random) -> None:
    tensors[key] = tensors[key].to(chance.choice(DTYPES))


def _change_values(tensors: dict[str, Tensor], key: str, chance: random.Random) -> None:
    if tensors[key].is_floating_point():
        # Dtypes of one byte hold no large numbers.
        value = chance.choice(VALUES[:3] if tensors[key].dtype.itemsize == 1 else VALUES)
        tensors[key] = torch.full(tensors[key].shape, value, dtype=torch.float32).to(tensors[key].dtype)


def _leave_out(tensors: dict[str, Tensor], key: str, chance: random.Random) -> None:
    del tensors[key]


def _double(tensors: dict[str, Tensor], key: str, chance: random.Random) -> None:
    names = (
        key.replace("layers", "model.layers"), f"{key}.weight", key.replace("lora_unet_", "lora_te_"), f"x.{key}",
        key.replace("weight", "bias"), key.replace(".q_proj", ".q_proj.base_layer"),
    )  # fmt: skip
    tensors[chance.choice(names)] = tensors[key].clone()


CHANGES: Final = (_change_dtype, _change_values, _leave_out, _double)
ODD: Final[tuple[Any, ...]] = (
    None, 0, 1, -1, 3, 2**70, 0.5, "x", [], {}, [1], {"q_proj": 1}, True, False, {".*": 2}, "(a|aa)*" * 30 + "z",
)  # fmt: skip
"""Values for the fields of a config."""


def _change_config(config: dict[str, Any], chance: random.Random) -> None:
    config[chance.choice([*config, "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"])] = chance.choice(ODD)


def write_mutant(folder: Path, name: str, seed: int) -> Path:
    """Writes the base, and a mutant of the file called `name`, into `folder`, which is emptied; returns the mutant's path.
    With seed 0 it is the file itself."""
    chance, sort = random.Random(seed), SORTS[name]
    shapes, config = dict(sort.tensors), None if sort.config is None else dict(sort.config)
    changes = [chance.randrange(8) for _ in range(chance.choice((1, 1, 1, 2, 3)) if seed else 0)]
    for _ in range(sum(change >= len(CHANGES) for change in changes)):
        key = chance.choice(list(shapes))
        shapes[key] = _reshape(shapes[key], chance)
    tensors = {key: _tensor(key, shape, chance) for key, shape in shapes.items()}
    for change in changes:
        if change < len(CHANGES) and tensors:
            CHANGES[change](tensors, chance.choice(list(tensors)), chance)
        elif config is not None and chance.random() < 0.3:
            _change_config(config, chance)
    return _write(folder, sort.weight, tensors, config)


def _write(folder: Path, weight: Shape, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Path:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    generator = torch.Generator().manual_seed(7)
    base = {
        "layers.0.q_proj.weight": torch.randn(weight, generator=generator),
        "layers.0.q_proj.bias": torch.zeros(weight[:1]),
    }
    save_file(base, folder / "base.safetensors", {"format": "pt"})
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if config is None:
        save_file(contiguous, folder / "adapter", {"format": "pt"})
    else:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        save_file(contiguous, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    return folder / "adapter"


def run_verb(folder: Path, name: str, seed: int, verb: str) -> tuple[int, str]:
    """Runs a verb on a mutant, in this process and in `folder`, where it stands; returns the exit code and what was said.

    Raises whatever is not an error in words, and `AssertionError` where a merge wrote numbers that are none.
    """
    # A file of loralib says nowhere what its alpha is.
    mutant = write_mutant(folder, name, seed)
    words = verb.format(mutant.name, alpha=" --alpha 4" if name == "loralib" else "").split()
    done = CliRunner().invoke(cli, words)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code not in (0, 1):
        raise AssertionError(f"exit {done.exit_code}: {done.output[-300:]}")
    out = folder / "out.safetensors"
    if done.exit_code == 0 and out.exists():
        merged = load_file(out)
        # The base has ordinary numbers and one shape: an adapter that was let through keeps both, but for rows added.
        assert all(bool(tensor.isfinite().all()) for tensor in merged.values()), "numbers that are none"
        if "--undo" in words:
            back = CliRunner().invoke(cli, ["unmerge", "out.safetensors", "--undo", "undo.st", "-o", "back.safetensors"])
            assert back.exit_code == 0, back.output
            assert (folder / "back.safetensors").read_bytes() == (folder / "base.safetensors").read_bytes()
    return done.exit_code, done.output
