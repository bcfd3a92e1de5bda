"""The command line: words to calls, reports to tables or JSON, errors to one line and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratool import Rule, Selection, WeightedAdapter, check, combine, convert, extract, merge, resize
from loratool.cli.options import parse_component_strengths, parse_weighted_adapter
from loratool.errors import LoratoolError, UnknownName
from loratool.text import histogram, safe, size
from tests.conftest import FIXTURES, Run
from tests.models import kohya, save

LLAMA, LORA = FIXTURES / "llama", FIXTURES / "llama-lora"


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:1e-2", "a.safetensors", 0.01),
        ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors", 1.0),
        ("C:\\loras\\a.safetensors:0.8", "C:\\loras\\a.safetensors", 0.8),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        ("a:b.safetensors:0", "a:b.safetensors", 0.0),
    ],
)
def test_a_strength_is_what_follows_the_last_colon_if_it_is_a_number(text: str, path: str, strength: float) -> None:
    assert parse_weighted_adapter(text) == WeightedAdapter(Path(path), strength)


def test_an_existing_file_whose_name_ends_like_a_strength_is_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("take:2").touch()

    assert parse_weighted_adapter("take:2") == WeightedAdapter(Path("take:2"), 1.0)


@pytest.mark.parametrize(("short", "dtype"), [("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16"), ("bfloat16", "BF16")])
def test_dtypes_go_by_the_names_that_trainers_give_them_too(short: str, dtype: str, invoke: Run) -> None:
    style = FIXTURES / "style.safetensors"
    assert invoke("resize", style, "-o", "a.safetensors", "--rank", "2", "--dtype", short).returncode == 0
    report = json.loads(invoke("inspect", "--json", "a.safetensors").stdout)
    assert dtype in report["dtypes"]


def test_components_have_names_and_numbers() -> None:
    assert parse_component_strengths(("te1=0.5", "unet=0")) == {"te1": 0.5, "unet": 0.0}
    for wrong in ("te9=1", "te1", "te1=x"):
        with pytest.raises(LoratoolError, match="--component"):
            parse_component_strengths((wrong,))


def test_merge_reports_what_it_did(tmp_path: Path, run) -> None:
    done = run("merge", LLAMA, f"{LORA}:0.5", "-o", "out")

    assert done.returncode == 0
    assert done.stderr == ""
    assert "14 matched" in done.stdout
    assert "14 changed, 7 copied" in done.stdout
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_json_is_one_document_with_everything(run) -> None:
    report = json.loads(run("merge", "--json", LLAMA, LORA, "-o", "out").stdout)

    assert report["matched"] == 14
    assert report["adapters"] == [[str(LORA), 1.0]]
    assert report["seconds"] > 0


def test_quiet_prints_nothing(run) -> None:
    done = run("merge", "-q", LLAMA, LORA, "-o", "out")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["merge", LLAMA, "missing.safetensors", "-o", "out"], 1, "missing.safetensors: No such file"),
        (["merge", "missing", LORA, "-o", "out"], 1, "missing: No such file"),
        (["merge", LORA, LLAMA, "-o", "out"], 1, "adapter"),
        (["merge", LLAMA, FIXTURES / "style.safetensors", "-o", "out"], 1, "722 of 722 modules have no target"),
        (["merge", LLAMA, LORA, "-o", "no/where/out"], 1, "does not exist"),
        (["merge", LLAMA, LORA, "-o", "x" * 300], 1, "File name too long"),
        (["merge", LLAMA, f"{LORA}:nan", "-o", "out"], 1, "not a finite number"),
        (["merge", LLAMA, LORA], 2, "give either -o OUT, or --in-place"),
        (["merge", LLAMA, LORA, "-o", "out", "--dtype", "int8"], 2, "Invalid value"),
        (["inspect", "missing.safetensors"], 1, "missing.safetensors"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(tmp_path: Path, run, words: list[str], code: int, said: str) -> None:
    done = run(*words)

    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [[], ["inspect"], ["merge"]])
def test_every_help_page_has_words_and_commands_an_example(run, words: list[str]) -> None:
    page = run(*words, "-h")

    assert page.returncode == 0
    assert "Usage:" in page.stdout
    assert not words or "Example:" in page.stdout


@pytest.mark.parametrize("columns", ["0", "1", "-5", "abc", "40"])
def test_any_width_will_do(run, columns: str) -> None:
    assert run("inspect", "--modules", LORA, COLUMNS=columns).returncode == 0


def test_ascii_terminals_get_escapes(run) -> None:
    assert run("inspect", "--values", LORA, PYTHONIOENCODING="ascii", LC_ALL="C").returncode == 0


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m loratool inspect --json {LORA} {LORA} {LORA} | head -0"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)

    assert done.stderr == ""


def test_a_full_standard_output_is_an_error_in_words() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "loratool", "inspect", str(LORA)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_names_from_files_cannot_control_the_terminal(tmp_path: Path, run) -> None:
    save(tmp_path / "base.safetensors", {"fc.weight": torch.zeros(4, 4)})
    save(tmp_path / "a.safetensors", kohya({"lora_unet_\x1b[31mred\u202e": (4, 4)}, 1, 1.0))

    done = run("merge", "base.safetensors", "a.safetensors", "-o", "out.safetensors")

    assert done.returncode == 1
    assert "\x1b" not in done.stderr
    assert "\u202e" not in done.stderr
    assert "\\x1b[31mred" in done.stderr


def test_text_from_outside_is_made_safe_and_short() -> None:
    assert safe("a\x1b[2J\n\u202eb\x9b") == "a\\x1b[2J\\n\\u202eb\\x9b"
    assert safe("x" * 500) == "x" * 200 + "…"
    assert safe("naïve ΔW [bold] :skull:") == "naïve ΔW [bold] :skull:"


def test_sizes_and_histograms_are_short() -> None:
    assert [size(nbytes) for nbytes in (999, 1000, 999_499, 999_999, 999_999_999)] == [
        "999 bytes",
        "1 kB",
        "999 kB",
        "1 MB",
        "1 GB",
    ]
    assert [size(n) for n in (0, 999, 85_300_000, 6_940_000_000)] == ["0 bytes", "999 bytes", "85.3 MB", "6.94 GB"]
    assert histogram({16: 700, 8: 88}) == "16 ×700, 8 ×88"


def test_the_module_runs_like_the_command(run, tmp_path: Path) -> None:
    assert run("--version").stdout.startswith("loratool, version")
    run(
        "merge",
        "-q",
        FIXTURES / "sdxl.safetensors",
        FIXTURES / "style.safetensors",
        "-o",
        "one.safetensors",
        "--round",
        "stochastic",
    )
    assert load_file(tmp_path / "one.safetensors")


def test_zero_is_an_answer(invoke: Run) -> None:
    done = invoke("resize", FIXTURES / "style.safetensors", "-o", "a.safetensors", "--max-error", "0")
    assert "the largest error is 0.00e+00" in done.stderr
    done = invoke("resize", FIXTURES / "style.safetensors", "-o", "b.safetensors", "--total-error", "0")
    assert "the total error is 0, expected a share between 0 and 1" in done.stderr


def test_one_string_is_not_several(tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="takes several globs"):
        Selection(include="*q_proj*")  # type: ignore[arg-type]
    for wrong in (str(LORA), LORA, []):
        with pytest.raises(LoratoolError, match=r"such as a list of one|name at least one adapter"):
            merge(LLAMA, wrong, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(LoratoolError, match=r"the strength '0\.5' is no number"):
        merge(LLAMA, [WeightedAdapter(LORA, "0.5")], tmp_path / "out")  # type: ignore[arg-type]


def test_names_that_there_are_not_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for call, known in (
        (lambda: convert(LORA, out, "peftt"), "did you mean peft"),
        (lambda: convert(LORA, out, "kohya", arch="sdxll"), "did you mean sdxl"),
        (lambda: combine([LORA], out, method="tie"), "there are sum, ties"),
        (lambda: resize(LORA, out, Rule("rank", 2), dtype="F16"), "float32, float16, bfloat16"),
        (lambda: check(LORA, "vlm"), "did you mean vllm"),
        (lambda: Rule("rnk", 2), "did you mean rank"),
        (lambda: extract(LLAMA, LLAMA, out, Rule("rank", 2), split="both"), "there are even, up, down"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UnknownName, match=known):
            call()
    with pytest.raises(LoratoolError, match="density"):
        combine([LORA], out, Rule("rank", 2), method="ties", density=7)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "words",
    [
        ("resize", FIXTURES / "style.safetensors", "--rank", "2"),
        ("resize", FIXTURES / "style.safetensors", "--size", "300kB"),
        ("combine", FIXTURES / "style.safetensors", FIXTURES / "detail.safetensors"),
        ("combine", FIXTURES / "style.safetensors", FIXTURES / "detail.safetensors", "--rank", "2"),
        ("combine", FIXTURES / "style.safetensors", FIXTURES / "detail.safetensors", "--size", "300kB"),
        ("extract", LLAMA, FIXTURES / "llama-tuned", "--rank", "2", "--to", "peft-file"),
        ("delta", FIXTURES / "style.safetensors", "--to", "kohya"),
        ("convert", FIXTURES / "style.safetensors", "--to", "diffusers", "--to-lora"),
        ("convert", FIXTURES / "style.safetensors", "--to-lora"),
    ],
    ids=lambda words: " ".join(str(getattr(word, "stem", word)) for word in words),
)
def test_every_verb_that_stores_what_it_computes_takes_every_dtype(
    words: tuple[str | Path, ...], dtype: str, invoke: Run
) -> None:
    done = invoke(*words, "--dtype", dtype, "-o", "out.safetensors")
    assert done.returncode == 0, done.stderr
    if words[0] in ("extract", "delta") or "--rank" in words:
        stored = load_file("out.safetensors")
        factors = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", ".diff")
        assert {str(tensor.dtype) for name, tensor in stored.items() if name.endswith(factors)} == {f"torch.{dtype}"}
