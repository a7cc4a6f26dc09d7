"""`agentd fit`: what it says of a file is what it has found out with an engine and a trainer of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import shape_model


def fit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("AGENTD_")}
    command = [sys.executable, "-m", "agentd", "fit", *arguments]
    return subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


def report(path: Path) -> dict[str, Any]:
    result = fit(str(path), "--json", AGENTD_MODEL_THREADS="1")
    assert result.returncode == 0, result.stderr
    tree: dict[str, Any] = json.loads(result.stdout)
    return tree


def test_a_model_that_trains_in_every_way(tmp_path: Path) -> None:
    tree = report(shape_model.write(tmp_path / "model.gguf", "smollm3"))
    assert tree["model"]["architecture"] == "smollm3"
    trains = {"blockwise": True, "suffix_blocks": 6, "zeroth_order": True, "compared": True, "reason": None}
    assert tree["trains"] == trains
    assert {(plan["method"], plan["blocks"]) for plan in tree["plans"]} >= {("mezo", 0), ("blockwise-bp", 6)}
    assert tree["serving_bytes"] == sum(term["bytes"] for term in tree["serving"])
    engine = next(term["bytes"] for term in tree["serving"] if term["name"] == "engine")
    assert engine > tree["model"]["bytes"] + (40 << 20)  # a process that has the weights, and Python
    assert all(rate > 0 for rate in tree["tokens_per_second"].values())
    assert set(tree["tokens_per_second"]) >= {"forward", "backward", "trunk"}
    assert all(plan["seconds"] > 0 for plan in tree["plans"])


def test_a_model_that_learns_by_forward_passes_alone(tmp_path: Path) -> None:
    path = shape_model.write(tmp_path / "model.gguf", "gemma4-e2b")
    result = fit(str(path), AGENTD_MODEL_THREADS="1")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "suffix BP: no; zeroth order: yes" in result.stdout
    assert "an embedding of the token" in result.stdout
    assert [line.split(",")[0] for line in lines[lines.index("") + 2 :]] == ["MeZO"]


@pytest.mark.parametrize("content", [b"", b"GGUF"])
def test_no_model_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    result = fit(str(path))
    assert result.returncode != 0
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
