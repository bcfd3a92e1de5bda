"""The report in a real browser: nothing is fetched or run, it reads in the light and the dark, and fits a telephone."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool import LoratoolError
from loratool.verbs.meta.meta import set_metadata
from loratool.verbs.report import charts
from loratool.verbs.report.report import report
from tests.conftest import FIXTURES, Run
from tests.models import save

STYLE, LORA = FIXTURES / "style.safetensors", FIXTURES / "llama-lora"
TAGS = {"1_folder": {"watercolor": 40, "cat": 9, "<script>document.title='run'</script>": 3, "x" * 500: 1}}
EVIL = "</title><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">\x1b[31m\u202e"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report about two adapters, one of which has metadata that wants out."""
    folder = tmp_path_factory.mktemp("report")
    named = folder / "st<b>yle & co.safetensors"
    shutil.copy(STYLE, named)
    values = {"ss_tag_frequency": json.dumps(TAGS), "ss_training_comment": EVIL, "modelspec.title": EVIL, "ss_steps": "100"}
    set_metadata(named, values)
    report([named, STYLE], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = shutil.which("chromedriver")
    if CHROMIUM is None or driver is None:
        pytest.skip("no Chromium and chromedriver here")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update",
                 "disable-sync", "no-first-run"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, Service(driver))
    yield found
    found.quit()


def shown(browser: Any, page: Path, width: int, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of rgb(…)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_charts_can_be_read(browser: Any, page: Path, scheme: str) -> None:
    shown(browser, page, 1100, scheme)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    for what in ("body", "dt", "figcaption", "figure svg text"):
        script = "const s = getComputedStyle(document.querySelector(arguments[0])); return s.fill"
        ink = browser.execute_script(script if "svg" in what else script.replace("fill", "color"), what)
        one, other = sorted((luminance(ink), luminance(paper)))
        assert (other + 0.05) / (one + 0.05) >= 4.5, (what, ink, paper)


@pytest.mark.parametrize("width", [360, 390, 768, 1400])
def test_it_fits_every_width(browser: Any, page: Path, width: int) -> None:
    shown(browser, page, width, "light")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    charts = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(charts) == 9
    assert min(charts) > 100


def test_nothing_is_fetched_and_nothing_runs(browser: Any, page: Path) -> None:
    browser.get_log("performance")
    shown(browser, page, 1100, "light")
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in requests if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] in ([page.as_uri()], [])
    assert browser.title == "2 adapters"
    assert not browser.execute_script("return document.scripts.length + document.images.length")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    text = browser.execute_script("return document.body.innerText")
    assert "<script>document.title='run'</script>" in text
    assert "\\x1b[31m\\u202e" in text


def test_it_says_what_it_is_about(page: Path) -> None:
    text = page.read_text()
    for words in ("st&lt;b&gt;yle &amp; co", "watercolor", "Where it acts", "Each with each", "attn1.to_q", "resize --size"):
        assert words in text
    assert "http://" not in re.sub(r'"http://www\.w3\.org/[^"]*"', "", text)
    assert "https://" not in text


def test_equal_adapters_make_equal_pages(tmp_path: Path) -> None:
    for name in ("one", "other"):
        report([LORA], tmp_path / f"{name}.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "other.html").read_bytes()


def test_what_depends_on_its_weight_says_so(tmp_path: Path, invoke: Run) -> None:
    stem = "lora_unet_input_blocks_4_1_proj_in"
    tensors = {f"{stem}.lora_up.weight": torch.ones(8, 2), f"{stem}.lora_down.weight": torch.ones(2, 8)}
    save(tmp_path / "dora.safetensors", tensors | {f"{stem}.dora_scale": torch.ones(8, 1)})
    done = invoke("report", "dora.safetensors", "-o", "dora.html")
    assert done.returncode == 0
    assert "--base" in done.stderr
    assert "only the base could tell: 1." in (tmp_path / "dora.html").read_text()


def test_what_cannot_be_drawn_is_said(tmp_path: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is a checkpoint" in invoke("report", FIXTURES / "llama", "-o", "a.html").stderr
    assert invoke("report", LORA, "-o", "a.html", "-q").returncode == 0
    assert "exists; pass --overwrite" in invoke("report", LORA, "-o", "a.html").stderr
    done = invoke("report", LORA, STYLE, "-o", "b.html")
    assert done.returncode == 0
    assert "They cannot be compared" in (tmp_path / "b.html").read_text()
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    with pytest.raises(LoratoolError, match=r"pip install 'loratool\[report\]'"):
        report([LORA], tmp_path / "c.html")
    assert not os.path.exists(tmp_path / "c.html")
