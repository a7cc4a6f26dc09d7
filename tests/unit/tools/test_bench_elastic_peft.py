"""PEFT's LoRA, which the dial is compared with: the program learns what it is given, and says what it took."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import tiny_model


@pytest.mark.slow
def test_it_learns_and_tells_what_it_took(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = tiny_model.write(tmp_path / "tiny.gguf")
    rows = [("ab" * (4 + i % 5) if i % 2 else "yz" * (4 + i % 3), i % 2) for i in range(64)]
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"answers": ["n", "y"], "train": rows, "judged": rows}))

    def run(lr: float) -> dict[str, float]:
        arguments = [str(model), str(task), "fp32", "0", str(lr), "2"]
        command = [sys.executable, "-m", "tools.bench.elastic_peft", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        results: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return results

    idle, learned = run(0.0), run(0.05)
    assert learned["loss"] < 0.9 * idle["loss"]
    assert learned["accuracy"] > 0.5
    assert learned["seconds"] > 0
    assert learned["start_seconds"] > 0
    assert learned["peak_bytes"] > 100_000_000  # torch and transformers are in it
