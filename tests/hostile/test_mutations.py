"""Sound files after some changes of their bytes, through every verb: an output or one error, and never a traceback."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import mutated
from tests.conftest import FIXTURES, Run, examples
from tests.hostile.cases import CONFIG, base_tensors, lora, peft, stored

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

VERBS = {
    "inspect": "inspect --values {0}",
    "convert": "convert {0} --to diffusers -o {1}",
    "merge": "merge base.safetensors {0} -o {1}",
    "resize": "resize {0} --rank 1 -o {1}",
    "combine": "combine {0} {0} -o {1}",
    "compare": "compare {0} {0}",
    "edit": "edit {0} --scale *=2 -o {1}",
    "delta": "delta {0} -o {1}",
    "undo": "merge base.safetensors {0} -o {1} --undo {1}.undo",
}
mutants = settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ends_rightly(place: Path, invoke: Run, words: list[str]) -> None:
    """Runs a command whose output, if there is one, is called out; it is removed again."""
    before = {path.name for path in place.iterdir()}
    done = invoke(*words)
    assert done.returncode in (0, 1)
    if done.returncode == 1 and words[0] != "compare":
        assert {path.name for path in place.iterdir()} == before, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
    for name in {path.name for path in place.iterdir()} - before:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("verb", VERBS)
@given(seed=st.integers(0, 2**32))
@mutants
def test_adapters(tmp_path: Path, invoke: Run, verb: str, seed: int) -> None:
    (tmp_path / "base.safetensors").write_bytes(stored(base_tensors()))
    (tmp_path / "adapter").write_bytes(mutated(stored(lora(), {"ss_network_dim": "2"}), random.Random(seed)))
    ends_rightly(tmp_path, invoke, VERBS[verb].format("adapter", "out").split())


@pytest.mark.parametrize("verb", ["merge", "resize", "inspect"])
@given(seed=st.integers(0, 2**32))
@mutants
def test_configs(tmp_path: Path, invoke: Run, verb: str, seed: int) -> None:
    (tmp_path / "base.safetensors").write_bytes(stored(base_tensors()))
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    peft(CONFIG)(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    raw = path.read_bytes()
    path.write_bytes(mutated(len(raw).to_bytes(8, "little") + raw, random.Random(seed))[8:])
    ends_rightly(tmp_path, invoke, VERBS[verb].format("adapter", "out").split())


@pytest.mark.parametrize(
    "verb", ["merge base llama-lora -o out", "extract base llama-tuned --rank 1 -o out", "delta base llama-tuned"]
)
@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"])
@given(seed=st.integers(0, 2**32))
@settings(mutants, max_examples=examples(60))
def test_bases(tmp_path: Path, invoke: Run, verb: str, file: str, seed: int) -> None:
    shutil.rmtree(tmp_path / "base", ignore_errors=True)
    shutil.copytree(FIXTURES / "llama", tmp_path / "base")
    for name in ("llama-lora", "llama-tuned"):
        shutil.copytree(FIXTURES / name, tmp_path / name, dirs_exist_ok=True)
    raw = (tmp_path / "base" / file).read_bytes()
    prefix = b"" if file.endswith(".safetensors") else len(raw).to_bytes(8, "little")
    (tmp_path / "base" / file).write_bytes(mutated(prefix + raw, random.Random(seed))[len(prefix) :])
    ends_rightly(tmp_path, invoke, verb.split())


@pytest.mark.parametrize("what", ["headers", "formats"])
def test_a_short_fuzz_finds_nothing(what: str) -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz", "--what", what, "--count", "20000"]
    done = subprocess.run(command, cwd=FIXTURES.parent, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
