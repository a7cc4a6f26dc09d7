"""Memory that goes away during a pass, and comes back: a real daemon, and a process that really takes the memory."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.tiny_passes import Learner, begin, finished, progress
from tools import reviews, short_model
from tools.daemon import DaemonProcess, eventually

MB = 10**6
BUDGET = 1000 * MB  # for the pass, as long as no one else takes it
DAEMON = 170 * MB  # that daemon and engine take, their mapped weights aside
FLOOR_BELOW = 100 * MB  # the reserve
BELOW_FLOOR = 50 * MB
GATE = {"alpha": 0.4, "max_skill_loss": 1}  # without skills, which are about the gate alone

# Takes memory until this much is left, whatever else the machine does, and keeps it.
TAKE = """
import sys, time, psutil
kept = []
while psutil.virtual_memory().available > int(sys.argv[1]):
    kept.append(b"1" * 20_000_000)
print("taken", flush=True)
time.sleep(600)
"""


def examples(n: int) -> bytes:
    """Movie reviews, each with its answer."""
    answers = {"positive": "yes", "negative": "no"}
    rows = reviews.rows("train")[:n]
    lines = [json.dumps({"task": "reviews", "text": row["text"], "label": answers[row["label"]]}) for row in rows]
    return "\n".join(lines).encode()


@pytest.fixture(scope="module")
def model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model with a few of its blocks: the trainer's work is the same, the engine's a fraction."""
    return short_model.write(tmp_path_factory.mktemp("model") / "short.gguf", real_model, tokens=None)


@pytest.mark.exclusive  # another test would be short of memory, too
def test_the_dial_goes_down_when_memory_is_taken_and_up_again_when_it_returns(model: Path) -> None:
    available = psutil.virtual_memory().available
    reserve = available - DAEMON - BUDGET
    settings: dict[str, Any] = {
        "model": {"threads": 2},
        "adapt": {"enabled": False, "trial": {"duration": "300ms"}, "gate": GATE},
        "memory": {"reserve": reserve, "floor": reserve - FLOOR_BELOW},
    }
    with DaemonProcess(model, settings) as daemon:
        daemon.start()
        sent = daemon.post("/v1/examples", examples(150), headers={"content-type": "application/x-ndjson"})
        assert sent.status == 200, sent.body
        number = begin(daemon, method="suffix-bp", blocks=4, zo_steps=0)

        def trains() -> bool:
            now = progress(daemon)
            assert not now["done"], now["reason"]
            return bool(now["phase"] == "train" and now["step"] >= 2)

        eventually(trains, 120)
        before = progress(daemon)
        left = str(reserve - FLOOR_BELOW - BELOW_FLOOR)
        with subprocess.Popen([sys.executable, "-c", TAKE, left], stdout=subprocess.PIPE) as ballast:
            try:
                assert ballast.stdout is not None
                assert ballast.stdout.readline() == b"taken\n"
                moved = eventually(lambda: moves(daemon, number), 120)
                assert daemon.ask("What is the capital of France?", max_tokens=4).status == 200
                time.sleep(3)
            finally:
                ballast.kill()
        row = finished(daemon, number, 300)
        assert row["state"] in ("committed", "rejected"), row["reason"]
        changes = moves(daemon, number)
        assert changes[0]["from"] == before_setting(row), moved
        assert changes[0]["needed_bytes"] < row["predicted_bytes"]
        assert "memory" in changes[0]["reason"]
        assert changes[-1]["needed_bytes"] > changes[0]["needed_bytes"]
        assert "4 blocks" in changes[-1]["to"]
        steps = daemon.get(f"/admin/passes/{number}", admin=True).json["steps"]
        trained = [step["step"] for step in steps if step["phase"] == "bp" and step["loss"] is not None]
        # What was learned before was not thrown away: no step was taken twice.
        assert len(trained) == len(set(trained))
        assert before["step"] in trained
        assert daemon.get("/admin/status", admin=True).json["requests"]["failed"] == 0


def test_a_trainer_that_is_killed_takes_seconds_of_the_pass_with_it(model_path: Path) -> None:
    adapt: dict[str, Any] = {"enabled": False, "trial": {"duration": "300ms"}, "gate": {**GATE, "min_holdout": 5}}
    with Learner(model_path, {"adapt": adapt}) as daemon:
        daemon.start()
        sent = daemon.post("/v1/examples", examples(90), headers={"content-type": "application/x-ndjson"})
        assert sent.status == 200, sent.body
        number = begin(daemon, method="suffix-bp", blocks=2, zo_steps=0)
        written = daemon.state / "passes" / str(number) / "kept-adapter.gguf"
        eventually(written.exists, 120)
        before = progress(daemon)["step"]
        trainers = [p for p in psutil.Process(daemon.pid).children() if "agentd.trainer" in p.cmdline()]
        assert len(trainers) == 1
        trainers[0].kill()
        row = finished(daemon, number, 300)
        assert row["state"] in ("committed", "rejected"), row["reason"]
        changes = moves(daemon, number)
        assert len(changes) == 1
        assert "killed" in changes[0]["reason"]
        assert changes[0]["needed_bytes"] < row["predicted_bytes"]
        steps = daemon.get(f"/admin/passes/{number}", admin=True).json["steps"]
        trained = [step["step"] for step in steps if step["phase"] == "bp" and step["loss"] is not None]
        assert before > 1
        assert len(trained) > before
        assert trained.count(1) == 1, "training began anew"


def before_setting(row: dict[str, Any]) -> str:
    details = ", one in memory at a time" if row["plan"]["checkpoint"] else ""
    return f"{row['plan']['method']} with {row['plan']['blocks']} blocks{details}"


def moves(daemon: DaemonProcess, number: int) -> list[dict[str, Any]]:
    events = daemon.get(f"/admin/passes/{number}", admin=True).json["events"]
    return [event["data"] for event in sorted(events, key=lambda event: event["id"]) if event["kind"] == "dial"]
