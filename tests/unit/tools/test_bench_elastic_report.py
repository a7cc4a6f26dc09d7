"""The report compares runs of the same task and seed, and draws what it compares."""

from pathlib import Path
from typing import Any

import pytest

from tools.bench.elastic_report import plot, table


def row(method: str, seed: int, accuracy: float, seconds: float, peak: int) -> dict[str, Any]:
    facts = {"task": "reviews", "method": method, "blocks": 30, "seed": seed, "judge": "heldout", "loss": 0.5}
    return {**facts, "accuracy": accuracy, "seconds": seconds, "peak_bytes": peak}


ROWS = [
    row("blockwise-bp", 0, 0.88, 50.0, 800_000_000),
    row("peft-fp32", 0, 0.86, 100.0, 4_000_000_000),
    row("blockwise-bp", 1, 0.90, 200.0, 400_000_000),
    row("peft-fp32", 1, 0.88, 200.0, 4_000_000_000),
    row("blockwise-bp", 2, 0.92, 1.0, 600_000_000),  # its counterpart has not run
]


def test_ratios_are_those_of_runs_with_the_same_seed() -> None:
    lines = {line.split(" | ")[1]: line for line in table(ROWS).splitlines()[2:]}
    ours = lines["blockwise-bp, k = 30"].strip("| ").split(" | ")
    assert ours[2:5] == ["3", "90.0%", "4.0%"]
    assert ours[-2:] == ["0.75", "0.15"]
    assert lines["peft-fp32, k = 30"].strip("| ").split(" | ")[-2:] == ["1.00", "1.00"]


def test_of_a_grid_the_best_is_compared_with() -> None:
    grid = [ROWS[1] | {"lr": 1e-3, "epochs": 3}, ROWS[1] | {"lr": 3e-4, "epochs": 1, "accuracy": 0.7, "seconds": 25.0}]
    lines = {line.split(" | ")[1]: line for line in table([*grid, ROWS[0]]).splitlines()[2:]}
    assert lines["blockwise-bp, k = 30"].strip("| ").split(" | ")[-2] == "0.50"
    assert lines["peft-fp32, k = 30, lr 0.0003, epochs 1"].strip("| ").split(" | ")[-2] == "0.25"


@pytest.mark.slow
def test_it_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(ROWS, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
