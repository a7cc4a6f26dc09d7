"""`make demo-drift` as it runs, on scikit-learn's digits: the daemon recovers by itself, and the curve is drawn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.drift.camera import Seen
from tools.drift.plot import points

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_turned_camera_is_recovered_from(tmp_path: Path) -> None:
    plot, figures = tmp_path / "drift.png", tmp_path / "drift.json"
    command = [sys.executable, "-m", "tools.drift", "--digits", "--steps", "400", "--upright", "1", "--turned", "9"]
    run = subprocess.run(
        [*command, "--plot", str(plot), "--json", str(figures)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "The camera is turned by 45°" in run.stdout
    results = json.loads(figures.read_text())
    assert results["failed"] == 0
    assert results["labels"] > 480
    assert results["quarantined"] == 0  # a camera that labels this fast is no flood with its configuration
    assert results["answers"] == 1000
    assert results["accuracy_turned_unadapted"] < results["accuracy_upright"] - 0.2
    assert results["accuracy_turned_at_the_end"] > results["accuracy_turned_unadapted"] + 0.1
    committed = [each for each in results["passes"] if each["outcome"] == "committed"]
    assert committed
    assert {each["method"] for each in committed} == {"elasticzo"}
    assert len(results["curve"]) == 10
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_window_is_an_average_of_its_answers() -> None:
    seen = [Seen(float(i), i % 2 == 0, 0, 0) for i in range(10)]
    first, second = points(seen, [True] * 4 + [False] * 6, 4)
    assert (first.at, first.served, first.unadapted) == (1.5, 0.5, 1.0)
    assert (second.at, second.served, second.unadapted) == (5.5, 0.5, 0.0)
