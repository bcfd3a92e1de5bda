"""Pickles from strangers: refused unless they are asked for, and then read where they can do no harm."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import FIXTURES, Run

Tensors = dict[str, torch.Tensor]


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def saved(document: object, **how: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(document, stream, **how)
    return stream.getvalue()


def deflated(raw: bytes) -> bytes:
    """The same archive, with its members compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as before, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as after:
        for member in before.infolist():
            after.writestr(member.filename, before.read(member))
    return stream.getvalue()


FACTORS = {"base_model.model.q.lora_A.weight": torch.ones(2, 8), "base_model.model.q.lora_B.weight": torch.ones(8, 2)}
PICKLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "code": (lambda: pickle.dumps(Evil()), "restricted loader refuses it"),
    "code in an archive": (lambda: saved({"a": Evil()}), "restricted loader refuses it"),
    "code in the old format": (
        lambda: saved({"a": Evil()}, _use_new_zipfile_serialization=False),
        "restricted loader refuses it",
    ),
    "a bomb": (lambda: deflated(saved({"a": torch.zeros(1 << 24)})), "would inflate to"),
    "a terabyte in a kilobyte": (
        lambda: saved({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}),
        "claim more bytes than the file has",
    ),
    "empty": (lambda: b"", "cannot be read as a pickle of tensors"),
    "cut": (lambda: saved(FACTORS)[:-200], "pickle"),
    "no tensors": (lambda: saved({"a": 1}), "does not hold a dictionary of tensors"),
    "a list": (lambda: saved([torch.ones(2)]), "does not hold a dictionary of tensors"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_is_allowed_can_do_no_harm(tmp_path: Path, invoke: Run, name: str) -> None:
    build, said = PICKLES[name]
    (tmp_path / "adapter.bin").write_bytes(build())
    base = FIXTURES / "llama"
    done = invoke("merge", base, "adapter.bin", "-o", "out", "--allow-pickle", "--alpha", "2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: adapter.bin: ")
    assert said in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.bin"}


@pytest.mark.parametrize("name", ["code", "no tensors"])
def test_a_pickle_is_refused_with_the_way_to_take(tmp_path: Path, invoke: Run, name: str) -> None:
    (tmp_path / "adapter.bin").write_bytes(PICKLES[name][0]())
    done = invoke("merge", FIXTURES / "llama", "adapter.bin", "-o", "out")
    assert done.returncode == 1
    assert "--allow-pickle" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.bin"}
