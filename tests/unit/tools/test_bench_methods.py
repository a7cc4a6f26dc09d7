"""The bench of MeZO on a model's own weights, on a tiny model: its tables have numbers that can be true."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools import tiny_model
from tools.bench.elastic_tasks import reviews
from tools.bench.paper import methods, methods_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(methods_model, "THREADS", torch.get_num_threads())
    return tiny_model.write(tmp_path / "tiny.gguf")


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()[2:]]


@pytest.mark.slow
def test_a_step_is_compared_with_two_forwards(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods.main(["step", str(model), "--batch", "2", "--length", "16", "--rounds", "1", "--dtype", "fp32"])
    table = rows(capsys.readouterr().out)
    assert [row[1] for row in table[:4]] == ["two forwards", "this, rademacher", "this, gaussian", "published"]
    assert {row[0] for row in table} == {"next token at every position", "one token after the last"}
    assert all(float(row[4]) == 1 for row in table if row[1] == "two forwards")


@pytest.mark.slow
def test_in_fp32_the_projected_gradient_is_autograd_s(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = reviews("tune")
    few = replace(task, answers=("a", "z"), train=[(text[-20:], right) for text, right in task.train[:32]])
    monkeypatch.setattr(methods, "reviews", lambda judge: few)
    methods.main(["gradient", str(model), "--seeds", "2", "--epsilons", "1e-3", "--dtype", "fp32"])
    table = rows(capsys.readouterr().out)
    assert [row[1] for row in table] == ["rademacher", "gaussian"]
    assert all(float(row[3]) <= float(row[4]) < 0.1 for row in table)
