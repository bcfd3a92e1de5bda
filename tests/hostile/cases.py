"""Adapters as strangers send them: bad, odd and hostile ones, and sound ones beside them.

Each case writes an adapter for `base_tensors`, and says how a run that changes weights should end with it.
"""
# ruff: noqa: E501, C901  a table has a row for each case

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratool.files.tensors import DTYPE_NAMES, tensor_bytes

GOOD, WARNS, BAD, MISFIT, EITHER = "good", "warns", "bad", "misfit", "either"
"""It succeeds; with a warning; it is refused; only what knows the base refuses it; or any of these, but no traceback."""

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
OTHER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v"
PATHS = {STEM: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"}
PATHS[OTHER] = PATHS[STEM].replace("to_q", "to_v")
SHAPE = (12, 8)
CODES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def base_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{path}.weight": torch.randn(SHAPE, generator=generator) for path in PATHS.values()}
    return tensors | {"conv_in.weight": torch.randn(4, 4, 3, 3, generator=generator)}


def lora(stem: str = STEM, rank: int = 2, dtype: torch.dtype = torch.float32, **leaves: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{stem}.lora_down.weight": 0.1 * torch.randn(rank, SHAPE[1], generator=generator),
        f"{stem}.lora_up.weight": 0.1 * torch.randn(SHAPE[0], rank, generator=generator),
        f"{stem}.alpha": torch.tensor(float(rank)),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {
        f"{stem}.{leaf}": tensor for leaf, tensor in leaves.items()
    }


def entries(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """The header's entries and the data of tensors, one behind the other."""
    document: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        raw = bytes(tensor_bytes(tensor.contiguous())) if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        document[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    return document, data


def packed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def stored(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> bytes:
    document, data = entries(tensors)
    if metadata is not None:
        document = {"__metadata__": metadata, **document}
    return packed(json.dumps(document).encode(), data)


@dataclass(frozen=True)
class Case:
    """A name, how it ends, and what it writes at a path; `file` is the adapter's name, `folder` that it is a PEFT folder."""

    name: str
    ends: str
    write: Callable[[Path], None]
    file: str = "adapter.safetensors"


def of_bytes(name: str, ends: str, raw: bytes | Callable[[], bytes], file: str = "adapter.safetensors") -> Case:
    def write(path: Path) -> None:
        path.write_bytes(raw() if callable(raw) else raw)

    return Case(name, ends, write, file)


def of_tensors(name: str, ends: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Case:
    return of_bytes(f"adapter: {name}", ends, lambda: stored(tensors, metadata))


def changed(**entry: Any) -> bytes:
    """A sound file but for one tensor's entry."""
    document, data = entries(lora())
    first = next(iter(document))
    document[first] = {**document[first], **entry}
    return packed(json.dumps(document).encode(), data)


def raw_header(text: str | bytes, data: bytes = b"") -> bytes:
    return packed(text if isinstance(text, bytes) else text.encode(), data)


def container() -> Iterator[Case]:
    good = stored(lora())
    document, data = entries(lora())
    names = list(document)
    yield of_bytes("sound", GOOD, good)
    yield of_bytes("empty file", BAD, b"")
    yield of_bytes("seven bytes", BAD, b"\0" * 7)
    yield of_bytes("eight zeros", BAD, b"\0" * 8)
    yield of_bytes("zeros", BAD, b"\0" * 4096)
    for length in (0, 1, 2**63, 2**64 - 1, 99 << 20, 25_000_001, len(good)):
        yield of_bytes(f"header of {length} bytes, it says", BAD, packed(b"{}", b"", length))
    for text in ("[]", "null", "1", '"x"', "{", "{]", "", "\ufeff{}", "nan", "{'a': 1}"):
        yield of_bytes(f"header {text!r}", BAD, raw_header(text))
    yield of_bytes("header not UTF-8", BAD, raw_header(b'{"\xff\xfe": 1}'))
    yield of_bytes("header of brackets", BAD, raw_header("[" * 100_000))
    yield of_bytes("header of nested objects", BAD, raw_header('{"a":' * 50_000 + "1" + "}" * 50_000))
    yield of_bytes("empty header", BAD, raw_header("{}"))
    whole = json.dumps(document)
    entry = json.dumps(document[names[0]])
    twice = f'{whole[:-1]},"{names[0]}":{entry}}}'
    yield of_bytes("duplicate tensor", BAD, raw_header(twice, data))
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in names[0])
    yield of_bytes("duplicate tensor behind escapes", BAD, raw_header(f'{whole[:-1]},"{escaped}":{entry}}}', data))
    yield of_bytes(
        "duplicate field", BAD, raw_header(whole.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F16"', 1), data)
    )
    yield of_bytes("duplicate metadata", BAD, raw_header('{"__metadata__":{"a":"1","a":"2"},' + whole[1:], data))
    yield of_bytes("duplicate __metadata__", BAD, raw_header('{"__metadata__":{},"__metadata__":{},' + whole[1:], data))
    for metadata in ("1", "[]", '{"a": 1}', '{"a": null}', '{"a": {"b": "c"}}', '"x"'):
        yield of_bytes(f"metadata {metadata}", BAD, raw_header(f'{{"__metadata__":{metadata},{whole[1:]}', data))
    for dtype in ("F33", "", "f32", None, 5, "I4"):
        yield of_bytes(f"dtype {dtype!r}", BAD, lambda dtype=dtype: changed(dtype=dtype))  # type: ignore[misc]
    for shape in (
        [2],
        [8, 2, 1, 1, 1, 2],
        [-2, -8],
        [2.0, 8],
        ["2", 8],
        None,
        16,
        [2**32, 2**32],
        [2**63, 2],
        [True, 16],
        [10**400],
    ):
        yield of_bytes(f"shape {str(shape)[:30]}", BAD, lambda shape=shape: changed(shape=shape))  # type: ignore[misc]
    for offsets in (
        [0, 63],
        [0, 65],
        [64, 0],
        [-1, 63],
        [0.0, 64],
        [0],
        [0, 64, 64],
        None,
        "0-64",
        [0, 2**64],
        [32, 96],
        [1, 65],
    ):
        yield of_bytes(f"offsets {offsets}", BAD, lambda offsets=offsets: changed(data_offsets=offsets))  # type: ignore[misc]
    minus = whole.replace('"data_offsets": [0,', '"data_offsets": [-0,', 1)
    yield of_bytes("an offset of minus zero", BAD, raw_header(minus, data))
    missing = {**document, names[0]: {"dtype": "F32", "shape": [2, 8]}}
    yield of_bytes("no offsets", BAD, raw_header(json.dumps(missing), data))
    yield of_bytes("entry that is no object", BAD, raw_header(json.dumps({**document, "x": 1}), data))
    yield of_bytes("trailing bytes", BAD, good + b"PK\x03\x04evil")
    yield of_bytes("cut by a byte", BAD, good[:-1])
    yield of_bytes("cut in half", BAD, good[: len(good) // 2])
    yield of_bytes("cut in its header", BAD, good[:40])
    yield of_bytes("overlap", BAD, overlapping)
    yield of_bytes("hole", BAD, holed)
    yield of_bytes("a git-lfs pointer", BAD, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    yield of_bytes("a login page", BAD, b"<!DOCTYPE html><html><title>Log in</title></html>" * 40)
    yield of_bytes("GGUF", BAD, b"GGUF\x03\x00\x00\x00" + b"\0" * 200)
    yield of_bytes("gzip", BAD, gzip.compress(good))
    yield of_bytes("zip", BAD, b"PK\x03\x04" + b"\0" * 500)
    yield of_bytes("a pickle inside", BAD, pickle.dumps({"a": [1, 2, 3]}))
    yield of_bytes("a JSON file", BAD, json.dumps({"a": 1}).encode() * 30)
    yield of_bytes("blanks before the header", EITHER, packed(b"   " + whole.encode(), data))
    yield of_bytes("blanks behind the header", GOOD, packed(whole.encode() + b" " * 40, data))
    for letters, title in ((b"\x80\x04", "a pickle"), (b"\x8b\x1f", "gzip, nearly"), (b"GG", "GGUF, nearly")):
        wanted = int.from_bytes(letters + b"\0" * 6, "little")
        if wanted >= len(whole):
            yield of_bytes(f"a header as long as {title} begins", GOOD, packed(whole.encode().ljust(wanted), data))
    yield of_tensors("empty tensor", BAD, lora() | {f"{OTHER}.lora_up.weight": torch.zeros(0, 2)})
    many = {f"junk{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    yield of_bytes("twenty thousand empty tensors", BAD, raw_header(json.dumps(many)))
    yield of_bytes("ten thousand dimensions", BAD, lambda: changed(shape=[1] * 10_000))
    yield of_bytes("an integer of five thousand digits", BAD, raw_header('{"a":' + "9" * 5000 + "}"))
    yield of_bytes("a lone surrogate", BAD, raw_header('{"\\ud800": 1}'))
    yield of_bytes("NaN in the header", BAD, raw_header('{"a": NaN}'))


def overlapping() -> bytes:
    document, data = entries(lora())
    one, other, *_ = document
    document[other] = {**document[one]}
    return packed(json.dumps(document).encode(), data)


def holed() -> bytes:
    document, data = entries(lora())
    last = list(document)[-1]
    start, stop = document[last]["data_offsets"]
    document[last]["data_offsets"] = [start + 8, stop + 8]
    return packed(json.dumps(document).encode(), data[:start] + b"\0" * 8 + data[start:])


def said() -> Iterator[Case]:
    """What an adapter may say of itself."""
    plain = {name: tensor for name, tensor in lora().items() if not name.endswith("alpha")}
    yield of_tensors("without alpha", GOOD, plain)
    for value, ends in ((-1.0, GOOD), (0.0, WARNS), (1e-3, GOOD), (1e6, GOOD)):
        yield of_tensors(f"alpha {value}", ends, plain | {f"{STEM}.alpha": torch.tensor(value)})
    yield of_tensors("alpha of shape [1]", GOOD, plain | {f"{STEM}.alpha": torch.tensor([2.0])})
    for dtype in (torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int32, torch.uint8):
        yield of_tensors(f"alpha in {dtype}", GOOD, plain | {f"{STEM}.alpha": torch.tensor(2.0).to(dtype)})
    for value in (float("nan"), float("inf"), float("-inf")):
        yield of_tensors(f"alpha {value}", BAD, plain | {f"{STEM}.alpha": torch.tensor(value)})
    yield of_tensors("alpha of shape [2]", BAD, plain | {f"{STEM}.alpha": torch.tensor([2.0, 2.0])})
    yield of_tensors("alpha of shape [0]", BAD, plain | {f"{STEM}.alpha": torch.zeros(0)})
    yield of_tensors("alpha that is a boolean", EITHER, plain | {f"{STEM}.alpha": torch.tensor(True)})
    up, down = f"{STEM}.lora_up.weight", f"{STEM}.lora_down.weight"
    yield of_tensors("no up", BAD, {name: each for name, each in lora().items() if name != up})
    yield of_tensors("no down", BAD, {name: each for name, each in lora().items() if name != down})
    yield of_tensors("alpha alone", BAD, {f"{STEM}.alpha": torch.tensor(1.0)})
    for name, ups, downs in (
        ("unlike ranks", (12, 3), (2, 8)),
        ("rank 0", (12, 0), (0, 8)),
        ("up that would broadcast", (1, 2), (2, 8)),
        ("down that would broadcast", (12, 2), (2, 1)),
        ("up and down swapped", (2, 8), (12, 2)),
        ("one-dimensional factors", (12,), (8,)),
        ("scalars", (), ()),
        ("too wide", (12, 2), (2, 9)),
        ("too tall", (13, 2), (2, 8)),
        ("three dimensions", (12, 2, 1), (2, 8, 1)),
        ("a rank above both sides", (12, 40), (40, 8)),
    ):
        misfits = ("up that would broadcast", "down that would broadcast", "too wide", "too tall")
        ends = {"a rank above both sides": GOOD, "three dimensions": EITHER}.get(name, MISFIT if name in misfits else BAD)
        yield of_tensors(name, ends, {up: 0.1 * torch.ones(ups), down: 0.1 * torch.ones(downs)})
    yield of_tensors("both spellings of one module", BAD, lora() | {f"{STEM}.lora_A.weight": torch.ones(2, 8)})
    yield of_tensors("both spellings, whole", BAD, lora() | {
        f"{STEM}.lora_A.weight": torch.ones(2, 8), f"{STEM}.lora_B.weight": torch.ones(12, 2)})  # fmt: skip
    for value in (float("nan"), float("inf"), float("-inf")):
        for name in (up, down):
            bad = lora()
            bad[name][1, 1] = value
            yield of_tensors(f"{value} in {name.rpartition('.lora_')[2]}", BAD, bad)
    yield of_tensors("an up of zeros", WARNS, lora() | {up: torch.zeros(12, 2)})
    yield of_tensors("everything zero", WARNS, {name: torch.zeros_like(each) for name, each in lora().items()})
    yield of_tensors("an unknown suffix", BAD, lora(magic=torch.ones(2)))
    yield of_tensors("a junk key", BAD, lora() | {"hello": torch.ones(2)})
    yield of_tensors("a module without a target", MISFIT, lora() | lora(STEM.replace("to_q", "to_x")))
    yield of_tensors("only modules without a target", MISFIT, lora("lora_unet_nowhere"))
    yield of_tensors("a key like a path", MISFIT, lora("../../../etc/passwd"))
    yield of_tensors("a full checkpoint", BAD, base_tensors())
    yield of_tensors("integers as factors", EITHER, {up: torch.ones(12, 2, dtype=torch.int8), down: torch.ones(2, 8)})
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2):
        yield of_tensors(f"factors in {dtype}", GOOD, lora(dtype=dtype))
    large = {
        up: torch.full((12, 2), 300.0).half(),
        down: torch.full((2, 8), 300.0).half(),
        f"{STEM}.alpha": torch.tensor(0.01),
    }
    yield of_tensors("a product that float16 would overflow", GOOD, large)
    yield of_tensors(
        "a product that overflows float32", MISFIT, {up: torch.full((12, 2), 3e38), down: torch.full((2, 8), 3e38)}
    )
    yield of_tensors("two modules", GOOD, lora() | lora(OTHER, 3))
    yield of_tensors("a DoRA", GOOD, lora(dora_scale=torch.rand(12, 1) + 0.5))
    yield of_tensors("a DoRA of a wrong shape", BAD, lora(dora_scale=torch.rand(5, 1)))
    yield of_tensors("a difference", GOOD, {f"{STEM}.diff": 0.1 * torch.ones(SHAPE)})
    yield of_tensors("a difference of a wrong shape", MISFIT, {f"{STEM}.diff": 0.1 * torch.ones(8, 12)})
    yield of_tensors("a difference that would broadcast", MISFIT, {f"{STEM}.diff": 0.1 * torch.ones(12, 1)})


def printed() -> Iterator[Case]:
    """What would reach the terminal."""
    evil = "\x1b[31mred\x1b]8;;http://x\x07\u202e\u0085\x00[/][link=http://x]:skull:\r\n"
    yield of_tensors("escapes in a key", BAD, lora() | {f"junk{evil}": torch.ones(1)})
    yield of_tensors("escapes in a module", MISFIT, lora(f"lora_unet_{evil}"))
    yield of_tensors("escapes in metadata", GOOD, lora(), {evil: evil, "ss_output_name": evil, "modelspec.title": evil})
    yield of_tensors("markup in metadata", GOOD, lora(), {"ss_output_name": "[/] [bold]x[/bold] :skull:"})
    yield of_tensors("a key of a megabyte", BAD, lora() | {"x" * (1 << 20): torch.ones(1)})
    tags = json.dumps({"tags": {f"tag {i}": i for i in range(100_000)}})
    yield of_tensors("megabytes of tags", GOOD, lora(), {"ss_tag_frequency": tags})
    yield of_tensors(
        "tags nested sixty thousand deep", GOOD, lora(), {"ss_tag_frequency": '{"a":' * 60_000 + "1" + "}" * 60_000}
    )
    yield of_tensors(
        "tags that are no JSON", GOOD, lora(), {"ss_tag_frequency": "{{{{", "ss_network_args": "[1,", "loratool": "x"}
    )
    yield of_tensors(
        "numbers that are none", GOOD, lora(), {"ss_network_dim": "many", "ss_network_alpha": "NaN", "ss_steps": "-"}
    )
    yield of_tensors("config in metadata that is no JSON", EITHER, lora(), {"lora_adapter_metadata": "{"})
    yield of_tensors("config in metadata that is a list", EITHER, lora(), {"lora_adapter_metadata": "[]"})
    yield of_tensors("an empty key", BAD, lora() | {"": torch.ones(1)})


PEFT_STEM = f"base_model.model.{PATHS[STEM]}"


def peft(config: object, tensors: Mapping[str, Tensor] | None = None) -> Callable[[Path], None]:
    """Writes a PEFT folder: its config as JSON, as text, or not at all (None)."""

    def write(path: Path) -> None:
        path.mkdir()
        found = lora(PEFT_STEM) if tensors is None else tensors
        spelled = {
            name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor
            for name, tensor in found.items()
            if not name.endswith("alpha")
        }
        (path / "adapter_model.safetensors").write_bytes(stored(spelled))
        if config is not None:
            (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))

    return write


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}


def configs() -> Iterator[Case]:
    def case(name: str, ends: str, config: object, tensors: Mapping[str, Tensor] | None = None) -> Case:
        return Case(f"config: {name}", ends, peft(config, tensors), "adapter")

    yield case("sound", GOOD, CONFIG)
    yield case("missing", WARNS, None)
    for text in ("", "{", "[]", "null", "1", "\ufeff{}", '{"r": 1, "r": 2}', '{"r": NaN}', "[" * 100_000, "\x00"):
        yield case(f"{text[:20]!r}", BAD, text)
    for field, value, ends in (
        ("r", 8, EITHER), ("r", "2", EITHER), ("r", None, EITHER), ("r", -1, EITHER), ("r", 0, EITHER), ("r", 2.5, EITHER),
        ("r", [2], EITHER), ("lora_alpha", None, EITHER), ("lora_alpha", "2", BAD), ("lora_alpha", True, BAD),
        ("lora_alpha", [2], BAD), ("lora_alpha", -2, GOOD), ("lora_alpha", 0, WARNS), ("peft_type", "LOHA", BAD),
        ("peft_type", "MAGIC", BAD), ("peft_type", None, EITHER), ("peft_type", 5, BAD), ("use_dora", True, BAD),
        ("use_rslora", True, GOOD), ("use_rslora", "yes", EITHER), ("target_modules", None, GOOD), ("target_modules", 5, EITHER),
        ("target_modules", r"(\w+\.?)+!", GOOD), ("base_model_name_or_path", "/dev/zero", GOOD),
        ("base_model_name_or_path", "http://localhost:1/x", GOOD),
        ("auto_mapping", {"base_model_class": "os", "parent_library": "antigravity"}, GOOD),
        ("rank_pattern", {"to_q": 2}, GOOD), ("rank_pattern", 5, EITHER), ("rank_pattern", {"(": 2}, EITHER),
        ("rank_pattern", {r"(\w+\.?)+!": 2}, EITHER), ("alpha_pattern", {r"(a+)+$" : 2}, EITHER),
        ("alpha_pattern", {r"(\w+\.?)+!": 2}, EITHER), ("alpha_pattern", {"to_q": "x"}, BAD), ("alpha_pattern", [], EITHER),
        ("alpha_pattern", {"to_q": None}, EITHER), ("modules_to_save", ["x"], GOOD), ("fan_in_fan_out", True, EITHER),
        ("bias", "all", GOOD), ("init_lora_weights", "pissa", EITHER), ("layers_to_transform", "x", EITHER), ("r", 10**30, EITHER),
    ):  # fmt: skip
        yield case(f"{field} = {json.dumps(value)[:40]}", ends, {**CONFIG, field: value})
    yield case("r that is left out", EITHER, {key: value for key, value in CONFIG.items() if key != "r"})
    yield case("nested a thousand deep", EITHER, {**CONFIG, "x": json.loads("[" * 900 + "]" * 900)})
    yield case("escapes", GOOD, {**CONFIG, "base_model_name_or_path": "\x1b[31m[/]\u202e"})
    yield case("an evil .bin beside it", GOOD, CONFIG)


def paths() -> Iterator[Case]:
    def fifo(path: Path) -> None:
        os.mkfifo(path)

    def loop(path: Path) -> None:
        path.symlink_to(path.name)

    def link(path: Path) -> None:
        target = path.with_name("blob")
        target.write_bytes(stored(lora()))
        path.symlink_to(target)

    yield Case("path: a FIFO", BAD, fifo)
    yield Case("path: a loop of links", BAD, loop)
    yield Case("path: a link to a sound file", GOOD, link)
    yield Case("path: a device", BAD, lambda path: path.symlink_to("/dev/zero"))
    yield Case("path: a folder", BAD, lambda path: path.mkdir())
    yield Case("path: nothing", BAD, lambda path: None)
    for name in (
        "a b.safetensors",
        'it\'s "quoted".safetensors',
        "new\nline.safetensors",
        "esc\x1b[31m.safetensors",
        "ünï.safetensors",
    ):
        yield of_bytes(f"path: {name!r}", GOOD, stored(lora()), name)
    yield of_bytes("path: without an ending", GOOD, stored(lora()), "adapter")
    yield of_bytes("pickle: a .bin", BAD, pickle.dumps({}), "adapter_model.bin")
    yield of_bytes("pickle: a .ckpt", BAD, pickle.dumps({}), "adapter.ckpt")
    yield of_bytes("pickle: empty", BAD, b"", "adapter.pt")


CASES = [*container(), *said(), *printed(), *configs(), *paths()]
