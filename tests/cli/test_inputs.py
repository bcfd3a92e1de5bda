"""Inputs as people have them: names on the hub, answered by a small server; patterns, ~, standard input."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from loratool.cli import cli
from tests.conftest import FIXTURES, Run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as downloads ask for: what a repository holds, and its files."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/"):
            self._repository(path.removeprefix("/api/models/"))
        else:
            name, _, rest = path.lstrip("/").partition("/resolve/")
            self._file(self.root / name / rest.partition("/")[2])

    def _repository(self, rest: str) -> None:
        name, tree, asked = rest.partition("/tree/" if "/tree/" in rest else "/revision/")
        folder, revision = self.root / name, asked.partition("/")[0]
        if not folder.is_dir():
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("", "main", "v1", COMMIT):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        if tree == "/tree/":
            found = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files]
            return self._answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
        siblings = [{"rfilename": file} for file in files]
        document = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        self._answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        raw = path.read_bytes()
        etag = f'"{hashlib.sha256(raw).hexdigest()}"'
        self._answer(200, raw, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    class Mine(Hub):
        root = tmp_path / "hub"
        asked: list[str] = []  # noqa: RUF012

    for name, source in (("org/lora", "llama-lora"), ("org/model", "llama")):
        shutil.copytree(FIXTURES / source, Mine.root / name)
    (Mine.root / "org/model/pytorch_model.bin").write_bytes(b"evil")
    for name in ("org/style", "org/several"):
        (Mine.root / name).mkdir()
        shutil.copy(FIXTURES / "style.safetensors", Mine.root / name)
    shutil.copy(FIXTURES / "detail.safetensors", Mine.root / "org/several")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Mine.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield Mine
    server.shutdown()
    server.server_close()


def hubs(tmp_path: Path, hub: type[Hub], *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command whose hub is the small server."""
    here = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}  # type: ignore[attr-defined]
    command = [sys.executable, "-m", "loratool", *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **here, **environment}, check=False
    )


def test_models_and_adapters_come_from_the_hub(tmp_path: Path, hub: type[Hub], invoke: Run) -> None:
    done = hubs(tmp_path, hub, "merge", "org/model@v1", "hf:org/lora:0.5", "-o", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert not [path for path in hub.asked if path.endswith(".bin")]
    assert invoke("merge", FIXTURES / "llama", f"{FIXTURES / 'llama-lora'}:0.5", "-o", "own").returncode == 0
    assert "every number" in invoke("compare", "own", "out").stdout
    assert "history     merge org/lora:0.5" in invoke("inspect", "out").stdout
    again = hubs(tmp_path, hub, "inspect", "hf:org/lora", HF_HUB_OFFLINE="1")
    assert (again.returncode, "PEFT folder" in again.stdout) == (0, True)


def test_one_file_of_a_repository(tmp_path: Path, hub: type[Hub]) -> None:
    assert "style.safetensors" in hubs(tmp_path, hub, "inspect", "hf:org/style").stdout
    assert "detail.safetensors" in hubs(tmp_path, hub, "inspect", "hf:org/several@v1/detail.safetensors").stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf:org/nothing", "is not on the hub, or is private"),
        ("org/nothing", "org/nothing: no such file or folder here; and "),
        ("hf:org/lora@v2", "has no revision v2"),
        ("hf:org/lora/missing.safetensors", "has no such file"),
        ("hf:org/several", "name one, such as hf:org/several/detail.safetensors"),
        ("hf:lora", "expected hf:ORG/NAME"),
    ],
)
def test_what_the_hub_has_not_is_explained(tmp_path: Path, hub: type[Hub], name: str, said: str) -> None:
    done = hubs(tmp_path, hub, "inspect", name)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {name}: ")
    assert said in done.stderr


def test_a_hub_that_cannot_be_reached_is_an_error(tmp_path: Path, hub: type[Hub]) -> None:
    done = hubs(tmp_path, hub, "inspect", "hf:org/lora", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    done = hubs(tmp_path, hub, "inspect", "hf:org/lora", HF_HUB_OFFLINE="1")
    assert "is not in the cache, and the hub cannot be reached" in done.stderr


def test_without_its_library_the_hub_is_an_error(monkeypatch: pytest.MonkeyPatch, invoke: Run) -> None:
    monkeypatch.setattr("loratool.files.hub.find_spec", lambda name: None)
    assert "pip install 'loratool[hub]'" in invoke("inspect", "hf:org/lora").stderr


def test_home_patterns_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Run) -> None:
    for name in ("style", "detail"):
        shutil.copy(FIXTURES / f"{name}.safetensors", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert invoke("inspect", "~/style.safetensors").returncode == 0
    names = [found["path"] for found in json.loads(invoke("hash", "*.safetensors", "--json").stdout)]
    assert names == ["detail.safetensors", "style.safetensors"]
    assert "nothing*: matches no file" in invoke("inspect", "nothing*").stderr
    raw = (tmp_path / "style.safetensors").read_bytes()
    done = CliRunner().invoke(cli, ["hash", "-", "--json"], input=io.BytesIO(raw))
    assert json.loads(done.stdout)[0]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert not Path(json.loads(done.stdout)[0]["path"]).exists()
