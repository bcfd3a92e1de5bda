"""What loratool says of the machine, for bug reports."""

from __future__ import annotations

import json

import torch

from tests.conftest import Run


def test_env_tells_versions_and_devices(invoke: Run) -> None:
    shown = invoke("env").stdout
    assert torch.__version__ in shown
    assert "cpu" in shown
    found = json.loads(invoke("env", "--json").stdout)
    assert found["versions"]["loratool"]
    assert found["memory"] >= 0
    assert found["devices"][0]["name"] == "cpu"
