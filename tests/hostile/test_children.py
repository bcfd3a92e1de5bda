"""Nothing is run or read from the folder that one stands in, which may be a stranger's, unless it was named."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool
from tests.conftest import FIXTURES, Run
from tests.hostile.test_pickles import saved

ROOT = Path(loratool.__file__).parent
STARTERS = {
    "subprocess", "multiprocessing", "runpy", "pty", "ProcessPoolExecutor", "system", "popen", "fork", "forkpty",
    "posix_spawn", "posix_spawnp", "startfile", "create_subprocess_exec", "create_subprocess_shell", "spawn", "execv",
    *(f"{way}{how}" for way in ("exec", "spawn") for how in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
}  # fmt: skip
"""Every name by which Python starts another process, or code of a file."""
STRANGERS = ("torch.py", "zipfile.py", "subprocess.py", "resource.py", "safetensors/__init__.py", "numpy.py", "click.py")


def starters_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(alias.name for alias in node.names))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "asyncio", "concurrent.futures"):
            yield node.attr


def test_one_place_starts_processes_and_they_are_isolated() -> None:
    found = {
        str(path.relative_to(ROOT)): names for path in ROOT.rglob("*.py") if (names := STARTERS & set(starters_in(path)))
    }
    assert found == {"files/pickles.py": {"subprocess"}}
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "files" / "pickles.py").read_text()))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "command"
    ]
    (command,) = calls
    assert ast.unparse(command.value).startswith("[sys.executable, '-I', os.path.abspath(")


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A folder whose modules leave a mark when they are imported."""
    for name in STRANGERS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    return tmp_path


def test_a_pickle_is_read_without_the_modules_that_lie_beside_it(strange: Path, run: Run) -> None:
    factors = load_file(FIXTURES / "llama-lora" / "adapter_model.safetensors")
    (strange / "adapter").mkdir()
    (strange / "adapter" / "adapter_model.bin").write_bytes(saved(factors))
    config = (FIXTURES / "llama-lora" / "adapter_config.json").read_text()
    (strange / "adapter" / "adapter_config.json").write_text(config)
    done = run("merge", FIXTURES / "llama", "adapter", "-o", "out", "--allow-pickle")
    assert done.returncode == 0, done.stderr
    assert not (strange / "ran").exists()


def test_the_child_alone_imports_nothing_from_there(strange: Path) -> None:
    """Started as it is, whatever PYTHONPATH says."""
    (strange / "a.bin").write_bytes(saved({"a": torch.ones(2)}))
    script = "import sys; sys.path.remove(''); from loratool.files.pickles import open_pickle; from pathlib import Path\n"
    script += "with open_pickle(Path('a.bin')) as header: print(list(header.tensors))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=strange, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.stdout, done.stderr) == ("['a']\n", "")
    assert not (strange / "ran").exists()


@pytest.mark.parametrize(
    "settings",
    [
        b"text.usetex: True\nfigure.dpi: 1e9\nsvg.fonttype: path\n",
        pytest.param(b"\xff\xfe", marks=pytest.mark.slow),
    ],
)
def test_charts_are_drawn_by_our_settings(tmp_path: Path, run: Run, settings: bytes) -> None:
    pages = []
    for name in ("before.html", "after.html"):
        done = run("report", FIXTURES / "detail.safetensors", "-o", name)
        assert (done.returncode, done.stderr) == (0, "")
        pages.append((tmp_path / name).read_bytes())
        (tmp_path / "matplotlibrc").write_bytes(settings)
    assert pages[0] == pages[1]
