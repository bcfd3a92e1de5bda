"""What a file says of itself, changed: no byte of its tensors is, and hashes stay true."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool import LoratoolError, inspect
from loratool.files.header import read_header
from loratool.verbs.hash import hash_file
from loratool.verbs.meta.meta import copy_metadata, delete_metadata, read_metadata, set_metadata, strip_metadata
from tests.conftest import FIXTURES, Run, examples
from tests.models import kohya, save

LORA = FIXTURES / "llama-lora"
TRAINED = {
    "ss_network_dim": "2",
    "ss_output_name": "cats",
    "ss_sd_model_name": "/home/alice/models/sd_xl_base_1.0.safetensors",
    "ss_vae_name": "C:\\Users\\alice\\vae\\sdxl_vae.safetensors",
    "ss_session_id": "123",
    "ss_dataset_dirs": json.dumps({"5_my secret cats": {"n_repeats": 5, "img_count": 40}}),
    "ss_tag_frequency": json.dumps({"5_my secret cats": {"cat": 40, "photo by alice": 3}}),
    "ss_datasets": json.dumps(
        [
            {
                "subsets": [{"image_dir": "5_my secret cats", "img_count": 40}],
                "tag_frequency": {"5_my secret cats": {"cat": 40}},
            }
        ]
    ),
    "ss_network_args": json.dumps({"config": "~/lora/config.toml"}),
    "ot_config": json.dumps({"workspace_dir": "/workspace/run"}),
    "modelspec.author": "alice",
    "modelspec.title": "Cats, by Alice",
    "modelspec.license": "CC-BY-SA-4.0",
    "ss_bucket_info": '{"buckets": {"0": {"resolution": [1024, 768], "count": 40}}}',
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(kohya({"lora_unet_q": (8, 8)}, 2, 1.0), path, TRAINED)
    return path


def data_of(path: Path) -> bytes:
    return path.read_bytes()[read_header(path).data_start :]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(st.dictionaries(text, text, max_size=5))
@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_is_stored_as_it_is_and_the_tensors_stay(file: Path, values: dict[str, str]) -> None:
    values = {key: value for key, value in values.items() if not key.startswith("modelspec.")}
    data, before = data_of(file), read_metadata(file)
    set_metadata(file, values, file.with_name("b"), overwrite=True)
    set_metadata(file, values)
    for path in (file, file.with_name("b")):
        assert read_metadata(path) == before | values
        assert data_of(path) == data
        with safetensors.safe_open(path, "pt") as opened:
            assert opened.metadata() == before | values


def test_keys_are_deleted_copied_and_stripped(file: Path) -> None:
    other = file.with_name("other.safetensors")
    safetensors.torch.save_file(kohya({"lora_unet_k": (8, 8)}, 2, 1.0), other, {"mine": "1", "format": "pt"})
    report = delete_metadata(file, ["ss_*", "ot_config"])
    assert read_metadata(file).keys() == {"modelspec.author", "modelspec.title", "modelspec.license"}
    assert "ss_network_dim" in report.removed
    with pytest.raises(LoratoolError, match="has no metadata called ss_none"):
        delete_metadata(file, ["ss_none"])
    copy_metadata(file, other, ["modelspec.t*"])
    assert read_metadata(other) == {"mine": "1", "format": "pt", "modelspec.title": "Cats, by Alice"}
    strip_metadata(other)
    assert read_metadata(other) == {"format": "pt"}


def test_hashes_stay_true_and_are_not_copied(tmp_path: Path, invoke: Run) -> None:
    assert invoke("resize", FIXTURES / "style.safetensors", "--rank", "2", "-o", "a.safetensors").returncode == 0
    for line in ("meta set a.safetensors ss_x=y --in-place", "meta delete a.safetensors ss_* -o b.safetensors"):
        assert invoke(*line.split()).returncode == 0
    assert all(hash_file(tmp_path / name).true for name in ("a.safetensors", "b.safetensors"))
    shutil.copy(FIXTURES / "detail.safetensors", tmp_path / "c.safetensors")
    copy_metadata(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert not {"sshs_model_hash", "loratool"} & read_metadata(tmp_path / "c.safetensors").keys()


def test_what_is_private_goes_and_what_was_learnt_stays(file: Path) -> None:
    report = strip_metadata(file, private=True)
    after = read_metadata(file)
    told = json.dumps(after, ensure_ascii=False).lower()
    for secret in ("alice", "secret", "/home", "users", "workspace", "~/"):
        assert secret not in told, secret
    assert json.loads(after["ss_dataset_dirs"]) == {"dataset 1": {"n_repeats": 5, "img_count": 40}}
    assert after["ss_sd_model_name"] == "sd_xl_base_1.0.safetensors"
    assert after["ss_vae_name"] == "sdxl_vae.safetensors"
    assert {key: after[key] for key in ("ss_network_dim", "ss_output_name", "ss_bucket_info", "modelspec.license")} == {
        key: TRAINED[key] for key in ("ss_network_dim", "ss_output_name", "ss_bucket_info", "modelspec.license")
    }
    assert {"ot_config", "modelspec.author", "ss_session_id"} <= set(report.removed)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("modelspec.date=yesterday", "expected a date such as"),
        ("modelspec.resolution=big", "expected WIDTHxHEIGHT"),
        ("modelspec.architecture=SD XL", "expected an identifier"),
        ("modelspec.thumbnail=cat.jpg", "expected an image as data:image/jpeg"),
        ("modelspec.hash_sha256=0x12", "expected 0x and 64"),
        (f"modelspec.hash_sha256=0x{'0' * 64}", "the file's is 0x"),
        ("nothing", "expected KEY=VALUE"),
    ],
)
def test_a_value_that_is_not_allowed_is_explained(file: Path, invoke: Run, pair: str, said: str) -> None:
    before = file.read_bytes()
    done = invoke("meta", "set", file, pair, "--in-place")
    assert done.returncode == 1
    assert said in done.stderr
    assert file.read_bytes() == before


def test_the_specification_is_held_up(file: Path, invoke: Run) -> None:
    values = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.date": "2026-07-16T18:13:38Z",
        "modelspec.hash_sha256": "0x" + hashlib.sha256(data_of(file)).hexdigest(),
    }
    assert "asks for modelspec.sai_model_spec, modelspec.architecture" in set_metadata(file, {"a": "b"}).warnings[0]
    done = invoke("meta", "set", file, *(f"{key}={value}" for key, value in values.items()), "--in-place")
    assert (done.returncode, done.stderr) == (0, "")
    assert "modelspec.colour: no key of the specification" in set_metadata(file, {"modelspec.colour": "x"}).warnings[0]


def test_what_readers_need_is_not_taken(tmp_path: Path, invoke: Run) -> None:
    assert invoke("convert", FIXTURES / "style.safetensors", "--to", "diffusers", "-o", "a.safetensors").returncode == 0
    done = invoke("meta", "delete", "a.safetensors", "lora_adapter_metadata", "--in-place")
    assert done.returncode == 1
    assert "would be read as another" in done.stderr
    before = inspect(tmp_path / "a.safetensors")
    strip_metadata(tmp_path / "a.safetensors")
    after = inspect(tmp_path / "a.safetensors")
    assert after.alphas == before.alphas  # type: ignore[union-attr]


def test_folders_links_and_outputs(tmp_path: Path, invoke: Run) -> None:
    assert invoke("meta", "set", LORA, "a=b", "-o", "copy").returncode == 0
    assert read_metadata(tmp_path / "copy")["a"] == "b"
    assert (tmp_path / "copy" / "adapter_config.json").read_bytes() == (LORA / "adapter_config.json").read_bytes()
    done = invoke("meta", "set", LORA, "a=b", "-o", "copy")
    assert "exists; pass --overwrite" in done.stderr
    (tmp_path / "link.safetensors").symlink_to(FIXTURES / "style.safetensors")
    done = invoke("meta", "set", "link.safetensors", "a=b", "--in-place")
    assert done.returncode == 1
    assert "not a plain file" in done.stderr
    assert invoke("meta", "set", LORA, "a=b").returncode == 2
    os.chmod(tmp_path / "copy" / "adapter_model.safetensors", 0o640)
    assert invoke("meta", "set", "copy", "c=d", "--in-place").returncode == 0
    assert (tmp_path / "copy" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o640


def test_show_prints_all_of_it_safely(file: Path, invoke: Run) -> None:
    set_metadata(file, {"evil\x1b[31m": "\x1b]8;;http://x\x07 [bold]"})
    done = invoke("meta", "show", file)
    assert "\x1b" not in done.stdout
    assert "[bold]" in done.stdout
    assert json.loads(invoke("meta", "show", file, "ss_network_dim", "--json").stdout) == {"ss_network_dim": "2"}
    assert "has no metadata called nothing" in invoke("meta", "show", file, "nothing").stderr
    report = json.loads(invoke("meta", "delete", file, "ss_output_name", "--in-place", "--json").stdout)
    assert report["removed"] == ["ss_output_name"]


def test_values_that_look_like_arguments_are_shown_as_they_are(tmp_path: Path, invoke) -> None:
    save(tmp_path / "a.safetensors", kohya({"lora_unet_a": (8, 8)}, 2, 1.0), note="pass `base=` or `to='kohya'`")
    assert "pass `base=` or `to='kohya'`" in invoke("meta", "show", "a.safetensors").stdout
