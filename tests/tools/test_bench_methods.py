"""The bench of the methods on the weights: what its report makes of runs, and a whole run on a tiny model."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import bench_methods, bench_methods_learners, bench_methods_model, tiny_model
from tools.bench_elastic_tasks import reviews
from tools.bench_methods import plot, table


def row(method: str, seed: int, ends: tuple[float, float], best: float = 0.0) -> dict[str, Any]:
    accuracy, loss = ends
    curve = [
        {"seconds": 0.0, "steps": 0, "accuracy": 0.5, "loss": 1.0},
        {"seconds": 5.0, "steps": 5, "accuracy": best, "loss": 0.9},
        {"seconds": 10.0, "steps": 10, "accuracy": accuracy, "loss": loss},
    ]
    facts = {"model": "m", "method": method, "seed": seed, "seconds": 10.0, "steps": 10, "peak_bytes": 500_000_000}
    return {**facts, "curve": curve, "used": {"lr_zo": 1e-5}}


ROWS = [row("bp", 0, (0.8, 0.4)), row("bp", 1, (0.9, 0.6), best=0.95), row("mezo:1", 0, (0.6, 0.7))]


def test_a_method_is_its_mean_and_spread_over_seeds() -> None:
    lines = {line.strip("| ").split(" | ")[0]: line.strip("| ").split(" | ") for line in table(ROWS).splitlines()[2:]}
    assert lines["bp"] == ["bp", "2", "10", "10", "85.0%", "10.0%", "87.5%", "0.500", "0.200", "500 MB", "lr_zo 1e-05"]
    assert lines["mezo:1"][1] == "1"
    assert "50.0%" in "".join(lines["before"])


def test_it_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot([ROWS, ROWS[:1]], tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = tiny_model.write(tmp_path / "tiny.gguf"), tmp_path / "runs.jsonl"
    command = ["accuracy", str(model), "--output", str(output), "--methods", "bp", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["bench_methods", *command, "--seconds", "0.5", "--points", "1", "--lr", "1e-3"])
    bench_methods.main()
    bench_methods.main()
    (line,) = output.read_text().splitlines()
    found = json.loads(line)
    assert found["steps"] > 0
    assert found["used"]["lr_bp"] == 1e-3
    assert found["peak_bytes"] > 10_000_000
    assert len(found["curve"]) == 2
    assert capsys.readouterr().out.count("bp seed 0") == 1


def test_a_run_that_was_put_aside_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = reviews("tune")
    train, judged = ([(text[-20:], right) for text, right in rows] for rows in (task.train[:32], task.judged[:4]))
    few = replace(task, answers=("a", "z"), train=train, judged=judged)
    monkeypatch.setattr(bench_methods_learners, "reviews", lambda judge: few)
    monkeypatch.setattr(bench_methods_model, "THREADS", torch.get_num_threads())
    facts = {"model": tiny_model.write(tmp_path / "tiny.gguf"), "method": "elasticzo:1", "seed": "0", "seconds": 1e9}
    facts |= {"dtype": "fp32", "judge": "tune", "points": 1, "lr": None, "steps": 2}

    def run(state: Path | None) -> dict[str, Any]:
        return bench_methods_learners.accuracy(argparse.Namespace(**facts, state=state, slice=0.0))

    whole, state = run(None), tmp_path / "run.state"
    parts = [run(state) for _ in range(2)]
    assert [part["steps"] for part in parts] == [1, 2]
    assert ["curve" in part for part in parts] == [False, True]
    assert parts[-1]["used"] == whole["used"]
    assert parts[-1]["curve"][-1]["loss"] == whole["curve"][-1]["loss"] != whole["curve"][0]["loss"]
