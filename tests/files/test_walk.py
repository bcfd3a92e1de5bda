"""What belongs to a model's folder, and what an output of it takes over."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from loratool.files.walk import foreign_files, walk_model
from tests.conftest import FIXTURES, Run

BLOB = "0123456789abcdef" * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "tokenizer").mkdir(parents=True)
    for name in ("config.json", "tokenizer/vocab.txt", ".env", ".loratool-x.lock", "x.tmp", "model.safetensors"):
        (root / name).write_text(name)
    (tmp_path / "private").write_text("private")
    return root


def test_hidden_files_locks_and_links_that_lead_out_are_no_part(folder: Path) -> None:
    os.symlink("../private", folder / "README.md")
    os.symlink("..", folder / "above")
    os.symlink("tokenizer", folder / "tokenizer_2")
    os.symlink(".", folder / "tokenizer" / "round")
    blob = folder.parent / "models--o--n" / "blobs" / BLOB
    blob.parent.mkdir(parents=True)
    blob.write_text("from the hub")
    os.symlink(blob, folder / "generation_config.json")
    found = walk_model(folder)
    assert found.files == (
        "config.json", "generation_config.json", "model.safetensors", "tokenizer/vocab.txt", "tokenizer_2/vocab.txt",
    )  # fmt: skip
    assert found.outside == ("README.md", "above")


def test_what_is_no_models_is_listed(folder: Path) -> None:
    (folder / "thesis.txt").write_text("three years of work")
    (folder / "mine.safetensors").write_text("another's")
    assert foreign_files(folder, []) == [".env", "mine.safetensors", "thesis.txt", "x.tmp"]
    assert foreign_files(folder, ["mine.safetensors", "thesis.txt", ".env", "x.tmp"]) == []


def test_a_merge_follows_no_link_out_and_says_so(tmp_path: Path, invoke: Run) -> None:
    shutil.copytree(FIXTURES / "llama", tmp_path / "base")
    (tmp_path / "secret").write_text("private")
    os.symlink("../secret", tmp_path / "base" / "chat_template.jinja")
    done = invoke("merge", "base", FIXTURES / "llama-lora", "-o", "out")
    assert done.returncode == 0
    assert "left out chat_template.jinja" in done.stderr
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    shard = tmp_path / "base" / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    os.symlink("../elsewhere.safetensors", shard)
    done = invoke("merge", "base", FIXTURES / "llama-lora", "-o", "out2")
    assert done.returncode == 1
    assert "is a link that leads out of the folder" in done.stderr


def test_what_is_made_of_a_private_file_is_private(tmp_path: Path, invoke: Run) -> None:
    shutil.copy(FIXTURES / "sdxl.safetensors", tmp_path / "base.safetensors")
    os.chmod(tmp_path / "base.safetensors", 0o600)
    assert invoke("merge", "base.safetensors", FIXTURES / "detail.safetensors", "-o", "o.safetensors").returncode == 0
    assert (tmp_path / "o.safetensors").stat().st_mode & 0o777 == 0o600
